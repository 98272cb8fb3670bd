"""One rank of a model as its kernels see it: shapes, and operands that several of them share.

A kernel is timed on several sets of operands, which together are more than a cache holds where they are large: weights,
states and caches then come out of memory, as in a model. Small ones stay in the cache, as in a model.

Shapes: D hidden, H query heads, G KV heads, N experts with a shared one, I intermediate, W rows of the vocabulary, C
channels of the convolution of K taps, HV value heads of dk x dv states, S slots of sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench.result import KernelSpec
from core_torch.kernels.choice import KernelOptions
from shared_config.checkpoint import head_share, vocab_share

MIN_SETS, MAX_SETS = 4, 128


class Rank:
    """One rank's shapes, and what several cases share."""

    def __init__(self, spec: KernelSpec, device: torch.device, cache_bytes: int) -> None:
        self.spec, self.config, self.tp = spec, spec.config, spec.tp
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.device, self.cache_bytes = device, cache_bytes
        self.options = KernelOptions(self.dtype, device, max_num_seqs=max(spec.batches))
        config, tp = self.config, self.tp
        self.H = len(head_share(config.num_attention_heads, 0, tp, "num_attention_heads"))
        self.G = len(head_share(config.num_key_value_heads, 0, tp, "num_key_value_heads"))
        self.key, self.value = config.key_dim // tp, config.value_dim // tp
        self.value_heads = config.linear_num_value_heads // tp
        self.channels = 2 * self.key + self.value
        self.projected = self.channels + self.value + 2 * self.value_heads
        self.shared = int(config.shared_expert_intermediate_size == config.moe_intermediate_size)
        self.W = vocab_share(config.vocab_size, 0, tp)[1]

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype or self.dtype)

    def pick(self, count: int, of: int) -> Tensor:
        """`count` different numbers from 1 to `of`."""
        return torch.randperm(of, device=self.device)[:count] + 1

    def sets(self, bytes_of_one: int) -> int:
        """How many sets of operands together are twice the cache, within bounds."""
        return min(MAX_SETS, max(MIN_SETS, -(-2 * self.cache_bytes // max(bytes_of_one, 1))))

    @cached_property
    def experts(self) -> tuple[Tensor, Tensor]:
        """(gate_up [N, 2I, D], down [N, D, I]), the shared expert behind the routed ones where it has their shape."""
        config = self.config
        N, D = config.num_experts + self.shared, config.hidden_size
        local, like = config.moe_intermediate_size // self.tp, {"dtype": self.dtype, "device": self.device}
        gate_up = torch.empty(N, 2 * local, D, **like).normal_(0, D**-0.5)
        return gate_up, torch.empty(N, D, local, **like).normal_(0, local**-0.5)

    @cached_property
    def delta_net(self) -> dict[str, Any]:
        config = self.config
        return {
            "conv_weight": self.randn(self.channels, config.linear_conv_kernel_dim) / 2,
            "a_log": torch.rand(self.value_heads, device=self.device) * 2,
            "dt_bias": self.randn(self.value_heads, dtype=torch.float32),
            "norm_weight": self.randn(config.linear_value_head_dim),
            "eps": config.rms_norm_eps,
        }

    def states(self, slots: int) -> tuple[Tensor, Tensor, Callable[[], None]]:
        """(conv [S, C, K - 1], state [S, HV, dk, dv] float32, what makes them as they were), slot 0 nobody's."""
        config = self.config
        conv = self.randn(slots + 1, self.channels, config.linear_conv_kernel_dim - 1)
        heads = self.value_heads, config.linear_key_head_dim, config.linear_value_head_dim
        state = self.randn(slots + 1, *heads, dtype=torch.float32)
        originals = conv.clone(), state.clone()

        def restore() -> None:
            conv.copy_(originals[0])
            state.copy_(originals[1])

        return conv, state, restore

    def state_bytes(self, reads: int) -> int:
        """Of `reads` times one sequence's states."""
        config = self.config
        state = self.value_heads * config.linear_key_head_dim * config.linear_value_head_dim * 4
        taps = config.linear_conv_kernel_dim - 1
        return reads * (state + self.channels * taps * self.dtype.itemsize)
