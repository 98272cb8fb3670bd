"""One mesh for both ways in which a layout cuts the ranks.

Attention counts a rank as (dp, cp, tp), the MoE as (moe_dp, ep, moe_tp), both row by row. The mesh's axes are the
common refinement: each lies within one axis of attention's and one of the MoE's, so that every group of either is some
of them together. Axes of size one are left out. Examples, outermost axis first:

    tp_size=4                                   tp 4
    tp_size=4, attn_cp_size=2                   cp 2, tp 2                      the MoE over ("cp", "tp")
    tp_size=4, ep_size=2                        ep 2, moe_tp 2                  attention over ("ep", "moe_tp")
    tp_size=8, attn_cp_size=4, moe_dp_size=2    moe_dp 2, cp_moe_tp 2, tp 2     attention's cp is the first two
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax

from jax_bridge.axes import MeshAxis, named
from jax_bridge.devices import Device
from shared_config import ParallelLayout

ATTENTION = ("tp", "cp", "dp")  # innermost first
MOE = ("moe_tp", "ep", "moe_dp")


@dataclass(frozen=True)
class Factor:
    """A mesh axis, and the axes of attention and of the MoE that it is part of."""

    name: str
    size: int
    attention: str
    moe: str


def refine(layout: ParallelLayout) -> tuple[Factor, ...]:
    """The mesh's axes, outermost first.

    An axis has attention's name where attention's is not cut further, else the MoE's where that is not, else both.
    Raises ValueError where the two ways have no common refinement.
    """
    ours = _sizes(ATTENTION, (layout.attn_tp_size, layout.attn_cp_size, layout.attn_dp_size))
    theirs = _sizes(MOE, (layout.moe_tp_size, layout.ep_size, layout.moe_dp_size))
    if not ours:
        return (Factor("tp", 1, "tp", "moe_tp"),)
    cuts: list[tuple[int, str, str]] = []  # innermost first
    while ours:
        (attention, left), (moe, other) = ours.pop(), theirs.pop()
        size = min(left, other)
        if left % size or other % size:
            raise ValueError(
                f"{left} ranks along attention's {attention!r} and {other} along the MoE's {moe!r} do not divide one "
                f"another, so no mesh has both as axes; choose sizes that nest, or use core_torch for {layout}"
            )
        cuts.append((size, attention, moe))
        if left > size:
            ours.append((attention, left // size))
        if other > size:
            theirs.append((moe, other // size))

    def name(attention: str, moe: str) -> str:
        if sum(cut[1] == attention for cut in cuts) == 1:
            return attention
        return moe if sum(cut[2] == moe for cut in cuts) == 1 else f"{attention}_{moe}"

    return tuple(
        Factor(name(attention, moe), size, attention, moe) for size, attention, moe in reversed(cuts)
    )


def _sizes(names: tuple[str, ...], sizes: tuple[int, ...]) -> list[tuple[str, int]]:
    """Those above one, innermost last."""
    return [(name, size) for name, size in zip(names, sizes, strict=True) if size > 1][::-1]


def axis_of(factors: tuple[Factor, ...], *axes: str, within: tuple[str, ...] = MOE) -> MeshAxis:
    """The ranks along the named axes of attention or of the MoE together; only along `within` the MoE's."""
    found = [f for f in factors if {f.attention, f.moe} & set(axes) and f.moe in within]
    return MeshAxis(named([f.name for f in found]), math.prod(f.size for f in found))


def make_mesh(factors: tuple[Factor, ...], devices: list[Device]) -> jax.sharding.Mesh:
    """A mesh with the ranks in order."""
    sizes, names = [f.size for f in factors], [f.name for f in factors]
    types = (jax.sharding.AxisType.Auto,) * len(factors)
    return jax.make_mesh(sizes, names, axis_types=types, devices=devices)
