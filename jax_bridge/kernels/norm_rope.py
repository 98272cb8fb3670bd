"""Between projection and attention: q and k normed and turned, k and v into the cache, in one compiled kernel.

Shapes: T tokens, H query heads, G KV heads, d head_dim, R rotary_dim.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int32

from jax_bridge.kernels.compiled import call
from jax_bridge.transports.base import like

Cache = Float[Array, "pages page_size G d"]


def norm_rope(
    projected: Float[Array, "T P"],
    positions: Int32[Array, " T"],
    slots: Int32[Array, " T"],
    k_cache: Cache,
    v_cache: Cache,
    *,
    q_weight: Float[Array, " d"],
    k_weight: Float[Array, " d"],
    num_heads: int,
    rotary_dim: int,
    theta: float,
    eps: float,
    weight_bias: float,
    launch_with_pdl: bool = True,
) -> tuple[Float[Array, "T H d"], Cache, Cache]:
    """projected (q, the output gate, k, v) -> (q, the caches with k and v at the flat positions `slots`).

    What `RMSNorm`, `apply_rotary` and `write_kv` do, in place where the caches are donated; takes what
    `core_torch.kernels.norm_rope.check_norm_rope` says. Of rows with one slot (those that pad a batch) any one is
    stored.
    """
    q = jax.ShapeDtypeStruct((projected.shape[0], num_heads, k_cache.shape[-1]), projected.dtype)
    q, k_cache, v_cache = call(
        "norm_rope",
        (projected, positions, slots, q_weight, k_weight, k_cache, v_cache),
        (q, like(k_cache), like(v_cache)),
        in_place={5: 1, 6: 2},
        rotary_dim=rotary_dim,
        theta=float(theta),
        eps=eps,
        weight_bias=weight_bias,
        launch_with_pdl=launch_with_pdl,
    )
    return q, k_cache, v_cache
