"""Names of mesh axes: one, or several over which a group stretches."""

from __future__ import annotations

from collections.abc import Sequence

# One axis by its name, several as a tuple in the mesh's order; an empty tuple is a group of one. JAX takes all three.
AxisName = str | tuple[str, ...]


def axes_of(axis_name: AxisName) -> tuple[str, ...]:
    """The axes, as a tuple."""
    return (axis_name,) if isinstance(axis_name, str) else axis_name


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
    ordered = tuple(name for name in mesh_axes if name in names)
    return ordered[0] if len(ordered) == 1 else ordered
