"""The routed experts for few tokens: a compiled `routed_experts` that streams each chosen expert's weights once.

Shapes: T tokens, D hidden, N experts, K experts per token, I intermediate (this rank's share).
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_torch.kernels import native

MAX_EXPERTS, RECORD = 1024, 16  # csrc/moe_decode.cuh
MAX_TOKENS = 256  # above, the tensor cores are worth larger tiles than 8 tokens


def check_moe_decode(
    *, num_experts: int, hidden_size: int, intermediate_size: int, dtype: torch.dtype, device: torch.device
) -> native.Answer:
    """Whether `routed_experts_decode` takes these experts, for batches up to MAX_TOKENS; ask once."""
    on_device = native.check_device(device)
    return native.first_failure(
        (on_device.usable, on_device.reason),
        (dtype == torch.bfloat16, f"moe_decode takes bfloat16, not {dtype}"),
        (num_experts <= MAX_EXPERTS, f"moe_decode takes {MAX_EXPERTS} experts, not {num_experts}"),
        (
            hidden_size % 8 == 0 and intermediate_size % 8 == 0,
            f"moe_decode takes sizes that are multiples of 8, not {hidden_size} and {intermediate_size}",
        ),
    )


def routed_experts_decode(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    launch_with_pdl: bool = True,
) -> Tensor:
    """`moe.routed_experts` in four kernels; capturable, and a token's bits do not depend on the rest of the batch.

    x [T, D], weights [T, K] bfloat16; experts [T, K] int32 or int64, where an id below 0 stands for no expert;
    gate_up [N, 2I, D] (gate rows first), down [N, D, I] -> this rank's partial sum [T, D].
    """
    T, K = experts.shape
    N, D, I = down.shape  # noqa: E741
    tiles = experts.new_empty(T * K + 1, RECORD, dtype=torch.int32)
    hidden, parts = x.new_empty(T * K, I), x.new_empty(T * K, D, dtype=torch.float32)
    out = x.new_empty(T, D)
    native.function("moe_group", x.device, of="moe_decode")(experts, tiles, N, launch_with_pdl)
    native.function("moe_decode", x.device)(
        x, weights, experts, tiles, gate_up, down, hidden, parts, out, launch_with_pdl
    )
    return out
