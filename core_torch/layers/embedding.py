"""The vocabulary, split over the ranks: token embedding and output head.

Shapes: T tokens, D hidden, V vocabulary, W this rank's rows of it (the last rank's may be padding).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from core_torch.kernels.allreduce import ReduceGroup, all_reduce
from core_torch.kernels.choice import NOT_ASKED, Answers, KernelOptions
from core_torch.kernels.vocabulary import (
    check_vocabulary,
    embedding_rows,
    embedding_rows_plain,
    entries,
    largest_keys,
    largest_keys_plain,
)
from shared_config.checkpoint import vocab_share


class VocabParallelEmbedding(nn.Module):
    """token_ids [T] -> [T, D], summed over the group."""

    def __init__(self, vocab_size: int, hidden_size: int, group: ReduceGroup) -> None:
        super().__init__()
        rows, padded = vocab_share(vocab_size, group.rank, group.size)
        self.first, self.count, self.group = rows.start, len(rows), group
        self.weight = nn.Parameter(torch.empty(padded, hidden_size), requires_grad=False)
        self.compiled = NOT_ASKED

    def choose_kernels(self, options: KernelOptions) -> Answers:
        self.compiled = options.ask("vocabulary", check_vocabulary, hidden_size=self.weight.shape[1])
        return {"vocabulary": self.compiled}

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self.group.size == 1:
            return F.embedding(token_ids, self.weight)
        rows = embedding_rows if self.compiled.usable else embedding_rows_plain
        return all_reduce(rows(token_ids, self.weight, first=self.first, count=self.count), group=self.group)


class ParallelHead(nn.Module):
    """hidden [T, D] -> logits [T, V], gathered from the group; every rank has them all.

    `local`, this rank's logits [T, W], is enough for `argmax`, which gathers one number a row and rank.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, group: ReduceGroup, tied: VocabParallelEmbedding | None
    ) -> None:
        super().__init__()
        rows, padded = vocab_share(vocab_size, group.rank, group.size)
        self.vocab_size, self.first, self.count, self.group = vocab_size, rows.start, len(rows), group
        self.weight = (
            nn.Parameter(torch.empty(padded, hidden_size), requires_grad=False)
            if tied is None
            else tied.weight
        )
        self.compiled = NOT_ASKED

    def choose_kernels(self, options: KernelOptions) -> Answers:
        self.compiled = options.ask("vocabulary", check_vocabulary, hidden_size=self.weight.shape[1])
        return {"vocabulary": self.compiled}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.gather(self.local(hidden))

    def local(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight)

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """local [T, W] of every rank -> [T, V]."""
        if self.group.size == 1:
            return local[:, : self.vocab_size]
        parts = [torch.empty_like(local) for _ in range(self.group.size)]
        dist.all_gather(parts, local, group=self.group.device_group)
        return torch.cat(parts, dim=-1)[:, : self.vocab_size]

    def argmax(self, local: torch.Tensor) -> torch.Tensor:
        """local [T, W] of every rank -> the token [T] with the largest logit, of equal ones the first; alike on all."""
        largest = largest_keys if self.compiled.usable else largest_keys_plain
        if self.count > 0:
            keys = largest(local[:, : self.count], first=self.first)
        else:  # a small vocabulary may end before the last rank
            keys = local.new_full(local.shape[:1], torch.iinfo(torch.int64).min, dtype=torch.int64)
        if self.group.size > 1:
            dist.all_reduce(keys, dist.ReduceOp.MAX, group=self.group.device_group)
        return entries(keys)
