"""Decode attention that reads only the pages that hold tokens: a compiled `attention.decode_attention` with its gate.

Shapes: B sequences of one token each, H query heads, G KV heads, d head_dim, P pages of the longest table.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from core_torch.kernels.paged_decode import BLOCK_TOKENS, MAX_GROUP, MAX_SPLITS
from jax_bridge.kernels.compiled import call
from jax_bridge.transports.base import like


def paged_decode_attention(
    q: Float[Array, "B H d"],
    k_cache: Float[Array, "pages page_size G d"],
    v_cache: Float[Array, "pages page_size G d"],
    page_tables: Int32[Array, "B P"],
    lengths: Int32[Array, " B"],
    projected: Float[Array, "B W"],
    *,
    scale: float,
    launch_with_pdl: bool = True,
) -> Float[Array, "B H d"]:
    """One token each; `lengths` count it. The result is multiplied by sigmoid of the gate [B, H d], which lies in
    `projected` (q, gate, ...) behind q.

    Two kernels, whose work depends on the lengths; takes what `core_torch.kernels.paged_decode.check_paged_decode`
    says.
    """
    B, _, d = q.shape
    page_size, G = k_cache.shape[1:3]
    splits = min(-(-page_tables.shape[1] * page_size // BLOCK_TOKENS), MAX_SPLITS)
    scratch = [
        jax.ShapeDtypeStruct((B, G, splits, MAX_GROUP, width), jnp.dtype("float32")) for width in (d, 2)
    ]
    *_, out = call(
        "paged_decode",
        (q, k_cache, v_cache, page_tables, lengths, projected),
        (*scratch, like(q)),
        scale=scale,
        launch_with_pdl=launch_with_pdl,
    )
    return out
