"""Between projection and attention: q and k normed and turned, k and v into the cache; one kernel, or plain torch.

Shapes: T tokens, H query heads, G KV heads, d head_dim, R rotary_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_torch.kernels import native
from core_torch.kernels.attention import write_kv
from core_torch.kernels.norm import rms_norm
from core_torch.kernels.rope import apply_rotary, rotary_cos_sin

MAX_DIM = 256  # csrc/norm_rope.cuh


def check_norm_rope(
    *, head_dim: int, rotary_dim: int, dtype: torch.dtype, device: torch.device
) -> native.Answer:
    """Whether `norm_rope` takes these heads; ask once and keep the answer."""
    on_device = native.check_device(device)
    return native.first_failure(
        (on_device.usable, on_device.reason),
        (dtype == torch.bfloat16, f"norm_rope takes bfloat16, not {dtype}"),
        (
            head_dim % 8 == 0 and head_dim <= MAX_DIM,
            f"norm_rope takes a head_dim that is a multiple of 8 up to {MAX_DIM}, not {head_dim}",
        ),
        (rotary_dim % 16 == 0, f"norm_rope takes a rotary_dim that is a multiple of 16, not {rotary_dim}"),
    )


def norm_rope(
    projected: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_weight: Tensor,
    k_weight: Tensor,
    num_heads: int,
    rotary_dim: int,
    theta: float,
    eps: float,
    weight_bias: float,
    launch_with_pdl: bool = True,
) -> Tensor:
    """`norm_rope_plain` in one kernel; capturable. Of rows with one slot (those that pad a batch) any one is stored."""
    d = k_cache.shape[-1]
    q = projected.new_empty(projected.shape[0], num_heads, d)
    native.function("norm_rope", projected.device)(
        projected,
        positions,
        slots,
        q_weight,
        k_weight,
        k_cache,
        v_cache,
        q,
        rotary_dim,
        theta,
        eps,
        weight_bias,
        launch_with_pdl,
    )
    return q


def norm_rope_plain(
    projected: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_weight: Tensor,
    k_weight: Tensor,
    num_heads: int,
    rotary_dim: int,
    theta: float,
    eps: float,
    weight_bias: float,
) -> Tensor:
    """projected [T, (2 H + 2 G) d] -> q [T, H, d]; k and v go to the places `slots` [T] of the caches, in place.

    projected holds q, the output gate (not touched), k, v; positions and slots are integers of one type; q_weight and
    k_weight [d] are scaled by `weight_bias + weight`; caches [pages, page_size, G, d].
    """
    G, d = k_cache.shape[2:]
    q, _, k, v = projected.split([num_heads * d, num_heads * d, G * d, G * d], dim=-1)
    cos, sin = rotary_cos_sin(positions, rotary_dim=rotary_dim, theta=theta)
    q, k = (
        apply_rotary(rms_norm(x.unflatten(-1, (-1, d)), w, eps=eps, weight_bias=weight_bias), cos, sin)
        for x, w in ((q, q_weight), (k, k_weight))
    )
    write_kv(k, v.unflatten(-1, (G, d)), k_cache, v_cache, slots)
    return q
