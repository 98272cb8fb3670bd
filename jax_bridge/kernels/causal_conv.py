"""Depthwise causal convolution + SiLU over sequences that arrive in pieces.

Shapes: S sequences, C tokens of each one's chunk, X channels, K taps. A sequence's state is its last K-1 inputs
[X, K-1], oldest first; zeros before the first token.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jax_bridge.kernels.activation import silu


def causal_conv(
    x: Float[Array, "S C X"],
    state: Float[Array, "S X K-1"],
    weight: Float[Array, "X K"],
    counts: Int32[Array, " S"],
) -> tuple[Float[Array, "S C X"], Float[Array, "S X K-1"]]:
    """(silu(conv(x)), new state); of chunk s the first `counts[s]` tokens are real, the rest is padding."""
    length, taps = x.shape[1], weight.shape[-1]
    padded = jnp.concatenate((state.astype(x.dtype).swapaxes(1, 2), x), axis=1)
    weight32 = weight.astype(jnp.float32)
    out = sum(padded[:, k : k + length].astype(jnp.float32) * weight32[:, k] for k in range(taps))
    last = jax.vmap(lambda rows, count: jax.lax.dynamic_slice_in_dim(rows, count, taps - 1))(padded, counts)
    return silu(jnp.asarray(out).astype(x.dtype)), last.swapaxes(1, 2)


def causal_conv_step(
    x: Float[Array, "S X"], state: Float[Array, "S X K-1"], weight: Float[Array, "X K"]
) -> tuple[Float[Array, "S X"], Float[Array, "S X K-1"]]:
    """One token each."""
    window = jnp.concatenate((state.astype(x.dtype), x[..., None]), axis=-1)
    out = jnp.sum(window.astype(jnp.float32) * weight.astype(jnp.float32), axis=-1)
    return silu(out.astype(x.dtype)), window[..., 1:]
