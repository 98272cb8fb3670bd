"""Partial rotary position embedding: the first `rotary_dim` of each head turn, the rest pass.

Shapes: T tokens, H heads, d head_dim, R rotary_dim.
"""

from __future__ import annotations

import torch


def rotary_cos_sin(
    positions: torch.Tensor, *, rotary_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, R/2] in float32 for `positions` [T]; frequencies `theta ** (-2i / R)`."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device) / rotary_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponent)
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R = 2 * cos.shape[-1] dims of x [T, H, d] in the half-split ("NeoX") pairing.

    cos and sin [T, R/2] are rounded to x's dtype first, as transformers does.
    """
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def apply_rotary_reference(
    x: torch.Tensor, positions: torch.Tensor, *, rotary_dim: int, theta: float
) -> torch.Tensor:
    """float64 rotation of each pair (i, i + R/2) as a complex number."""
    half = rotary_dim // 2
    frequency = theta ** (-2.0 * torch.arange(half, dtype=torch.float64) / rotary_dim)
    turn = torch.exp(1j * positions.double()[:, None] * frequency)[:, None]
    turned = torch.complex(x[..., :half].double(), x[..., half:rotary_dim].double()) * turn
    return torch.cat((turned.real, turned.imag, x[..., rotary_dim:].double()), dim=-1)
