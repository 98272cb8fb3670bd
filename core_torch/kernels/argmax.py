"""The largest logit over a vocabulary that is split over ranks, without gathering the logits.

Shapes: T rows, W this rank's entries of the vocabulary.

A candidate is one int64 key: the logit's order in the high half, the entry in the low one, so that the largest key of
all ranks is the largest logit, and of equal logits the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW_HALF = 0x7FFFFFFF  # entries are counted down from here: the first one has the largest key


def largest_keys(logits: Tensor, first: int) -> Tensor:
    """Of each row of logits [T, W], which are the entries `first` and on: the largest one's key [T] int64."""
    entry = logits.argmax(-1)
    value = logits.gather(-1, entry[:, None])[:, 0].float() + 0.0  # -0.0 becomes 0.0, which it equals
    bits = value.view(torch.int32)
    order = bits ^ ((bits >> 31) & LOW_HALF)  # of signed integers, as the floats have it
    return order.long() << 32 | LOW_HALF - (first + entry)


def entries(keys: Tensor) -> Tensor:
    """The entry of each key."""
    return LOW_HALF - (keys & LOW_HALF)
