"""The fused kernel's rounding contract in plain torch: what every other way to pay a sum is compared with.

Shapes: R ranks, T tokens, D hidden. Read off FlashInfer's `trtllm_allreduce_fusion.cuh` (fp32_acc): the sum
over ranks in rank order in float32, rounded to the dtype; the residual added in the dtype; the norm in
float32.
"""

from __future__ import annotations

from torch import Tensor

from core_torch.kernels.norm import rms_norm


def sum_in_rank_order(parts: Tensor) -> Tensor:
    """`parts [R, ...]` -> `[...]`: rank 0 + rank 1 + ... in float32, rounded once. The order is pinned."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts.dtype)


def add_rmsnorm(
    summed: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_bias: float
) -> tuple[Tensor, Tensor]:
    """`residual + summed` in the dtype, then its norm: -> (residual, normed), both `[T, D]`.

    `summed [T, D]`, `residual [T, D]` or None (none yet), `weight [D]`.
    """
    residual = summed if residual is None else residual + summed
    return residual, rms_norm(residual, weight, eps=eps, weight_bias=weight_bias)


def fold_weight(weight: Tensor, weight_bias: float) -> Tensor:
    """`weight_bias + weight` in float32, rounded once to the weight's dtype.

    For a FlashInfer whose op takes no `weight_bias`. The kernel reads the weight in the activations' dtype,
    so in bfloat16 `1 + w` keeps 8 bits: close to the kernel's own sum in float32, not equal.
    """
    return (weight_bias + weight.float()).to(weight.dtype)


def check_operands(partial: Tensor, weight: Tensor, **rows: Tensor | None) -> None:
    """`partial [T, D]`, `weight [D]` and named `rows [T, D]`: one dtype, one device, contiguous.

    Raises ValueError or TypeError with the operand's name, what was expected and what came.
    """
    if partial.dim() != 2:
        raise ValueError(f"partial must be [num_tokens, hidden_size], got shape {tuple(partial.shape)}")
    if not partial.dtype.is_floating_point:
        raise TypeError(f"partial must be float16, bfloat16 or float32, got {partial.dtype}")
    for name, operand in {"partial": partial, "weight": weight, **rows}.items():
        if operand is None:
            continue
        shape = tuple(partial.shape[1:]) if name == "weight" else tuple(partial.shape)
        if tuple(operand.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} to go with partial, got {tuple(operand.shape)}")
        if operand.dtype != partial.dtype:
            raise TypeError(f"{name} must have partial's dtype {partial.dtype}, got {operand.dtype}")
        if operand.device != partial.device:
            raise ValueError(f"{name} must be on partial's device {partial.device}, got {operand.device}")
        if not operand.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {operand.stride()}; call .contiguous()")
