"""What a sequence leaves behind: paged KV for attention layers, state slots for Gated DeltaNet layers.

Shapes: one more page and one more slot than can be handed out (number 0 takes padding rows' writes), G local KV
heads, d head_dim, X local conv channels, K taps, HV local value heads, dk, dv head dims. A cache is a pytree of
arrays sharded over the mesh; each step is given the old one (donated) and returns the new one on its memory.
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


def _layer_shapes(config: Qwen3NextConfig, tp_size: int, page_size: int) -> tuple[tuple[int, ...], ...]:
    kv_heads = len(head_share(config.num_key_value_heads, 0, tp_size, "num_key_value_heads"))
    return (
        (page_size, kv_heads, config.head_dim),
        (config.conv_dim // tp_size, config.linear_conv_kernel_dim - 1),
        (config.linear_num_value_heads // tp_size, config.linear_key_head_dim, config.linear_value_head_dim),
    )


def cache_bytes(config: Qwen3NextConfig, *, tp_size: int, page_size: int, itemsize: int) -> tuple[int, int]:
    """(bytes of one page, bytes of one slot) over all layers of one rank."""
    kv, conv, recurrent = (math.prod(s) for s in _layer_shapes(config, tp_size, page_size))
    attention = config.layer_types.count("full_attention")
    linear = len(config.layer_types) - attention
    return 2 * kv * itemsize * attention, (conv * itemsize + recurrent * 4) * linear


def cache_specs(config: Qwen3NextConfig, axis_name: str) -> list[LayerCache]:
    """How each array of a cache is split: by heads, or by channels."""
    heads = PartitionSpec(None, None, axis_name)
    state = PartitionSpec(None, axis_name)
    return [
        KVCache(heads, heads) if kind == "full_attention" else StateCache(state, state)  # type: ignore[arg-type]
        for kind in config.layer_types
    ]


def make_cache(
    config: Qwen3NextConfig,
    *,
    mesh: jax.sharding.Mesh,
    axis_name: str,
    num_pages: int,
    page_size: int,
    num_slots: int,
    dtype: jnp.dtype,
) -> list[LayerCache]:
    """One zeroed cache a layer, each device's share made on it."""
    tp_size = mesh.shape[axis_name]
    kv, conv, recurrent = _layer_shapes(config, tp_size, page_size)

    def kv_zeros() -> jax.Array:
        page_rows, heads, dim = kv
        return jnp.zeros((num_pages + 1, page_rows, heads * tp_size, dim), dtype)

    def state_zeros(shape: tuple[int, ...], dt: jnp.dtype) -> jax.Array:
        return jnp.zeros((num_slots + 1, shape[0] * tp_size, *shape[1:]), dt)

    def make() -> list[LayerCache]:
        return [
            KVCache(kv_zeros(), kv_zeros())
            if kind == "full_attention"
            else StateCache(state_zeros(conv, dtype), state_zeros(recurrent, jnp.dtype("float32")))
            for kind in config.layer_types
        ]

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cache_specs(config, axis_name))
    return jax.jit(make, out_shardings=shardings)()
