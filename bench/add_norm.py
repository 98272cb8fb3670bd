"""Residual add + RMSNorm as one Triton kernel: what a careful engine without the fused op runs after its all-reduce.

It makes the comparison fair: without it the unfused column would lose by its number of kernels alone.
Shapes: T tokens, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _add_norm_row(
    summed, residual, weight, out_residual, out_normed, width, eps, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    total = tl.load(summed + row + column, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(residual + row + column, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(out_residual.dtype.element_ty)  # the norm is of the residual as it is stored
    tl.store(out_residual + row + column, rounded, mask=inside)
    value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + BIAS
    tl.store(out_normed + row + column, (value * scale * gain).to(out_normed.dtype.element_ty), mask=inside)


def add_norm(
    summed: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float, weight_bias: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """summed, residual [T, D], weight [D], contiguous, on a GPU -> (residual + summed, its norm)."""
    num_tokens, width = summed.shape
    out_residual, out_normed = torch.empty_like(summed), torch.empty_like(summed)
    block = triton.next_power_of_2(width)
    _add_norm_row[(num_tokens,)](  # pyright: ignore[reportIndexIssue] (untyped)
        summed, residual, weight, out_residual, out_normed, width, eps, BIAS=weight_bias, BLOCK=block,
        num_warps=min(16, max(4, block // 512)),  # pyright: ignore[reportCallIssue] (Triton's own)
    )  # fmt: skip
    return out_residual, out_normed
