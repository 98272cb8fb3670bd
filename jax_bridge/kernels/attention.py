"""Causal attention over a paged KV cache.

Shapes: T rows of all sequences, S sequences, C rows of each one's chunk, H query heads, G KV heads, d head_dim,
L = pages in a table * page_size. A cache is [pages, page_size, G, d]; a page table row lists a sequence's pages in
order. Page 0 belongs to nobody: padding rows write there and tables are filled up with it.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import torch
from jaxtyping import Array, Float, Int32

from core_torch.kernels.native import Answer

MAX_SCORES = 1 << 28  # float32 scores that prefill holds at a time, 1 GiB


def write_kv(
    k: Float[Array, "T G d"],
    v: Float[Array, "T G d"],
    k_cache: Float[Array, "pages page_size G d"],
    v_cache: Float[Array, "pages page_size G d"],
    slots: Int32[Array, " T"],
) -> tuple[Float[Array, "pages page_size G d"], Float[Array, "pages page_size G d"]]:
    """The caches with k, v at the flat positions `slots` (page * page_size + offset); in place when donated."""

    def write(cache: jax.Array, rows: jax.Array) -> jax.Array:
        return cache.reshape(-1, *cache.shape[2:]).at[slots].set(rows).reshape(cache.shape)

    return write(k_cache, k), write(v_cache, v)


def prefill_attention(
    q: Float[Array, "S C H d"],
    k_cache: Float[Array, "pages page_size G d"],
    v_cache: Float[Array, "pages page_size G d"],
    page_tables: Int32[Array, "S P"],
    *,
    starts: Int32[Array, " S"],
    lengths: Int32[Array, " S"],
    scale: float,
) -> Float[Array, "S C H d"]:
    """Chunk s is positions starts[s]... of its sequence, whose KV is in the cache up to lengths[s] already."""
    rows = starts[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)
    keys, values = _paged(k_cache, page_tables), _paged(v_cache, page_tables)
    S, C, H, d = q.shape
    step = C
    while step % 2 == 0 and S * H * step * keys.shape[1] > MAX_SCORES:
        step //= 2
    if step == C:
        return _attend(q, keys, values, rows, lengths, scale)

    def some_rows(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _attend(piece[0], keys, values, piece[1], lengths, scale)

    pieces = q.reshape(S, -1, step, H, d).swapaxes(0, 1), rows.reshape(S, -1, step).swapaxes(0, 1)
    return jax.lax.map(some_rows, pieces).swapaxes(0, 1).reshape(q.shape)


def fresh_attention(
    q: Float[Array, "S C H d"],
    k: Float[Array, "S C G d"],
    v: Float[Array, "S C G d"],
    counts: Int32[Array, " S"],
    *,
    scale: float,
) -> Float[Array, "S C H d"]:
    """Chunks that are their sequences' first, of counts[s] tokens each, by cuDNN; behind those anything may come."""
    counts = jnp.maximum(counts, 1)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        query_seq_lengths=counts,
        key_value_seq_lengths=counts,
        implementation="cudnn",
    )


def check_fresh_attention(
    *, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Answer:
    """Whether cuDNN takes this rank's heads: it is tried, on one token block. Ask once and keep the answer."""
    if device.type != "cuda":
        return Answer(False, f"compiled kernels need a CUDA GPU, and this is {device}")
    name = str(dtype).removeprefix("torch.")
    q, k = (jnp.zeros((1, 64, heads, head_dim), name) for heads in (num_heads, num_kv_heads))
    try:
        run = jax.jit(functools.partial(fresh_attention, scale=1.0))
        jax.block_until_ready(run(q, k, k, jnp.full(1, 64, jnp.int32)))
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return Answer(False, f"cuDNN refuses these heads: {str(error).splitlines()[0]}")
    return Answer(True)


def decode_attention(
    q: Float[Array, "S H d"],
    k_cache: Float[Array, "pages page_size G d"],
    v_cache: Float[Array, "pages page_size G d"],
    page_tables: Int32[Array, "S P"],
    lengths: Int32[Array, " S"],
    *,
    scale: float,
) -> Float[Array, "S H d"]:
    """One token of each sequence, its last; `lengths` count it."""
    keys, values = _paged(k_cache, page_tables), _paged(v_cache, page_tables)
    return _attend(q[:, None], keys, values, lengths[:, None] - 1, lengths, scale)[:, 0]


def _paged(cache: jax.Array, page_tables: jax.Array) -> jax.Array:
    """[S, L, G, d]: every page of every table, also those past a sequence's end."""
    return cache[page_tables].reshape(page_tables.shape[0], -1, *cache.shape[2:])


def _attend(
    q: jax.Array, keys: jax.Array, values: jax.Array, rows: jax.Array, lengths: jax.Array, scale: float
) -> jax.Array:
    """q [S, C, H, d] at positions rows [S, C]; keys and values [S, L, G, d] -> [S, C, H, d]; softmax in float32."""
    S, C, H, d = q.shape
    L, G = keys.shape[1:3]
    positions = jnp.arange(L, dtype=jnp.int32)
    written = positions < lengths[:, None]
    visible = (positions <= rows[..., None]) & written[:, None]
    grouped = q.reshape(S, C, G, H // G, d)
    scores = jnp.einsum("scgrd,slgd->sgrcl", grouped, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * jnp.float32(scale), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    # Past a sequence's end a page may hold anything, NaN too, and 0 * NaN is NaN.
    values = jnp.where(written[..., None, None], values, jnp.zeros_like(values))
    return jnp.einsum("sgrcl,slgd->scgrd", weights, values).reshape(q.shape)
