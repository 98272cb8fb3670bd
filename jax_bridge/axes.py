"""Names of mesh axes, and the ranks along them: one axis, or several over which a group stretches."""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jaxtyping import Array, Shaped

# One axis by its name, several as a tuple in the mesh's order; an empty tuple is a group of one. JAX takes all three.
AxisName = str | tuple[str, ...]


def axes_of(axis_name: AxisName) -> tuple[str, ...]:
    """The axes, as a tuple."""
    return (axis_name,) if isinstance(axis_name, str) else axis_name


def named(names: Sequence[str]) -> AxisName:
    """The inverse of `axes_of`."""
    return names[0] if len(names) == 1 else tuple(names)


def in_mesh_order(axis_name: AxisName, mesh_axes: Sequence[str]) -> AxisName:
    """The one spelling of a group: its axes in the mesh's order, a single one by its name.

    Raises TypeError for what are not names, ValueError for a name that comes twice or is not of the mesh.
    """
    if not (isinstance(axis_name, str | tuple) and all(isinstance(name, str) for name in axis_name)):
        raise TypeError(f"axis_name must be the name of a mesh axis or a tuple of names, got {axis_name!r}")
    names = axes_of(axis_name)
    if len(set(names)) != len(names):
        raise ValueError(f"axis_name {axis_name!r} names an axis twice")
    for name in names:
        if name not in mesh_axes:
            raise ValueError(f"axis_name {name!r} is not an axis of the mesh {tuple(mesh_axes)}")
    return named([name for name in mesh_axes if name in names])


@dataclass(frozen=True)
class MeshAxis:
    """The `size` ranks that differ in their place on `name` alone. Its methods are for inside shard_map."""

    name: AxisName
    size: int

    def rank(self) -> jax.Array:
        """This device's place among them. int32 []."""
        return jax.lax.axis_index(self.name)

    def times(self, inner: MeshAxis) -> MeshAxis:
        """The ranks of both, `inner`'s next to one another."""
        return MeshAxis(named(axes_of(self.name) + axes_of(inner.name)), self.size * inner.size)

    def without(self, part: MeshAxis) -> MeshAxis:
        """The ranks that are alike in their place on `part`, which is part of this."""
        left = [name for name in axes_of(self.name) if name not in axes_of(part.name)]
        return MeshAxis(named(left), self.size // part.size)

    def all_rows(self, x: Shaped[Array, "R ..."]) -> Shaped[Array, "T ..."]:
        """Every rank's rows, one rank's after another, alike on all."""
        return x if self.size == 1 else jax.lax.all_gather(x, self.name, tiled=True, to="invarying")

    def own_rows(self, x: Shaped[Array, "T ..."]) -> Shaped[Array, "R ..."]:
        """This rank's rows of what all of them hold, as after `all_rows`."""
        if self.size == 1:
            return x
        rows = x.shape[0] // self.size
        return jax.lax.dynamic_slice_in_dim(x, self.rank() * rows, rows)
