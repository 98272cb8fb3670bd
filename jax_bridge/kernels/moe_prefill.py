"""Routing and experts for many tokens: `route` and `routed_experts` on tensor cores, sorted and combined on the device.

Shapes: T tokens, D hidden, N experts, K experts per token, I intermediate (this rank's share).
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch
from jaxtyping import Array, Float, Int32

from core_torch.kernels.moe_prefill import (
    choose_tiles,
    combine_launch,
    down_launch,
    gate_up_launch,
    route_launch,
    sorting,
)
from jax_bridge.kernels.triton_kernels import launch
from jax_bridge.transports.base import like


def route_prefill(
    logits: Float[Array, "T N"], *, top_k: int, normalize: bool, device: torch.device
) -> tuple[Float[Array, "T K"], Int32[Array, "T K"]]:
    """`moe.route` in one kernel; of equal logits the lower expert comes first.

    Takes what `core_torch.kernels.moe_prefill.check_moe_prefill` says, as do the experts.
    """
    T, N = logits.shape
    weights, experts = launch(
        route_launch(T, N, N, top_k, 0, normalize),
        device,
        logits,
        jax.ShapeDtypeStruct((T, top_k), logits.dtype),
        _int32(T, top_k),
        scalars=(T,),
    )
    return weights, experts


def routed_experts_prefill(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    experts: Int32[Array, "T K"],
    gate_up: Float[Array, "N 2*I D"],
    down: Float[Array, "N D I"],
    *,
    device: torch.device,
) -> Float[Array, "T D"]:
    """`moe.routed_experts` in five kernels; an id outside 0..N-1 stands for no expert."""
    (T, K), (N, D, I) = experts.shape, down.shape  # noqa: E741
    tiles = choose_tiles(T * K / N, I)
    sort = sorting(T * K, N, tiles.tokens)
    (counts,) = launch(sort.count, device, experts, _int32(sort.chunks, sort.bins), scalars=(T * K,))
    order, listed = launch(
        sort.scatter,
        device,
        experts,
        counts,
        _int32(T * K),
        _int32(sort.tiles, 4),
        scalars=(T * K, sort.chunks, sort.tiles),
    )
    (hidden,) = launch(
        gate_up_launch(sort.tiles, D, I, K, tiles.gate_up),
        device,
        x,
        order,
        listed,
        gate_up,
        jax.ShapeDtypeStruct((T * K, I), x.dtype),
    )
    (parts,) = launch(
        down_launch(sort.tiles, D, I, tiles.down),
        device,
        hidden,
        order,
        listed,
        down,
        weights,
        jax.ShapeDtypeStruct((T * K, D), x.dtype),
    )
    (out,) = launch(combine_launch(T, N, D, K), device, parts, experts, like(x))
    return out


def _int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype("int32"))
