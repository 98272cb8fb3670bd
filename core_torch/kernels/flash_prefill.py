"""Prefill attention of all sequences of a pass at once, fresh ones and those that go on, by torch's FlashAttention;
fresh ones of equal, usual lengths by cuDNN.

Shapes: T rows of all sequences, S sequences, L their lengths (this pass's rows counted), H query heads, G KV heads, d
head_dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from core_torch.kernels.native import Answer, first_failure

MAX_DIM = 256  # FlashAttention-2
# cuDNN takes half the time, but makes a plan for each shape, slowly: it is asked for lengths that come again.
EVEN_MULTIPLE = 1024


@dataclass(frozen=True)
class Ragged:
    """Where each sequence's queries and keys are, made once for all layers; tensors on the device."""

    query_ends: Tensor  # [S + 1] int32, from 0
    key_ends: Tensor  # [S + 1] int32
    key_rows: Tensor  # [sum of L] int64: for every key its place in the cache, page * page_size + offset
    longest_query: int
    longest_key: int
    even: bool  # all sequences are fresh and as long as each other, a multiple of EVEN_MULTIPLE


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
        even={*counts, *lengths} == {counts[0]} and counts[0] % EVEN_MULTIPLE == 0,
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


def check_even_prefill(
    *, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Answer:
    """Whether cuDNN takes this rank's heads: it is tried, on one sequence of EVEN_MULTIPLE tokens."""
    answer = check_flash_prefill(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, device=device
    )
    if not answer.usable:
        return answer
    q = torch.zeros(EVEN_MULTIPLE, num_heads, head_dim, dtype=dtype, device=device)
    k = torch.zeros(EVEN_MULTIPLE, num_kv_heads, head_dim, dtype=dtype, device=device)
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # torch says in warnings, and then in its error, why it refuses
            even_attention(q, k, k, EVEN_MULTIPLE, scale=1.0, backends=[SDPBackend.CUDNN_ATTENTION])
    except RuntimeError as error:
        return Answer(False, f"cuDNN refuses these heads: {str(error).splitlines()[0]}")
    return answer


# In this order: torch takes the next one where cuDNN refuses a shape.
EVEN_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


def even_attention(
    q: Tensor, keys: Tensor, values: Tensor, length: int, *, scale: float, backends: list[SDPBackend]
) -> Tensor:
    """Fresh sequences of `length` tokens each: q [T, H, d], keys and values [T, G, d] -> [T, H, d]."""
    grouped = q.shape[1] != keys.shape[1]
    q, keys, values = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, keys, values))
    with sdpa_kernel(backends, set_priority=True):
        out = F.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)


def flash_prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, ragged: Ragged, *, scale: float, even: bool = False
) -> Tensor:
    """q [T, H, d], whose KV is in the caches [pages, page_size, G, d] already -> [T, H, d].

    A sequence's last query sees all of its keys, the one before all but the last, and so on. Copies the keys and values
    out of their pages: 1 KiB a token and KV head of 256, beside some 2 MFLOP a token for each 1,024 tokens before it.
    `even`: cuDNN may be asked (`check_even_prefill`).
    """
    keys, values = (cache.view(-1, *cache.shape[2:])[ragged.key_rows] for cache in (k_cache, v_cache))
    if even and ragged.even:
        return even_attention(q, keys, values, ragged.longest_query, scale=scale, backends=EVEN_BACKENDS)
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
