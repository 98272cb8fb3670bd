"""What a sequence leaves behind: paged KV for attention layers, state slots for Gated DeltaNet layers.

Shapes: one more page and one more slot than can be handed out (number 0 takes padding rows' writes), G local KV
heads, d head_dim, X local conv channels, K taps, HV local value heads, dk, dv head dims. Heads are split over
attention-TP and context-parallel ranks; attention-DP ranks have caches of their own. A cache is a pytree of arrays
sharded over the mesh; each step is given the old one (donated) and returns the new one on its memory.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jax_bridge.axes import MeshAxis
from shared_config.checkpoint import head_share
from shared_config.model import Qwen3NextConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    k: Float[Array, "pages page_size G d"]
    v: Float[Array, "pages page_size G d"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StateCache:
    """`conv` in the model's dtype, `recurrent` in float32."""

    conv: Float[Array, "slots X K-1"]
    recurrent: Float[Array, "slots HV dk dv"]


LayerCache = KVCache | StateCache


def _layer_shapes(config: Qwen3NextConfig, shares: int, page_size: int) -> tuple[tuple[int, ...], ...]:
    kv_heads = len(head_share(config.num_key_value_heads, 0, shares, "num_key_value_heads"))
    return (
        (page_size, kv_heads, config.head_dim),
        (config.conv_dim // shares, config.linear_conv_kernel_dim - 1),
        (config.linear_num_value_heads // shares, config.linear_key_head_dim, config.linear_value_head_dim),
    )


def cache_bytes(config: Qwen3NextConfig, *, shares: int, page_size: int, itemsize: int) -> tuple[int, int]:
    """(bytes of one page, bytes of one slot) over all layers of one rank; `shares` ranks divide the heads."""
    kv, conv, recurrent = (math.prod(s) for s in _layer_shapes(config, shares, page_size))
    attention = config.layer_types.count("full_attention")
    linear = len(config.layer_types) - attention
    return 2 * kv * itemsize * attention, (conv * itemsize + recurrent * 4) * linear


def cache_specs(config: Qwen3NextConfig, heads: MeshAxis, data: MeshAxis) -> list[LayerCache]:
    """How each array of a cache is split: by heads, or by channels, and a cache for each rank of `data`."""
    kv = PartitionSpec(data.name, None, heads.name)
    state = PartitionSpec(data.name, heads.name)
    return [
        KVCache(kv, kv) if kind == "full_attention" else StateCache(state, state)  # type: ignore[arg-type]
        for kind in config.layer_types
    ]


def make_cache(
    config: Qwen3NextConfig,
    *,
    mesh: jax.sharding.Mesh,
    heads: MeshAxis,
    data: MeshAxis,
    num_pages: int,
    page_size: int,
    num_slots: int,
    dtype: jnp.dtype,
) -> list[LayerCache]:
    """One zeroed cache a layer, each device's share made on it; `num_pages` and `num_slots` for each rank of `data`."""
    shares, copies = heads.size, data.size
    kv, conv, recurrent = _layer_shapes(config, shares, page_size)

    def kv_zeros() -> jax.Array:
        page_rows, kv_heads, dim = kv
        return jnp.zeros((copies * (num_pages + 1), page_rows, kv_heads * shares, dim), dtype)

    def state_zeros(shape: tuple[int, ...], dt: jnp.dtype) -> jax.Array:
        return jnp.zeros((copies * (num_slots + 1), shape[0] * shares, *shape[1:]), dt)

    def make() -> list[LayerCache]:
        return [
            KVCache(kv_zeros(), kv_zeros())
            if kind == "full_attention"
            else StateCache(state_zeros(conv, dtype), state_zeros(recurrent, jnp.dtype("float32")))
            for kind in config.layer_types
        ]

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cache_specs(config, heads, data))
    return jax.jit(make, out_shardings=shardings)()
