"""Sparse mixture of experts: routing, and the routed experts' SwiGLU MLPs.

Shapes: T tokens, D hidden, N experts, K experts per token, I intermediate (this rank's share).
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jax_bridge.kernels.activation import silu
from jax_bridge.varying import vary_over, varying_axes


def route(
    logits: Float[Array, "T N"], *, top_k: int, normalize: bool
) -> tuple[Float[Array, "T K"], Int32[Array, "T K"]]:
    """(weights in logits' dtype, expert ids); softmax and top-k in float32."""
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), top_k)
    if normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights.astype(logits.dtype), experts


def swiglu(gate_up: Float[Array, "*rows 2*I"]) -> Float[Array, "*rows I"]:
    """silu(first half) * second half, over the last dim."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return silu(gate) * up


def routed_experts(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    experts: Int32[Array, "T K"],
    gate_up: Float[Array, "N 2*I D"],
    down: Float[Array, "N D I"],
) -> Float[Array, "T D"]:
    """sum over a token's experts of weight * down(silu(gate(x)) * up(x)), as this rank's partial sum.

    gate_up has the gate's rows first; an id below 0 stands for no expert. XLA has no grouped matrix product that is
    fast on GPUs (`lax.ragged_dot` becomes a dense product over all groups), so there are two plain forms, chosen by
    shape: a few tokens fetch their experts' weights, many tokens are grouped by expert into one batched product.
    """
    weights = jnp.where(experts < 0, jnp.float32(0), weights.astype(jnp.float32))
    form = _fetched if experts.size <= gate_up.shape[0] else _grouped
    return form(x, weights, experts, gate_up, down).astype(x.dtype)


def _fetched(
    x: jax.Array, weights: jax.Array, experts: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """In float32. Reads the weights of T * K experts, which may repeat."""
    fetched = jnp.maximum(experts, 0)
    hidden = swiglu(jnp.einsum("td,tkid->tki", x, gate_up[fetched]))
    out = jnp.einsum("tki,tkdi->tkd", hidden, down[fetched])
    return jnp.sum(out.astype(jnp.float32) * weights[..., None], axis=1)


def _grouped(
    x: jax.Array, weights: jax.Array, experts: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """In float32. In each round every expert takes up to R of its tokens, so a round reads all weights once; R has
    room for uneven routing, so that mostly one round is enough."""
    (T, K), N = experts.shape, gate_up.shape[0]
    R = round_rows(T * K, N)
    by_expert = jnp.where(experts < 0, jnp.int32(N), experts).reshape(-1)
    pairs = jnp.argsort(by_expert, stable=True)  # numbers of (token, choice), those of expert 0 first
    ends = jnp.cumsum(jnp.zeros(N + 1, jnp.int32).at[by_expert].add(1))[:N]
    starts = jnp.concatenate((jnp.zeros(1, jnp.int32), ends[:-1]))
    nobody = T * K + jnp.arange(N * R, dtype=jnp.int32).reshape(N, R)  # all different, all outside

    def one_round(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        done, out = state
        place = starts[:, None] + done + jnp.arange(R, dtype=jnp.int32)
        taken = place < ends[:, None]
        pair = pairs[jnp.where(taken, place, 0)]
        hidden = swiglu(jnp.einsum("nrd,nid->nri", x[pair // K], gate_up))
        part = jnp.einsum("nri,ndi->nrd", hidden, down)
        return done + R, out.at[jnp.where(taken, pair, nobody)].set(part, mode="drop", unique_indices=True)

    def goes_on(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return state[0] < jnp.max(ends - starts)

    out = vary_over(jnp.zeros((T * K, x.shape[1]), x.dtype), varying_axes(gate_up) | varying_axes(x))
    _, out = jax.lax.while_loop(goes_on, one_round, (jnp.int32(0), out))
    return jnp.sum(out.reshape(T, K, -1).astype(jnp.float32) * weights[..., None], axis=1)


def round_rows(pairs: int, num_experts: int) -> int:
    """The power of two that holds an expert's mean number of rows and a quarter more."""
    return 1 << max(-(-5 * pairs // (4 * num_experts)) - 1, 7).bit_length()
