"""Partial rotary position embedding: the first `rotary_dim` of each head turn, the rest pass.

Shapes: T tokens, H heads, d head_dim, R rotary_dim.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32


def rotary_cos_sin(
    positions: Int32[Array, " T"], *, rotary_dim: int, theta: float
) -> tuple[Float[Array, "T R/2"], Float[Array, "T R/2"]]:
    """cos and sin [T, R/2] in float32 for `positions` [T]; frequencies `theta ** (-2i / R)`.

    The frequencies are constants of the program: on the device `pow` would be less exact than PyTorch's, and a
    position multiplies the error.
    """
    exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    frequencies = np.float32(1) / np.float32(theta) ** exponent
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(
    x: Float[Array, "T H d"], cos: Float[Array, "T R/2"], sin: Float[Array, "T R/2"]
) -> Float[Array, "T H d"]:
    """Rotate the first R = 2 * cos.shape[-1] dims of x in the half-split ("NeoX") pairing.

    cos and sin are rounded to x's dtype first, as transformers does.
    """
    half = cos.shape[-1]
    cos, sin = cos.astype(x.dtype)[:, None], sin.astype(x.dtype)[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin, rest), axis=-1)
