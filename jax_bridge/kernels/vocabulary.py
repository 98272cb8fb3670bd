"""The largest logit of a vocabulary that is split over ranks, of which each one gives a candidate.

Shapes: T tokens, W this rank's entries of the vocabulary, N ranks.

A candidate is a key of `core_torch.kernels.vocabulary`: 64 bits, which JAX has as two int32, the lower one first. It
counts entries within its rank, as a program is one for all ranks.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from core_torch.kernels.vocabulary import LOW_HALF
from jax_bridge.kernels.compiled import call

MINUS_ZERO = -(1 << 31)  # its bits


def largest_keys(logits: Float[Array, "T W"], *, launch_with_pdl: bool = True) -> Int32[Array, "T 2"]:
    """`largest_keys_plain` in one kernel, of bfloat16 logits."""
    keys = jax.ShapeDtypeStruct((logits.shape[0], 2), jnp.dtype("int32"))
    return call("vocabulary_argmax", (logits,), (keys,), launch_with_pdl=launch_with_pdl)[0]


def largest_keys_plain(logits: Float[Array, "T W"]) -> Int32[Array, "T 2"]:
    """The key of each row's largest logit."""
    entry = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    value = jnp.take_along_axis(logits, entry[:, None], axis=-1)[:, 0].astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    bits = jnp.where(bits == MINUS_ZERO, 0, bits)  # they are equal
    order = bits ^ ((bits >> 31) & LOW_HALF)  # of signed integers, as the floats have it
    return jnp.stack((LOW_HALF - entry, order), axis=-1)


def best_entries(keys: Int32[Array, "N T 2"], W: int) -> Int32[Array, " T"]:
    """From all ranks' keys, the entry of the whole vocabulary that has the largest logit, of equal ones the first."""
    rank = jnp.argmax(keys[..., 1], axis=0).astype(jnp.int32)
    low = jnp.take_along_axis(keys[..., 0], rank[None], axis=0)[0]
    return rank * W + (LOW_HALF - low)
