"""RMSNorm, plain and gated.

Shapes: any leading dims, D the normalised dim. Statistics and the product with the weight are in float32 and
rounded once, as Qwen3-Next's checkpoints were trained (transformers, `Qwen3NextRMSNorm`).
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_bridge.kernels.activation import silu


def rms_norm(
    x: Float[Array, "*tokens D"], weight: Float[Array, " D"], *, eps: float, weight_bias: float = 0.0
) -> Float[Array, "*tokens D"]:
    """`x * rsqrt(mean(x^2) + eps) * (weight_bias + weight)` over the last dim, in x's dtype.

    `weight_bias` is 1.0 for Qwen3-Next's zero-centred norms, whose checkpoints store `w` and scale by `1 + w`.
    """
    normed = _normalize(x, eps)
    return (normed * (jnp.float32(weight_bias) + weight.astype(jnp.float32))).astype(x.dtype)


def gated_rms_norm(
    x: Float[Array, "*tokens D"],
    gate: Float[Array, "*tokens D"],
    weight: Float[Array, " D"],
    *,
    eps: float,
) -> Float[Array, "*tokens D"]:
    """`weight * norm(x) * silu(gate)`, the norm before the gate; its weight is not zero-centred.

    The normalised value is rounded to x's dtype before the product with `weight`, as transformers'
    `Qwen3NextRMSNormGated` does.
    """
    scaled = weight * _normalize(x, eps).astype(x.dtype)
    return (scaled.astype(jnp.float32) * silu(gate.astype(jnp.float32))).astype(x.dtype)


def _normalize(x: jax.Array, eps: float) -> jax.Array:
    """In float32."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + jnp.float32(eps))
