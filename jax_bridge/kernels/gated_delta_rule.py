"""The gated delta rule: a linear-attention state that decays, and is corrected towards each new value.

    S_t = exp(g_t) S_{t-1} + k_t outer beta_t (v_t - k_t^T exp(g_t) S_{t-1}),    o_t = q_t^T S_t / sqrt(dk)

with q and k l2-normalised per head (Yang et al., "Gated Delta Networks", arXiv 2412.06464). One state serves a
value head; `HV / H` consecutive value heads share a query/key head.

Shapes: T tokens of one sequence, B sequences of one token each, H key heads, HV value heads, dk, dv head dims,
C chunk length. States are float32 [HV, dk, dv]; g is the log of the decay (<= 0), beta in (0, 1). A token with
g = 0 and beta = 0 leaves the state as it is: so a caller pads.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_bridge.kernels.activation import sigmoid

L2_EPS = 1e-6


def l2_normalize(x: Float[Array, "*heads dk"]) -> Float[Array, "*heads dk"]:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + jnp.float32(L2_EPS))


def gated_delta_gates(
    a: Float[Array, "T HV"],
    b: Float[Array, "T HV"],
    a_log: Float[Array, " HV"],
    dt_bias: Float[Array, " HV"],
) -> tuple[Float[Array, "T HV"], Float[Array, "T HV"]]:
    """(g, beta) in float32 from the projections a, b: g = -exp(A_log) * softplus(a + dt_bias)."""
    wide = a.astype(jnp.float32) + dt_bias.astype(jnp.float32)
    g = -jnp.exp(a_log.astype(jnp.float32)) * jax.nn.softplus(wide)
    return g, sigmoid(b).astype(jnp.float32)


def _prepare(q: jax.Array, k: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
    """Normalise in float32, scale q, and repeat both to the value heads (dim -2)."""
    q32 = l2_normalize(q.astype(jnp.float32)) * jnp.float32(q.shape[-1] ** -0.5)
    k32 = l2_normalize(k.astype(jnp.float32))
    repeat = heads // k.shape[-2]
    return jnp.repeat(q32, repeat, axis=-2), jnp.repeat(k32, repeat, axis=-2)


def invert_unit_lower(system: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """The inverse of lower-triangular matrices whose diagonals are taken as ones.

    By blocks of doubling size, as [[A, 0], [L, B]]^-1 = [[A^-1, 0], [-B^-1 L A^-1, B^-1]]: a few matrix products. (XLA
    calls LAPACK for a triangular solve on CPU, which waits inside the thread pool that it needs: virtual devices that
    get there together never come out.)
    """
    size = system.shape[-1]
    row, column = jnp.arange(size)[:, None], jnp.arange(size)[None]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=system.dtype), system.shape)
    block = 1
    while block < size:
        joins = (row // block == column // block + 1) & (row // block % 2 == 1)
        inverse = inverse - inverse @ jnp.where(joins, system, jnp.zeros_like(system)) @ inverse
        block *= 2
    return inverse


def chunk_gated_delta_rule(
    q: Float[Array, "T H dk"],
    k: Float[Array, "T H dk"],
    v: Float[Array, "T HV dv"],
    g: Float[Array, "T HV"],
    beta: Float[Array, "T HV"],
    state: Float[Array, "HV dk dv"],
    *,
    chunk: int = 64,
) -> tuple[Float[Array, "T HV dv"], Float[Array, "HV dk dv"]]:
    """(o in v's dtype, new state).

    Within a chunk the corrections obey a unit lower-triangular system, solved at once (the "UT transform" of
    Yang et al., arXiv 2406.06484, with decay); chunks follow one another through the state.
    """
    T, HV, dv = v.shape
    q32, k32 = _prepare(q, k, HV)
    pad = -T % chunk

    def chunked(x: jax.Array) -> jax.Array:  # [T, HV, ...] -> [count, HV, C, ...]
        x = jnp.pad(x.astype(jnp.float32), ((0, pad), *((0, 0),) * (x.ndim - 1)))
        return jnp.moveaxis(x.reshape(-1, chunk, *x.shape[1:]), 2, 1)

    qc, kc, vc, gc, bc = (chunked(x) for x in (q32, k32, v, g, beta))
    decay = jnp.cumsum(gc, axis=-1)  # log decay from the chunk's start, [count, HV, C]
    lower = jnp.tril(jnp.ones((chunk, chunk), jnp.bool_))
    between = jnp.exp(jnp.where(lower, decay[..., :, None] - decay[..., None, :], -jnp.inf))

    k_beta = kc * bc[..., None]
    system = (k_beta @ kc.swapaxes(-1, -2)) * between
    right = jnp.concatenate((vc * bc[..., None], k_beta * jnp.exp(decay)[..., None]), axis=-1)
    solved = invert_unit_lower(system) @ right
    new_values, reads = solved[..., :dv], solved[..., dv:]
    scores = (qc @ kc.swapaxes(-1, -2)) * between
    q_in = qc * jnp.exp(decay)[..., None]
    k_out = kc * jnp.exp(decay[..., -1:] - decay)[..., None]
    carry = jnp.exp(decay[..., -1])

    def step(state: jax.Array, pieces: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        new_values, reads, scores, q_in, k_out, carry = pieces
        correction = new_values - reads @ state
        out = q_in @ state + scores @ correction
        return state * carry[:, None, None] + k_out.swapaxes(-1, -2) @ correction, out

    pieces = (new_values, reads, scores, q_in, k_out, carry)
    state, out = jax.lax.scan(step, state.astype(jnp.float32), pieces)
    return jnp.moveaxis(out, 1, 2).reshape(-1, HV, dv)[:T].astype(v.dtype), state


def gated_delta_rule_step(
    q: Float[Array, "B H dk"],
    k: Float[Array, "B H dk"],
    v: Float[Array, "B HV dv"],
    g: Float[Array, "B HV"],
    beta: Float[Array, "B HV"],
    state: Float[Array, "B HV dk dv"],
) -> tuple[Float[Array, "B HV dv"], Float[Array, "B HV dk dv"]]:
    """One token each: (o in v's dtype, new state)."""
    q32, k32 = _prepare(q, k, v.shape[-2])
    state = state * jnp.exp(g)[..., None, None]
    correction = (v.astype(jnp.float32) - jnp.sum(state * k32[..., None], axis=-2)) * beta[..., None]
    state = state + k32[..., None] * correction[..., None, :]
    return jnp.sum(state * q32[..., None], axis=-2).astype(v.dtype), state
