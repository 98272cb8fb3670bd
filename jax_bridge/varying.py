"""Which mesh axes a value varies over inside shard_map, and casts between them.

With `check_vma=True` a value's type says so; with `check_vma=False` every type is empty and casts do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax

from jax_bridge.axes import AxisName, axes_of


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which `x` may differ between devices, as far as its type tells."""
    return frozenset(jax.typeof(x).mat.varying)


def is_checked(axis_name: AxisName) -> bool:
    """Whether types record variation here (`check_vma=True`): an axis index always varies over its axes."""
    return varying_axes(jax.lax.axis_index(axis_name)) >= set(axes_of(axis_name))


def vary_over(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """`x`, typed as varying over `axes` too. No communication; its transpose is a psum."""
    missing = tuple(sorted(set(axes) - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
