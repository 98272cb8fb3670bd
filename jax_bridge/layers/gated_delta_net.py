"""Gated DeltaNet: short causal convolution, gated delta rule, gated norm; the state of a sequence has fixed size.

Shapes: R rows of this rank, T of its pass (see `head_exchange`), D hidden, H local key heads, HV local value heads,
dk, dv head dims, X = 2 H dk + HV dv channels.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from jaxtyping import Array, Float

from core_torch.kernels.choice import NOT_ASKED, Answers, KernelOptions
from core_torch.kernels.gdn_decode import check_gdn_decode
from core_torch.kernels.gdn_prefill import check_gdn_prefill
from jax_bridge.axes import MeshAxis
from jax_bridge.batch import Batch, Spans
from jax_bridge.cache import StateCache
from jax_bridge.kernels.causal_conv import causal_conv
from jax_bridge.kernels.gated_delta_rule import chunk_gated_delta_rule, gated_delta_gates
from jax_bridge.kernels.gdn_decode import gdn_decode, gdn_decode_plain
from jax_bridge.kernels.gdn_prefill import gdn_prefill
from jax_bridge.layers.head_exchange import HeadExchange, split_sizes
from jax_bridge.layers.linear import Linear, RowParallelLinear
from jax_bridge.layers.norm import GatedRMSNorm
from jax_bridge.layers.parameter import parameter
from jax_bridge.partial_sum import PartialSum, ReduceAxis
from shared_config.checkpoint import div_even
from shared_config.model import Qwen3NextConfig

MAX_CHUNK = 64  # tokens that the gated delta rule solves at once


class CausalConv(nnx.Module):
    """The taps [X, K] of the depthwise convolution."""

    def __init__(self, channels: int, taps: int, axis: MeshAxis) -> None:
        self.weight = parameter(channels, taps, split={0: axis})


class GatedDeltaNet(nnx.Module):
    """x [R, D] -> this rank's part of the mixer's output [R, D], and the cache with the new states."""

    def __init__(self, config: Qwen3NextConfig, axis: ReduceAxis, context: MeshAxis) -> None:
        k_heads = div_even(config.linear_num_key_heads, axis.size, "linear_num_key_heads")
        v_heads = div_even(config.linear_num_value_heads, axis.size, "linear_num_value_heads")
        self.k_dim, self.v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        parts = [(k_heads, self.k_dim)] * 2 + [(v_heads, self.v_dim)] * 2 + [(v_heads, 1)] * 2
        self.exchange = HeadExchange(context, parts)
        self.num_k_heads, _, self.num_v_heads, *_ = self.exchange.heads
        key, value = self.num_k_heads * self.k_dim, self.num_v_heads * self.v_dim
        self.sizes = (2 * key + value, value, self.num_v_heads, self.num_v_heads)
        self.in_proj = Linear(config.hidden_size, sum(heads * width for heads, width in parts), axis)
        own_heads = axis.times(context)
        self.conv = CausalConv(self.sizes[0], config.linear_conv_kernel_dim, own_heads)
        self.A_log = parameter(self.num_v_heads, split={0: own_heads})
        self.dt_bias = parameter(self.num_v_heads, split={0: own_heads})
        self.norm = GatedRMSNorm(self.v_dim, config.rms_norm_eps)
        self.out_proj = RowParallelLinear(v_heads * self.v_dim, config.hidden_size, axis)
        self.decodes = self.prefills = NOT_ASKED
        self.device: torch.device | None = None  # a GPU of this process, once kernels are chosen

    def choose_kernels(self, options: KernelOptions) -> Answers:
        shapes = {
            "num_k_heads": self.num_k_heads,
            "num_v_heads": self.num_v_heads,
            "k_dim": self.k_dim,
            "v_dim": self.v_dim,
            "taps": self.conv.weight.shape[1],
        }
        self.decodes = options.ask("gdn_decode", check_gdn_decode, **shapes)
        self.prefills = options.ask("gdn_prefill", check_gdn_prefill, **shapes)
        self.device = options.device
        return {"gdn_decode": self.decodes, "gdn_prefill": self.prefills}

    def __call__(
        self, x: Float[Array, "R D"], batch: Batch, cache: StateCache
    ) -> tuple[PartialSum, StateCache]:
        projected = self.exchange.to_heads(self.in_proj(x), batch)
        if batch.spans is None or self.prefills.usable:
            mix = self._decode if batch.spans is None else self._prefill
            out, cache = mix(projected, batch, cache)
            return self.out_proj(self.exchange.to_rows(out, batch)), cache
        qkv, z, b, a = split_sizes(projected, self.sizes)
        g, beta = gated_delta_gates(a, b, self.A_log[...], self.dt_bias[...])
        out, cache = self._prefill_plain(qkv, g, beta, batch, batch.spans, cache)
        normed = self.norm(out, z.reshape(out.shape)).reshape(out.shape[0], -1)
        return self.out_proj(self.exchange.to_rows(normed, batch)), cache

    def _heads(self, qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        key, lead = self.num_k_heads * self.k_dim, qkv.shape[:-1]
        q, k, v = split_sizes(qkv, (key, key, self.num_v_heads * self.v_dim))
        return (
            q.reshape(*lead, self.num_k_heads, self.k_dim),
            k.reshape(*lead, self.num_k_heads, self.k_dim),
            v.reshape(*lead, self.num_v_heads, self.v_dim),
        )

    def _weights(self) -> dict[str, Any]:
        return {
            "conv_weight": self.conv.weight[...],
            "a_log": self.A_log[...],
            "dt_bias": self.dt_bias[...],
            "norm_weight": self.norm.weight[...],
            "eps": self.norm.eps,
        }

    def _decode(self, projected: jax.Array, batch: Batch, cache: StateCache) -> tuple[jax.Array, StateCache]:
        decode = gdn_decode if self.decodes.usable else gdn_decode_plain
        out, *updated = decode(projected, cache.conv, cache.recurrent, batch.state_slots, **self._weights())
        return out, StateCache(*updated)

    def _prefill(self, projected: jax.Array, batch: Batch, cache: StateCache) -> tuple[jax.Array, StateCache]:
        assert batch.spans is not None
        assert self.device is not None
        tables = batch.spans.sequences, batch.spans.pieces
        out, *updated = gdn_prefill(
            projected, cache.conv, cache.recurrent, *tables, **self._weights(), device=self.device
        )
        return out, StateCache(*updated)

    def _prefill_plain(
        self,
        qkv: jax.Array,
        g: jax.Array,
        beta: jax.Array,
        batch: Batch,
        spans: Spans,
        cache: StateCache,
    ) -> tuple[jax.Array, StateCache]:
        slots = batch.state_slots
        fresh = spans.starts == 0  # the slot holds its previous owner's state
        conv, state = cache.conv[slots], cache.recurrent[slots]
        conv = jnp.where(fresh[:, None, None], jnp.zeros_like(conv), conv)
        state = jnp.where(fresh[:, None, None, None], jnp.zeros_like(state), state)
        mixed, conv = causal_conv(spans.split(qkv), conv, self.conv.weight[...], spans.counts)
        # With g = beta = 0 padding leaves the state alone.
        g, beta = (jnp.where(spans.real[..., None], spans.split(x), jnp.float32(0)) for x in (g, beta))
        rule = functools.partial(chunk_gated_delta_rule, chunk=min(MAX_CHUNK, spans.rows.shape[1]))
        out, state = jax.vmap(rule)(*self._heads(mixed), g, beta, state)
        cache = StateCache(
            cache.conv.at[slots].set(conv.astype(cache.conv.dtype)), cache.recurrent.at[slots].set(state)
        )
        return spans.join(out), cache
