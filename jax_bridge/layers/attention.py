"""Gated full attention: q and an output gate from one projection, normed q and k, partial rotary, GQA.

Shapes: T rows, D hidden, H local query heads, G local KV heads, d head_dim.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_bridge.batch import Batch
from jax_bridge.cache import KVCache
from jax_bridge.kernels.activation import sigmoid
from jax_bridge.kernels.attention import decode_attention, prefill_attention, write_kv
from jax_bridge.kernels.rope import apply_rotary, rotary_cos_sin
from jax_bridge.layers.linear import Linear, RowParallelLinear
from jax_bridge.layers.norm import RMSNorm
from jax_bridge.partial_sum import PartialSum, ReduceAxis
from shared_config.checkpoint import head_share
from shared_config.model import Qwen3NextConfig


class GatedAttention(nnx.Module):
    """x [T, D] -> this rank's part of the attention output [T, D], and the cache with the new keys and values."""

    def __init__(self, config: Qwen3NextConfig, axis: ReduceAxis) -> None:
        self.num_heads = len(head_share(config.num_attention_heads, 0, axis.size, "num_attention_heads"))
        self.num_kv_heads = len(head_share(config.num_key_value_heads, 0, axis.size, "num_key_value_heads"))
        self.head_dim, self.rotary_dim, self.rope_theta = (
            config.head_dim,
            config.rotary_dim,
            config.rope_theta,
        )
        self.sizes = (*(self.num_heads * self.head_dim,) * 2, *(self.num_kv_heads * self.head_dim,) * 2)
        self.in_proj = Linear(config.hidden_size, sum(self.sizes), axis, bias=config.attention_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.out_proj = RowParallelLinear(self.sizes[0], config.hidden_size, axis, bias=config.attention_bias)

    def __call__(self, x: Float[Array, "T D"], batch: Batch, cache: KVCache) -> tuple[PartialSum, KVCache]:
        T = x.shape[0]
        q, gate, k, v = split_sizes(self.in_proj(x), self.sizes)
        q = self.q_norm(q.reshape(T, self.num_heads, self.head_dim))
        k = self.k_norm(k.reshape(T, self.num_kv_heads, self.head_dim))
        v = v.reshape(T, self.num_kv_heads, self.head_dim)
        cos, sin = rotary_cos_sin(batch.positions, rotary_dim=self.rotary_dim, theta=self.rope_theta)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        cache = KVCache(*write_kv(k, v, cache.k, cache.v, batch.kv_slots))
        out = self._attend(q, batch, cache)
        return self.out_proj(out.reshape(T, -1) * sigmoid(gate)), cache

    def _attend(self, q: jax.Array, batch: Batch, cache: KVCache) -> jax.Array:
        scale = self.head_dim**-0.5
        if batch.spans is None:
            return decode_attention(q, cache.k, cache.v, batch.page_tables, batch.lengths, scale=scale)
        out = prefill_attention(
            batch.spans.split(q),
            cache.k,
            cache.v,
            batch.page_tables,
            starts=batch.spans.starts,
            lengths=batch.lengths,
            scale=scale,
        )
        return batch.spans.join(out)


def split_sizes(x: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    """x [..., sum(sizes)] -> one array for each size."""
    return jnp.split(x, list(itertools.accumulate(sizes[:-1])), axis=-1)
