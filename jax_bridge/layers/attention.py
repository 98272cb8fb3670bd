"""Gated full attention: q and an output gate from one projection, normed q and k, partial rotary, GQA.

Shapes: R rows of this rank, T of its pass (see `head_exchange`), D hidden, H local query heads, G local KV heads,
d head_dim.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from core_torch.kernels.choice import NOT_ASKED, Answers, KernelOptions
from core_torch.kernels.norm_rope import check_norm_rope
from core_torch.kernels.paged_decode import check_paged_decode
from jax_bridge.axes import MeshAxis
from jax_bridge.batch import Batch
from jax_bridge.cache import KVCache
from jax_bridge.kernels.activation import sigmoid
from jax_bridge.kernels.attention import (
    check_fresh_attention,
    decode_attention,
    fresh_attention,
    prefill_attention,
    write_kv,
)
from jax_bridge.kernels.norm_rope import norm_rope
from jax_bridge.kernels.paged_decode import paged_decode_attention
from jax_bridge.kernels.rope import apply_rotary, rotary_cos_sin
from jax_bridge.layers.head_exchange import HeadExchange, split_sizes
from jax_bridge.layers.linear import Linear, RowParallelLinear
from jax_bridge.layers.norm import WEIGHT_BIAS, RMSNorm
from jax_bridge.partial_sum import PartialSum, ReduceAxis
from shared_config.checkpoint import head_share
from shared_config.model import Qwen3NextConfig


class GatedAttention(nnx.Module):
    """x [R, D] -> this rank's part of the attention output [R, D], and the cache with the new keys and values."""

    def __init__(self, config: Qwen3NextConfig, axis: ReduceAxis, context: MeshAxis) -> None:
        heads = len(head_share(config.num_attention_heads, 0, axis.size, "num_attention_heads"))
        kv_heads = len(head_share(config.num_key_value_heads, 0, axis.size, "num_key_value_heads"))
        parts = [(count, config.head_dim) for count in (heads, heads, kv_heads, kv_heads)]
        self.exchange = HeadExchange(context, parts)
        self.num_heads, _, self.num_kv_heads, _ = self.exchange.heads
        self.head_dim, self.rotary_dim, self.rope_theta = (
            config.head_dim,
            config.rotary_dim,
            config.rope_theta,
        )
        self.sizes = self.exchange.sizes
        columns = 2 * (heads + kv_heads) * self.head_dim
        self.in_proj = Linear(config.hidden_size, columns, axis, bias=config.attention_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.out_proj = RowParallelLinear(
            heads * self.head_dim, config.hidden_size, axis, bias=config.attention_bias
        )
        self.compiled = self.fresh = NOT_ASKED

    def choose_kernels(self, options: KernelOptions) -> Answers:
        """One kernel writes the cache and the other reads it; a decode step runs both or neither."""
        answers = {
            "norm_rope": options.ask(
                "norm_rope", check_norm_rope, head_dim=self.head_dim, rotary_dim=self.rotary_dim
            ),
            "paged_decode": options.ask(
                "paged_decode",
                check_paged_decode,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                max_num_seqs=options.max_num_seqs,
            ),
        }
        self.compiled = next((a for a in answers.values() if not a.usable), answers["paged_decode"])
        self.fresh = options.ask(
            "fresh_prefill",
            check_fresh_attention,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
        )
        return {**dict.fromkeys(answers, self.compiled), "fresh_prefill": self.fresh}

    def __call__(self, x: Float[Array, "R D"], batch: Batch, cache: KVCache) -> tuple[PartialSum, KVCache]:
        projected = self.exchange.to_heads(self.in_proj(x), batch)
        if batch.is_decode and self.compiled.usable:
            out, cache = self._decode(projected, batch, cache)
            return self.out_proj(self.exchange.to_rows(out, batch)), cache
        T = projected.shape[0]
        q, gate, k, v = split_sizes(projected, self.sizes)
        q = self.q_norm(q.reshape(T, self.num_heads, self.head_dim))
        k = self.k_norm(k.reshape(T, self.num_kv_heads, self.head_dim))
        v = v.reshape(T, self.num_kv_heads, self.head_dim)
        cos, sin = rotary_cos_sin(batch.positions, rotary_dim=self.rotary_dim, theta=self.rope_theta)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        cache = KVCache(*write_kv(k, v, cache.k, cache.v, batch.kv_slots))
        spans = batch.spans
        if spans is not None and spans.fresh and self.fresh.usable:
            q, k, v = map(spans.split, (q, k, v))
            out = spans.join(fresh_attention(q, k, v, spans.counts, scale=self.head_dim**-0.5))
        else:
            out = self._attend(q, batch, cache)
        return self.out_proj(self.exchange.to_rows(out.reshape(T, -1) * sigmoid(gate), batch)), cache

    def _decode(self, projected: jax.Array, batch: Batch, cache: KVCache) -> tuple[jax.Array, KVCache]:
        q, *written = norm_rope(
            projected,
            batch.positions,
            batch.kv_slots,
            cache.k,
            cache.v,
            q_weight=self.q_norm.weight[...],
            k_weight=self.k_norm.weight[...],
            num_heads=self.num_heads,
            rotary_dim=self.rotary_dim,
            theta=self.rope_theta,
            eps=self.q_norm.eps,
            weight_bias=WEIGHT_BIAS,
        )
        cache = KVCache(*written)
        out = paged_decode_attention(
            q,
            cache.k,
            cache.v,
            batch.page_tables,
            batch.lengths,
            projected,
            scale=self.head_dim**-0.5,
        )
        return out.reshape(projected.shape[0], -1), cache

    def _attend(self, q: jax.Array, batch: Batch, cache: KVCache) -> jax.Array:
        scale = self.head_dim**-0.5
        if batch.spans is None:
            return decode_attention(q, cache.k, cache.v, batch.page_tables, batch.lengths, scale=scale)
        out = prefill_attention(
            batch.spans.split(q),
            cache.k,
            cache.v,
            batch.page_tables,
            starts=batch.spans.starts,
            lengths=batch.lengths,
            scale=scale,
        )
        return batch.spans.join(out)
