"""Decode attention that reads only the pages that hold tokens: a compiled `attention.decode_attention`.

Shapes: B sequences of one token each, H query heads, G KV heads, d head_dim, P pages of the longest table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core_torch.kernels import native

# csrc/paged_decode.cuh
HEAD_DIMS, MAX_GROUP, MAX_SEQUENCES, BLOCK_TOKENS, MAX_SPLITS = (64, 128, 256), 8, 1024, 64, 64


def check_paged_decode(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_num_seqs: int,
    dtype: torch.dtype,
    device: torch.device,
) -> native.Answer:
    """Whether `paged_decode_attention` takes this rank's shapes; ask once and keep the answer."""
    on_device = native.check_device(device)
    return native.first_failure(
        (on_device.usable, on_device.reason),
        (dtype == torch.bfloat16, f"paged_decode takes bfloat16, not {dtype}"),
        (head_dim in HEAD_DIMS, f"paged_decode takes a head_dim of {HEAD_DIMS}, not {head_dim}"),
        (
            num_heads % num_kv_heads == 0 and num_heads // num_kv_heads <= MAX_GROUP,
            f"paged_decode takes up to {MAX_GROUP} query heads a KV head, not {num_heads} on {num_kv_heads}",
        ),
        (
            max_num_seqs <= MAX_SEQUENCES,
            f"paged_decode takes batches up to {MAX_SEQUENCES}, not {max_num_seqs}",
        ),
    )


def paged_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_tables: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    gate: Tensor | None = None,
    ahead: Sequence[Tensor] = (),
    launch_with_pdl: bool = True,
) -> Tensor:
    """One token each: q [B, H, d], page_tables [B, P], lengths [B] (the new token counted) -> [B, H, d].

    The caches are [pages, page_size, G, d]; tables and lengths int32 or int64, alike; `gate` [B, H d] multiplies the
    result by its sigmoid. Capturable: the launches depend on P, the work on the lengths, and a sequence's bits on
    nothing but its own length and values. `ahead`: up to two contiguous tensors (weights that later kernels read) that
    are fetched into the L2 cache meanwhile. With `launch_with_pdl`, tables and lengths are read while the kernel before
    this call ends, which must not be the one that writes them.
    """
    B, H, d = q.shape
    page_size, G = k_cache.shape[1:3]
    splits = min(-(-page_tables.shape[1] * page_size // BLOCK_TOKENS), MAX_SPLITS)
    values = q.new_empty(B, G, splits, MAX_GROUP, d, dtype=torch.float32)
    sums = q.new_empty(B, G, splits, MAX_GROUP, 2, dtype=torch.float32)
    out = q.new_empty(B, H, d)
    native.function("paged_decode_ahead", q.device, of="paged_decode")(
        q,
        k_cache,
        v_cache,
        page_tables,
        lengths,
        values,
        sums,
        out,
        gate,
        scale,
        launch_with_pdl,
        *native.ahead_operands(ahead),
    )
    return out
