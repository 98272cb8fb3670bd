"""Gated full attention: q and an output gate from one projection, normed q and k, partial rotary, GQA.

Shapes: R rows of this rank, T of its pass (see `head_exchange`), D hidden, H local query heads, G local KV heads, d
head_dim.
"""

from __future__ import annotations

import torch
from torch import nn

from core_torch.batch import Batch
from core_torch.cache import KVCache
from core_torch.kernels.allreduce import ReduceGroup
from core_torch.kernels.attention import decode_attention, prefill_attention, write_kv
from core_torch.kernels.choice import NOT_ASKED, Answers, KernelOptions
from core_torch.kernels.flash_prefill import check_even_prefill, check_flash_prefill, flash_prefill
from core_torch.kernels.norm_rope import check_norm_rope, norm_rope
from core_torch.kernels.paged_decode import check_paged_decode, paged_decode_attention
from core_torch.kernels.rope import apply_rotary, rotary_cos_sin
from core_torch.layers.head_exchange import HeadExchange
from core_torch.layers.linear import Ahead, Linear, RowParallelLinear
from core_torch.layers.norm import WEIGHT_BIAS, RMSNorm
from core_torch.partial_sum import PartialSum
from core_torch.pieces import Peers
from shared_config.checkpoint import head_share
from shared_config.model import Qwen3NextConfig


class GatedAttention(nn.Module):
    """x [R, D] -> this rank's part of the attention output [R, D]."""

    def __init__(self, config: Qwen3NextConfig, group: ReduceGroup, context: Peers) -> None:
        super().__init__()
        heads = len(head_share(config.num_attention_heads, group.rank, group.size, "num_attention_heads"))
        kv_heads = len(head_share(config.num_key_value_heads, group.rank, group.size, "num_key_value_heads"))
        self.head_dim, self.rotary_dim, self.rope_theta = (
            config.head_dim,
            config.rotary_dim,
            config.rope_theta,
        )
        self.exchange = HeadExchange(context, [(heads, self.head_dim)] * 2 + [(kv_heads, self.head_dim)] * 2)
        self.num_heads, _, self.num_kv_heads, _ = self.exchange.heads
        self.sizes = self.exchange.sizes
        columns = 2 * (heads + kv_heads) * self.head_dim
        self.in_proj = Linear(config.hidden_size, columns, bias=config.attention_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.out_proj = RowParallelLinear(
            heads * self.head_dim, config.hidden_size, group, bias=config.attention_bias
        )
        self.decodes = self.prefills = self.even = NOT_ASKED
        self.ahead: Ahead = (self.out_proj,)

    def choose_kernels(self, options: KernelOptions) -> Answers:
        """One kernel writes the cache and another reads it; a step runs both or neither."""
        heads = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
        }
        answers = {
            "norm_rope": options.ask(
                "norm_rope", check_norm_rope, head_dim=self.head_dim, rotary_dim=self.rotary_dim
            ),
            "paged_decode": options.ask(
                "paged_decode",
                check_paged_decode,
                **heads,
                max_num_seqs=options.max_num_seqs,
            ),
            "flash_prefill": options.ask("flash_prefill", check_flash_prefill, **heads),
            "even_prefill": options.ask("even_prefill", check_even_prefill, **heads),
        }
        writes = answers["norm_rope"]
        for name in ("paged_decode", "flash_prefill", "even_prefill"):
            answers[name] = answers[name] if writes.usable else writes
        self.decodes, self.prefills = answers["paged_decode"], answers["flash_prefill"]
        self.even = answers["even_prefill"]
        return answers

    def forward(self, x: torch.Tensor, batch: Batch, cache: KVCache) -> PartialSum:
        projected = self.exchange.to_heads(self.in_proj(x), batch)
        if (self.decodes if batch.is_decode else self.prefills).usable:
            return self.out_proj(self.exchange.to_rows(self._in_kernels(projected, batch, cache), batch))
        T = projected.shape[0]
        q, gate, k, v = projected.split(self.sizes, dim=-1)
        q = self.q_norm(q.reshape(T, self.num_heads, self.head_dim))
        k = self.k_norm(k.reshape(T, self.num_kv_heads, self.head_dim))
        v = v.reshape(T, self.num_kv_heads, self.head_dim)
        cos, sin = rotary_cos_sin(batch.positions, rotary_dim=self.rotary_dim, theta=self.rope_theta)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        write_kv(k, v, cache.k, cache.v, batch.kv_slots)
        out = self._attend(q, batch, cache)
        return self.out_proj(self.exchange.to_rows(out.reshape(T, -1) * gate.sigmoid(), batch))

    def _in_kernels(self, projected: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        q = norm_rope(
            projected,
            batch.positions,
            batch.kv_slots,
            cache.k,
            cache.v,
            q_weight=self.q_norm.weight,
            k_weight=self.k_norm.weight,
            num_heads=self.num_heads,
            rotary_dim=self.rotary_dim,
            theta=self.rope_theta,
            eps=self.q_norm.eps,
            weight_bias=WEIGHT_BIAS,
        )
        gate, scale = projected[:, self.sizes[0] : 2 * self.sizes[0]], self.head_dim**-0.5
        if not batch.is_decode:
            assert batch.ragged is not None  # every prefill pass has it
            out = flash_prefill(q, cache.k, cache.v, batch.ragged, scale=scale, even=self.even.usable)
            return out.flatten(1) * gate.sigmoid()
        out = paged_decode_attention(
            q,
            cache.k,
            cache.v,
            batch.page_tables,
            batch.lengths,
            scale=scale,
            gate=gate,
            ahead=[layer.weight for layer in self.ahead],
        )
        return out.flatten(1)

    def _attend(self, q: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        scale = self.head_dim**-0.5
        if batch.is_decode:
            return decode_attention(q, cache.k, cache.v, batch.page_tables, batch.lengths, scale=scale)
        outs = [
            prefill_attention(
                q[s.first : s.first + s.num_tokens],
                cache.k,
                cache.v,
                batch.page_tables[i],
                start=s.start,
                scale=scale,
            )
            for i, s in enumerate(batch.spans)
        ]
        return torch.cat(outs)
