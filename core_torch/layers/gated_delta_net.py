"""Gated DeltaNet: short causal convolution, gated delta rule, gated norm; the state of a sequence has fixed size.

Shapes: R rows of this rank, T of its pass (see `head_exchange`), D hidden, H local key heads, HV local value heads,
dk, dv head dims, C = 2 H dk + HV dv channels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from core_torch.batch import Batch
from core_torch.cache import StateCache
from core_torch.kernels.allreduce import ReduceGroup
from core_torch.kernels.causal_conv import causal_conv
from core_torch.kernels.choice import NOT_ASKED, Answers, KernelOptions
from core_torch.kernels.gated_delta_rule import chunk_gated_delta_rule, gated_delta_gates
from core_torch.kernels.gdn_decode import check_gdn_decode, gdn_decode, gdn_decode_plain
from core_torch.layers.head_exchange import HeadExchange
from core_torch.layers.linear import Ahead, Linear, RowParallelLinear
from core_torch.layers.norm import GatedRMSNorm
from core_torch.partial_sum import PartialSum
from core_torch.pieces import Peers
from shared_config.checkpoint import div_even
from shared_config.model import Qwen3NextConfig


class CausalConv(nn.Module):
    """The taps [C, K] of the depthwise convolution."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps), requires_grad=False)


class GatedDeltaNet(nn.Module):
    """x [R, D] -> this rank's part of the mixer's output [R, D]."""

    def __init__(self, config: Qwen3NextConfig, group: ReduceGroup, context: Peers) -> None:
        super().__init__()
        k_heads = div_even(config.linear_num_key_heads, group.size, "linear_num_key_heads")
        v_heads = div_even(config.linear_num_value_heads, group.size, "linear_num_value_heads")
        self.k_dim, self.v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        parts = [(k_heads, self.k_dim)] * 2 + [(v_heads, self.v_dim)] * 2 + [(v_heads, 1)] * 2
        self.exchange = HeadExchange(context, parts)
        self.num_k_heads, _, self.num_v_heads, *_ = self.exchange.heads
        key, value = self.num_k_heads * self.k_dim, self.num_v_heads * self.v_dim
        self.sizes = [2 * key + value, value, self.num_v_heads, self.num_v_heads]
        self.in_proj = Linear(config.hidden_size, sum(heads * width for heads, width in parts))
        self.conv = CausalConv(self.sizes[0], config.linear_conv_kernel_dim)
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads), requires_grad=False)
        self.dt_bias = nn.Parameter(torch.empty(self.num_v_heads), requires_grad=False)
        self.norm = GatedRMSNorm(self.v_dim, config.rms_norm_eps)
        self.out_proj = RowParallelLinear(v_heads * self.v_dim, config.hidden_size, group)
        self.compiled = NOT_ASKED
        self.ahead: Ahead = (self.out_proj,)

    def choose_kernels(self, options: KernelOptions) -> Answers:
        self.compiled = options.ask(
            "gdn_decode",
            check_gdn_decode,
            num_k_heads=self.num_k_heads,
            num_v_heads=self.num_v_heads,
            k_dim=self.k_dim,
            v_dim=self.v_dim,
            taps=self.conv.weight.shape[1],
        )
        return {"gdn_decode": self.compiled}

    def forward(self, x: torch.Tensor, batch: Batch, cache: StateCache) -> PartialSum:
        projected = self.exchange.to_heads(self.in_proj(x), batch)
        if batch.is_decode:
            return self.out_proj(self.exchange.to_rows(self._decode(projected, batch, cache), batch))
        qkv, z, b, a = projected.split(self.sizes, dim=-1)
        g, beta = gated_delta_gates(a, b, self.A_log, self.dt_bias)
        out = self._prefill(qkv, g, beta, batch, cache)
        normed = self.norm(out, z.reshape(out.shape)).flatten(1)
        return self.out_proj(self.exchange.to_rows(normed, batch))

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        key = self.num_k_heads * self.k_dim
        q, k, v = qkv.split([key, key, self.num_v_heads * self.v_dim], dim=-1)
        return (
            q.unflatten(-1, (self.num_k_heads, self.k_dim)),
            k.unflatten(-1, (self.num_k_heads, self.k_dim)),
            v.unflatten(-1, (self.num_v_heads, self.v_dim)),
        )

    def _decode(self, projected: torch.Tensor, batch: Batch, cache: StateCache) -> torch.Tensor:
        decode = gdn_decode_plain
        if self.compiled.usable:
            decode = partial(gdn_decode, ahead=[layer.weight for layer in self.ahead])
        return decode(
            projected,
            cache.conv,
            cache.recurrent,
            batch.state_slots,
            conv_weight=self.conv.weight,
            a_log=self.A_log,
            dt_bias=self.dt_bias,
            norm_weight=self.norm.weight,
            eps=self.norm.eps,
        )

    def _prefill(
        self, qkv: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, batch: Batch, cache: StateCache
    ) -> torch.Tensor:
        outs = []
        for span in batch.spans:
            rows, slot = slice(span.first, span.first + span.num_tokens), span.slot
            conv, state = cache.conv[slot], cache.recurrent[slot]
            if span.start == 0:  # the slot holds its previous owner's state
                conv, state = torch.zeros_like(conv), torch.zeros_like(state)
            mixed, conv = causal_conv(qkv[rows], conv, self.conv.weight)
            out, state = chunk_gated_delta_rule(*self._heads(mixed), g[rows], beta[rows], state)
            cache.conv[slot], cache.recurrent[slot] = conv, state
            outs.append(out)
        return torch.cat(outs)
