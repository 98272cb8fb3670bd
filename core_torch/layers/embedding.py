"""The vocabulary, split over the ranks: token embedding and output head.

Shapes: T tokens, D hidden, V vocabulary, W this rank's rows of it (the last rank's may be padding).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from core_torch.kernels.allreduce import ReduceGroup, all_reduce
from shared_config.checkpoint import vocab_share


class VocabParallelEmbedding(nn.Module):
    """token_ids [T] -> [T, D], summed over the group."""

    def __init__(self, vocab_size: int, hidden_size: int, group: ReduceGroup) -> None:
        super().__init__()
        rows, padded = vocab_share(vocab_size, group.rank, group.size)
        self.first, self.count, self.group = rows.start, len(rows), group
        self.weight = nn.Parameter(torch.empty(padded, hidden_size), requires_grad=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self.group.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.first
        mine = (local >= 0) & (local < self.count)
        out = F.embedding(local.where(mine, 0), self.weight).masked_fill(~mine[:, None], 0)
        return all_reduce(out, group=self.group)


class ParallelHead(nn.Module):
    """hidden [T, D] -> logits [T, V], gathered from the group; every rank has them all."""

    def __init__(
        self, vocab_size: int, hidden_size: int, group: ReduceGroup, tied: VocabParallelEmbedding | None
    ) -> None:
        super().__init__()
        _, padded = vocab_share(vocab_size, group.rank, group.size)
        self.vocab_size, self.group = vocab_size, group
        self.weight = (
            nn.Parameter(torch.empty(padded, hidden_size), requires_grad=False)
            if tied is None
            else tied.weight
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        local = F.linear(hidden, self.weight)
        if self.group.size == 1:
            return local[:, : self.vocab_size]
        parts = [torch.empty_like(local) for _ in range(self.group.size)]
        dist.all_gather(parts, local, group=self.group.device_group)
        return torch.cat(parts, dim=-1)[:, : self.vocab_size]
