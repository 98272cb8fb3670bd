"""Parameters, declared by one rank's shape; their values come later (`jax_bridge.weights`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jax_bridge.partial_sum import ReduceAxis


def parameter(*shape: int, split: int | None = None, axis: ReduceAxis | None = None) -> nnx.Param:
    """An abstract parameter of which each rank holds `shape`.

    Dim `split` continues on the next rank of `axis`; without one every rank holds the same values. The dtype here
    is a placeholder.
    """
    names = tuple(axis.name if axis is not None and dim == split else None for dim in range(len(shape)))
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), out_sharding=names, eager_sharding=False)
