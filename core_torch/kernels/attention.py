"""Causal attention over a paged KV cache.

Shapes: T tokens of one sequence, B sequences of one token each, H query heads, G KV heads, d head_dim. A cache is
[pages, page_size, G, d]; a page table row lists a sequence's pages in order. Page 0 belongs to nobody: padding
rows write there and tables are filled up with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Store k, v [T, G, d] at the flat positions `slots` [T] (page * page_size + offset), in place."""
    k_cache.view(-1, *k_cache.shape[2:])[slots] = k
    v_cache.view(-1, *v_cache.shape[2:])[slots] = v


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    *,
    start: int,
    scale: float,
) -> torch.Tensor:
    """One sequence: q [T, H, d] at positions start..start+T-1, whose KV is in the cache already -> [T, H, d]."""
    T, H, d = q.shape
    length = start + T
    G = k_cache.shape[2]
    keys = k_cache[page_table].reshape(-1, G, d)[:length]
    values = v_cache[page_table].reshape(-1, G, d)[:length]
    rows = torch.arange(start, length, device=q.device)
    mask = torch.arange(length, device=q.device)[None] <= rows[:, None]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=mask,
        scale=scale,
        enable_gqa=H != G,
    )
    return out[0].transpose(0, 1)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_tables: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """One token each: q [B, H, d], page_tables [B, P], lengths [B] (the new token counted) -> [B, H, d].

    Reads all P pages of every row under a mask, so its shapes do not depend on the lengths (CUDA graphs).
    """
    B, H, d = q.shape
    G = k_cache.shape[2]
    keys = k_cache[page_tables].reshape(B, -1, G, d)
    values = v_cache[page_tables].reshape(B, -1, G, d)
    mask = torch.arange(keys.shape[1], device=q.device)[None] < lengths[:, None]
    grouped = q.reshape(B, G, H // G, d)
    scores = torch.einsum("bgrd,bsgd->bgrs", grouped, keys).float() * scale
    weights = scores.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1).to(q.dtype)
    values = values.masked_fill(~mask[:, :, None, None], 0)  # pages past the end may hold anything, NaN too
    return torch.einsum("bgrs,bsgd->bgrd", weights, values).reshape(B, H, d)


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    """float64: the last T = q.shape[0] positions of a sequence, q [T, H, d], k and v [length, G, d] -> [T, H, d]."""
    T, H, _ = q.shape
    length, G, _ = k.shape
    out = torch.zeros(q.shape, dtype=torch.float64)
    for t in range(T):
        visible = length - T + t + 1
        for h in range(H):
            g = h // (H // G)
            scores = k[:visible, g].double() @ q[t, h].double() * scale
            out[t, h] = scores.softmax(0) @ v[:visible, g].double()
    return out
