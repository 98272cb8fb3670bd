"""Activations as PyTorch evaluates them: in float32 whatever the dtype, rounded once.

`jax.nn`'s would round after every operation in bfloat16.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def sigmoid(x: Float[Array, ...]) -> Float[Array, ...]:
    return jax.nn.sigmoid(x.astype(jnp.float32)).astype(x.dtype)


def silu(x: Float[Array, ...]) -> Float[Array, ...]:
    """x * sigmoid(x)."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)
