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

    gate_up has the gate's rows first. XLA has no grouped matrix product that is fast on GPUs (`lax.ragged_dot`
    becomes a dense product over all groups), so there are two plain forms, chosen by shape: a few tokens fetch
    their experts' weights, many tokens visit every expert once.
    """
    form = _fetched if experts.size <= gate_up.shape[0] else _visited
    return form(x, weights.astype(jnp.float32), experts, gate_up, down).astype(x.dtype)


def _fetched(
    x: jax.Array, weights: jax.Array, experts: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """In float32. Reads the weights of T * K experts, which may repeat."""
    hidden = swiglu(jnp.einsum("td,tkid->tki", x, gate_up[experts]))
    out = jnp.einsum("tki,tkdi->tkd", hidden, down[experts])
    return jnp.sum(out.astype(jnp.float32) * weights[..., None], axis=1)


def _visited(
    x: jax.Array, weights: jax.Array, experts: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """In float32. Reads each expert's weights once and applies them to all tokens, most with weight 0."""

    def visit(total: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        n, gate_up, down = expert
        hidden = swiglu(jnp.einsum("td,id->ti", x, gate_up))
        out = jnp.einsum("ti,di->td", hidden, down).astype(jnp.float32)
        weight = jnp.sum(jnp.where(experts == n, weights, jnp.float32(0)), axis=-1)
        return total + weight[:, None] * out, None

    total = vary_over(jnp.zeros(x.shape, jnp.float32), varying_axes(gate_up) | varying_axes(x))
    numbers = jnp.arange(gate_up.shape[0], dtype=experts.dtype)
    return jax.lax.scan(visit, total, (numbers, gate_up, down))[0]
