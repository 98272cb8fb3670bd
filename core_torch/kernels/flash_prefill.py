"""Prefill attention of all sequences of a pass at once, fresh ones and those that go on, by torch's FlashAttention.

Shapes: T rows of all sequences, S sequences, L their lengths (this pass's rows counted), H query heads, G KV heads, d
head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core_torch.kernels.native import Answer, first_failure

MAX_DIM = 256  # FlashAttention-2


@dataclass(frozen=True)
class Ragged:
    """Where each sequence's queries and keys are, made once for all layers; tensors on the device."""

    query_ends: Tensor  # [S + 1] int32, from 0
    key_ends: Tensor  # [S + 1] int32
    key_rows: Tensor  # [sum of L] int64: for every key its place in the cache, page * page_size + offset
    longest_query: int
    longest_key: int


def lay_out(
    counts: Sequence[int],
    tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    page_size: int,
    device: torch.device,
) -> Ragged:
    """counts: rows of each sequence in this pass; tables: its pages in order."""
    rows = [flat_slots(table, 0, length, page_size) for table, length in zip(tables, lengths, strict=True)]

    def ends(sizes: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.cumsum([0, *sizes], dtype=np.int32)).to(device)

    return Ragged(
        query_ends=ends(counts),
        key_ends=ends(lengths),
        key_rows=torch.from_numpy(np.concatenate(rows)).to(device),
        longest_query=max(counts),
        longest_key=max(lengths),
    )


def flat_slots(table: Sequence[int], start: int, end: int, page_size: int) -> np.ndarray:
    """Where positions start..end-1 of a sequence with these pages lie in the cache, int64."""
    positions = np.arange(start, end, dtype=np.int64)
    return np.asarray(table, dtype=np.int64)[positions // page_size] * page_size + positions % page_size


def check_flash_prefill(
    *, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Answer:
    """Whether `flash_prefill` takes this rank's heads; ask once and keep the answer."""
    return first_failure(
        (device.type == "cuda", f"compiled kernels need a CUDA GPU, and this is {device}"),
        (torch.backends.cuda.is_flash_attention_available(), "this torch is built without FlashAttention"),
        (dtype in (torch.bfloat16, torch.float16), f"flash_prefill takes bfloat16 and float16, not {dtype}"),
        (
            head_dim % 8 == 0 and head_dim <= MAX_DIM,
            f"flash_prefill takes a head_dim that is a multiple of 8 up to {MAX_DIM}, not {head_dim}",
        ),
        (
            num_heads % num_kv_heads == 0,
            f"flash_prefill takes a multiple of the KV heads, not {num_heads} on {num_kv_heads}",
        ),
    )


def flash_prefill(q: Tensor, k_cache: Tensor, v_cache: Tensor, ragged: Ragged, *, scale: float) -> Tensor:
    """q [T, H, d], whose KV is in the caches [pages, page_size, G, d] already -> [T, H, d].

    A sequence's last query sees all of its keys, the one before all but the last, and so on. Copies the keys and values
    out of their pages: 1 KiB a token and KV head of 256, beside some 2 MFLOP a token for each 1,024 tokens before it.
    """
    keys, values = (cache.view(-1, *cache.shape[2:])[ragged.key_rows] for cache in (k_cache, v_cache))
    return torch.ops.aten._flash_attention_forward(
        q,
        keys,
        values,
        ragged.query_ends,
        ragged.key_ends,
        ragged.longest_query,
        ragged.longest_key,
        0.0,  # dropout
        True,  # causal, from the lower right corner
        False,  # no mask to look at
        scale=scale,
    )[0]
