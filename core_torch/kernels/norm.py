"""RMSNorm, plain and gated, each with its float32 reference.

Shapes: T tokens (any leading dims), D the normalised dim. Statistics and the product with the weight are in
float32 and rounded once, as Qwen3-Next's checkpoints were trained (transformers, `Qwen3NextRMSNorm`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, weight_bias: float = 0.0) -> torch.Tensor:
    """`x * rsqrt(mean(x^2) + eps) * (weight_bias + weight)` over the last dim, in x's dtype.

    `weight_bias` is 1.0 for Qwen3-Next's zero-centred norms, whose checkpoints store `w` and scale by `1 + w`.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed * (weight_bias + weight.float())).to(x.dtype)


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """`weight * norm(x) * silu(gate)`, the norm before the gate; its weight is not zero-centred.

    The normalised value is rounded to x's dtype before the product with `weight`, as transformers'
    `Qwen3NextRMSNormGated` does.
    """
    x32 = x.float()
    normed = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return ((weight * normed) * F.silu(gate.float())).to(x.dtype)


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, weight_bias: float = 0.0
) -> torch.Tensor:
    """float64 `rms_norm`."""
    x64 = x.double()
    return x64 / torch.sqrt((x64 * x64).mean(-1, keepdim=True) + eps) * (weight_bias + weight.double())


def gated_rms_norm_reference(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, *, eps: float
) -> torch.Tensor:
    """float64 `gated_rms_norm`."""
    gate64 = gate.double()
    return rms_norm_reference(x, weight, eps=eps) * gate64 / (1 + torch.exp(-gate64))
