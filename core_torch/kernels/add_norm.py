"""What follows an all-reduce that is not fused, in one kernel: a compiled `contract.add_rmsnorm`.

Shapes: T tokens, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_torch.kernels import native

MAX_DIM = 8192  # csrc/add_norm.cuh


def check_add_norm(*, hidden_size: int, dtype: torch.dtype, device: torch.device) -> native.Answer:
    """Whether `add_norm` takes this width; ask once and keep the answer."""
    on_device = native.check_device(device)
    return native.first_failure(
        (on_device.usable, on_device.reason),
        (dtype == torch.bfloat16, f"add_norm takes bfloat16, not {dtype}"),
        (
            hidden_size % 8 == 0 and hidden_size <= MAX_DIM,
            f"add_norm takes a width that is a multiple of 8 up to {MAX_DIM}, not {hidden_size}",
        ),
    )


def add_norm(
    summed: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    weight_bias: float,
    *,
    launch_with_pdl: bool = True,
) -> tuple[Tensor, Tensor]:
    """`contract.add_rmsnorm` in one kernel; capturable, and a token's bits do not depend on the others.

    The residual is bitwise the contract's; the norm's sum of squares has an order of its own.
    """
    out_residual = None if residual is None else torch.empty_like(residual)
    out_normed = torch.empty_like(summed)
    native.function("add_norm", summed.device)(
        summed, residual, weight, out_residual, out_normed, eps, weight_bias, launch_with_pdl
    )
    return summed if out_residual is None else out_residual, out_normed
