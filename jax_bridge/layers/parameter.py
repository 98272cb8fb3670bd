"""Parameters, declared by one rank's shape; their values come later (`jax_bridge.weights`)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jax_bridge.axes import MeshAxis


def parameter(*shape: int, split: Mapping[int, MeshAxis] | None = None) -> nnx.Param:
    """An abstract parameter of which each rank holds `shape`.

    A dim in `split` continues on the next rank of its axis; over other axes all ranks hold the same values. The
    dtype here is a placeholder.
    """
    names = tuple(split[dim].name if split and dim in split else None for dim in range(len(shape)))
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), out_sharding=names, eager_sharding=False)
