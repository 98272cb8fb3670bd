"""Routing and experts for few tokens: compiled `route` and `routed_experts`, which streams each expert's weights once.

Shapes: T tokens, D hidden, N experts, K experts per token, I intermediate (this rank's share).
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from core_torch.kernels.moe_decode import RECORD, overlaps
from jax_bridge.kernels.compiled import call
from jax_bridge.transports.base import like


@dataclass(frozen=True)
class Routing:
    """weights [T, K], experts [T, K], and the list that the expert kernels work through."""

    weights: jax.Array
    experts: jax.Array
    tiles: jax.Array


def route_decode(
    logits: Float[Array, "T N"], *, top_k: int, normalize: bool, launch_with_pdl: bool = True
) -> Routing:
    """`moe.route` and the list of tiles in one kernel; of equal logits the lower expert comes first.

    Takes what `core_torch.kernels.moe_decode.check_moe_decode` says, as do the experts.
    """
    T, N = logits.shape
    weights, experts, tiles = call(
        "moe_route",
        (logits,),
        (jax.ShapeDtypeStruct((T, top_k), logits.dtype), _int32(T, top_k), _tiles(T * top_k)),
        num_experts=N,
        normalize=normalize,
        launch_with_pdl=launch_with_pdl,
    )
    return Routing(weights, experts, tiles)


def routed_experts_decode(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    experts: Int32[Array, "T K"],
    gate_up: Float[Array, "N 2*I D"],
    down: Float[Array, "N D I"],
    *,
    tiles: Int32[Array, "pairs record"] | None = None,
    launch_with_pdl: bool | None = None,
) -> Float[Array, "T D"]:
    """`moe.routed_experts` in three kernels; a token's bits do not depend on the rest of the batch.

    An id below 0 stands for no expert. `tiles` come from `route_decode`; without them one more kernel makes them.
    """
    T, K = experts.shape
    N, D, I = down.shape  # noqa: E741
    launch_with_pdl = overlaps(T) if launch_with_pdl is None else launch_with_pdl
    if tiles is None:
        (tiles,) = call(
            "moe_group", (experts,), (_tiles(T * K),), num_experts=N, launch_with_pdl=launch_with_pdl
        )
    *_, out = call(
        "moe_decode",
        (x, weights, experts, tiles, gate_up, down),
        (
            jax.ShapeDtypeStruct((T * K, I), x.dtype),
            jax.ShapeDtypeStruct((T * K, D), jnp.dtype("float32")),
            like(x),
        ),
        launch_with_pdl=launch_with_pdl,
    )
    return out


def _tiles(pairs: int) -> jax.ShapeDtypeStruct:
    return _int32(pairs + 1, RECORD)


def _int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype("int32"))
