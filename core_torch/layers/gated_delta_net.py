"""Gated DeltaNet: short causal convolution, gated delta rule, gated norm; the state of a sequence has fixed size.

Shapes: R rows of this rank, T of its pass (see `head_exchange`), D hidden, H local key heads, HV local value heads,
dk, dv head dims, C = 2 H dk + HV dv channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from core_torch.batch import Batch, Span
from core_torch.cache import StateCache
from core_torch.kernels.allreduce import ReduceGroup
from core_torch.kernels.choice import NOT_ASKED, Answers, KernelOptions
from core_torch.kernels.gdn_decode import check_gdn_decode, gdn_decode, gdn_decode_plain
from core_torch.kernels.gdn_prefill import (
    CARRIES,
    check_gdn_prefill,
    cut_into_chunks,
    gdn_prefill,
    gdn_prefill_plain,
)
from core_torch.layers.head_exchange import HeadExchange
from core_torch.layers.linear import Ahead, Linear, RowParallelLinear
from core_torch.layers.norm import GatedRMSNorm
from core_torch.partial_sum import PartialSum
from core_torch.pieces import Peers
from shared_config.checkpoint import div_even
from shared_config.model import Qwen3NextConfig

WARM_UP_TOKENS = 64


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
        self.decodes = self.prefills = NOT_ASKED
        self.ahead: Ahead = (self.out_proj,)

    def choose_kernels(self, options: KernelOptions) -> Answers:
        shapes = {
            "num_k_heads": self.num_k_heads,
            "num_v_heads": self.num_v_heads,
            "k_dim": self.k_dim,
            "v_dim": self.v_dim,
            "taps": self.conv.weight.shape[1],
        }
        self.decodes = options.ask("gdn_decode", check_gdn_decode, **shapes)
        self.prefills = options.ask("gdn_prefill", check_gdn_prefill, **shapes)
        return {"gdn_decode": self.decodes, "gdn_prefill": self.prefills}

    @torch.inference_mode()
    def warm_up(self, device: torch.device) -> None:
        if not self.prefills.usable:
            return
        channels, taps = self.conv.weight.shape
        dtype, dim = self.conv.weight.dtype, self.v_dim
        projected = torch.zeros(WARM_UP_TOKENS, sum(self.sizes), dtype=dtype, device=device)
        conv = torch.zeros(1, channels, taps - 1, dtype=dtype, device=device)
        state = torch.zeros(1, self.num_v_heads, dim, dim, device=device)
        chunks = cut_into_chunks([Span(0, WARM_UP_TOKENS, 0, 0)], device)
        for carry in CARRIES:
            gdn_prefill(projected, conv, state, chunks, **self._weights(), carry=carry)

    def forward(self, x: torch.Tensor, batch: Batch, cache: StateCache) -> PartialSum:
        projected = self.exchange.to_heads(self.in_proj(x), batch)
        mix = self._decode if batch.is_decode else self._prefill
        return self.out_proj(self.exchange.to_rows(mix(projected, batch, cache), batch))

    def _weights(self) -> dict[str, Any]:
        return {
            "conv_weight": self.conv.weight,
            "a_log": self.A_log,
            "dt_bias": self.dt_bias,
            "norm_weight": self.norm.weight,
            "eps": self.norm.eps,
        }

    def _decode(self, projected: torch.Tensor, batch: Batch, cache: StateCache) -> torch.Tensor:
        decode = gdn_decode_plain
        if self.decodes.usable:
            decode = partial(gdn_decode, ahead=[layer.weight for layer in self.ahead])
        return decode(projected, cache.conv, cache.recurrent, batch.state_slots, **self._weights())

    def _prefill(self, projected: torch.Tensor, batch: Batch, cache: StateCache) -> torch.Tensor:
        if self.prefills.usable:
            assert batch.chunks is not None  # every prefill pass has them
            return gdn_prefill(projected, cache.conv, cache.recurrent, batch.chunks, **self._weights())
        return gdn_prefill_plain(projected, cache.conv, cache.recurrent, batch.spans, **self._weights())
