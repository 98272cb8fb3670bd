"""The unfused way: XLA's all-reduce, then the residual add and the norm. Runs on every platform and mesh.

Shapes: T tokens (any leading dims), D hidden.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_bridge.axes import AxisName


def allreduce(x: jax.Array, axis_name: AxisName, pinned_order: bool) -> jax.Array:
    """The sum of `x` over the axis. `pinned_order`: in rank order in float32, whatever the size (deterministic)."""
    if not pinned_order:
        return jax.lax.psum(x, axis_name)
    parts = jax.lax.all_gather(x, axis_name, to="invarying")
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return total.astype(x.dtype)


def add_rmsnorm(
    total: jax.Array, residual: jax.Array, weight: jax.Array, eps: float, weight_bias: float
) -> tuple[jax.Array, jax.Array]:
    """total, residual [..., D], weight [D] -> (residual + total in the dtype, its RMSNorm taken in float32)."""
    wide = _as_stored(residual.astype(jnp.float32) + _as_stored(total, total.dtype), residual.dtype)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + jnp.float32(eps))
    normed = wide * scale * (jnp.float32(weight_bias) + weight.astype(jnp.float32))
    return wide.astype(residual.dtype), normed.astype(residual.dtype)


def _as_stored(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`x` in float32, rounded to `dtype` as the kernel does.

    Of two casts, to bfloat16 and back, XLA makes none unless `xla_allow_excess_precision` is off; this rounding
    stays. It would flush subnormal numbers of float16, whose casts XLA leaves alone.
    """
    if dtype != jnp.bfloat16:
        return x.astype(dtype).astype(jnp.float32)
    return jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
