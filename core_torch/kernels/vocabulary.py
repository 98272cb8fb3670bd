"""Both ends of a model whose vocabulary is split over ranks: rows of the embedding, and the largest logit.

Shapes: T tokens, W this rank's entries of the vocabulary, D hidden.

A candidate for the largest logit is one int64 key: the logit's order in the high half, the entry in the low one, so
that the largest key of all ranks is the largest logit, and of equal logits the first; no logits are gathered.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from core_torch.kernels import native

LOW_HALF = 0x7FFFFFFF  # entries are counted down from here: the first one has the largest key


def check_vocabulary(*, hidden_size: int, dtype: torch.dtype, device: torch.device) -> native.Answer:
    """Whether the compiled functions below take this model; ask once and keep the answer."""
    on_device = native.check_device(device)
    return native.first_failure(
        (on_device.usable, on_device.reason),
        (dtype == torch.bfloat16, f"vocabulary takes bfloat16, not {dtype}"),
        (hidden_size % 8 == 0, f"vocabulary takes a hidden size that is a multiple of 8, not {hidden_size}"),
    )


def embedding_rows(
    tokens: Tensor, weight: Tensor, *, first: int, count: int, launch_with_pdl: bool = True
) -> Tensor:
    """`embedding_rows_plain` in one kernel; tokens int32 or int64. Capturable."""
    out = weight.new_empty(tokens.shape[0], weight.shape[1])
    native.function("vocabulary_rows", weight.device, of="vocabulary")(
        tokens, weight, out, first, count, launch_with_pdl
    )
    return out


def embedding_rows_plain(tokens: Tensor, weight: Tensor, *, first: int, count: int) -> Tensor:
    """The rows [T, D] of tokens [T] in weight [W, D], whose first `count` rows are the entries `first` and on; zeros
    for other ranks' tokens."""
    local = tokens - first
    mine = (local >= 0) & (local < count)
    return F.embedding(local.where(mine, 0), weight).masked_fill(~mine[:, None], 0)


def largest_keys(logits: Tensor, *, first: int, launch_with_pdl: bool = True) -> Tensor:
    """`largest_keys_plain` in one kernel, of bfloat16 logits; capturable."""
    keys = logits.new_empty(logits.shape[0], dtype=torch.int64)
    native.function("vocabulary_argmax", logits.device, of="vocabulary")(logits, keys, first, launch_with_pdl)
    return keys


def largest_keys_plain(logits: Tensor, *, first: int) -> Tensor:
    """Of each row of logits [T, W], which are the entries `first` and on: the largest one's key [T] int64."""
    entry = logits.argmax(-1)
    value = logits.gather(-1, entry[:, None])[:, 0].float() + 0.0  # -0.0 becomes 0.0, which it equals
    bits = value.view(torch.int32)
    order = bits ^ ((bits >> 31) & LOW_HALF)  # of signed integers, as the floats have it
    return order.long() << 32 | LOW_HALF - (first + entry)


def entries(keys: Tensor) -> Tensor:
    """The entry of each key."""
    return LOW_HALF - (keys & LOW_HALF)
