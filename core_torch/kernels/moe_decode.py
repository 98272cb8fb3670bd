"""Routing and experts for few tokens: compiled `route` and `routed_experts`, which streams each expert's weights once.

Shapes: T tokens, D hidden, N experts, K experts per token, I intermediate (this rank's share).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core_torch.kernels import native

MAX_EXPERTS, MAX_CHOICES, RECORD = 1024, 32, 16  # csrc/moe_route.cuh
MAX_TOKENS = 256  # above, the tensor cores are worth larger tiles than 8 tokens
MANY_TOKENS = 32


def check_moe_decode(
    *,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> native.Answer:
    """Whether the functions below take these experts, for batches up to MAX_TOKENS; ask once and keep the answer.

    A shared expert that is handled as one more counts in `num_experts` and `top_k`.
    """
    on_device = native.check_device(device)
    return native.first_failure(
        (on_device.usable, on_device.reason),
        (dtype == torch.bfloat16, f"moe_decode takes bfloat16, not {dtype}"),
        (num_experts <= MAX_EXPERTS, f"moe_decode takes {MAX_EXPERTS} experts, not {num_experts}"),
        (top_k <= MAX_CHOICES, f"moe_decode takes {MAX_CHOICES} experts a token, not {top_k}"),
        (
            hidden_size % 8 == 0 and intermediate_size % 8 == 0,
            f"moe_decode takes sizes that are multiples of 8, not {hidden_size} and {intermediate_size}",
        ),
    )


@dataclass(frozen=True)
class Routing:
    """weights [T, K] bfloat16, experts [T, K] int32, and the list that the expert kernels work through."""

    weights: Tensor
    experts: Tensor
    tiles: Tensor


def route_decode(
    logits: Tensor, *, num_experts: int, top_k: int, normalize: bool, launch_with_pdl: bool = True
) -> Routing:
    """`moe.route` and the list of tiles in one kernel; of equal logits the lower expert comes first. Capturable.

    logits [T, N] bfloat16 -> K = top_k choices a token. With logits [T, N + 1] the last column is the gate of a shared
    expert: it becomes expert number N and choice K of every token, weighted by sigmoid(gate).
    """
    T, choices = logits.shape[0], top_k + logits.shape[1] - num_experts
    weights = logits.new_empty(T, choices)
    experts = logits.new_empty(T, choices, dtype=torch.int32)
    tiles = _new_tiles(experts)
    native.function("moe_route", logits.device, of="moe_decode")(
        logits, weights, experts, tiles, num_experts, normalize, launch_with_pdl
    )
    return Routing(weights, experts, tiles)


def overlaps(num_tokens: int) -> bool:
    """Whether one kernel's blocks start while the one before ends: faster with few tokens, slower with
    many (bench/results/LOG.md)."""
    return num_tokens < MANY_TOKENS


def _new_tiles(experts: Tensor) -> Tensor:
    return experts.new_empty(experts.numel() + 1, RECORD, dtype=torch.int32)


def routed_experts_decode(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    tiles: Tensor | None = None,
    ahead: Sequence[Tensor] = (),
    launch_with_pdl: bool | None = None,
) -> Tensor:
    """`moe.routed_experts` in two or three kernels; capturable, and a token's bits do not depend on the other tokens.

    x [T, D], weights [T, K] bfloat16; experts [T, K] int32 or int64, where an id below 0 stands for no expert;
    gate_up [N, 2I, D] (gate rows first), down [N, D, I] -> this rank's partial sum [T, D]. `tiles` come from
    `route_decode`; without them one more kernel makes them. `ahead`: up to two contiguous tensors (weights that later
    kernels read) that are fetched into the L2 cache meanwhile. `launch_with_pdl`: by the number of tokens.
    """
    T, K = experts.shape
    N, D, I = down.shape  # noqa: E741
    launch_with_pdl = overlaps(T) if launch_with_pdl is None else launch_with_pdl
    hidden, parts = x.new_empty(T * K, I), x.new_empty(T * K, D, dtype=torch.float32)
    out = x.new_empty(T, D)
    if tiles is None:
        tiles = _new_tiles(experts)
        native.function("moe_group", x.device, of="moe_decode")(experts, tiles, N, launch_with_pdl)
    native.function("moe_decode_ahead", x.device, of="moe_decode")(
        x,
        weights,
        experts,
        tiles,
        gate_up,
        down,
        hidden,
        parts,
        out,
        launch_with_pdl,
        *native.ahead_operands(ahead),
    )
    return out
