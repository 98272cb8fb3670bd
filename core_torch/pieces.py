"""How rows travel between the ranks of a layout that hold different ones. Nothing is owed among them.

An attention piece is the attention-TP ranks of one (dp, cp), which hold the same rows. Where a MoE slice spans several
pieces their rows are gathered before the MoE; its sum is then paid at once and each rank takes its own rows of it.

Shapes: R rows of this rank, G ranks of a gather, D hidden, L rows whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from core_torch.batch import Batch
from core_torch.kernels.allreduce import ReduceGroup, all_reduce
from core_torch.partial_sum import PartialSum
from shared_config import ParallelLayout

# torch 2.13 gave it this name; without it `all_gather` copies every rank's part once more.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Peers:
    """Ranks that exchange rows or heads: `ranks` are global, `rank` is this process's place among them."""

    ranks: tuple[int, ...]
    rank: int
    device_group: dist.ProcessGroup | None  # None for one rank

    @property
    def size(self) -> int:
        return len(self.ranks)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's x [...], by rank: [size, ...]."""
        gathered = x.new_empty((self.size, *x.shape))
        all_gather(gathered.flatten(0, 1), x.contiguous(), group=self.device_group)
        return gathered

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """x[i] goes to rank i, for x [size, ...]; what comes from rank i is in row i of the result."""
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, x.contiguous(), group=self.device_group)
        return received

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """x summed over the ranks, in place."""
        dist.all_reduce(x, group=self.device_group)
        return x


@dataclass(frozen=True)
class Pieces:
    """What one rank knows of the pieces: `context` are the ranks that share its pass and split the mixers' heads,
    `prefill` and `decode` those whose rows the MoE needs beside its own, `everyone` one rank of each piece.
    `paid` is the group of nobody else, which owes what was paid already."""

    layout: ParallelLayout
    context: Peers
    prefill: Peers
    decode: Peers
    everyone: Peers
    paid: ReduceGroup

    def gather(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """This rank's rows [R, D] -> all rows that its MoE slice works on, [G R, D], by piece."""
        peers = self._gathers(batch)
        return x if peers.size == 1 else peers.all_gather(x).flatten(0, 1)

    def scatter(self, owed: PartialSum, batch: Batch) -> PartialSum:
        """The MoE's debt over gathered rows, paid at once, unfused: this rank's own rows [R, D], owed by nobody.

        Where a slice works on one piece alone the debt stays what it is, for the next norm to pay.
        """
        if self.layout.pieces_per_slice == 1:
            return owed
        total = all_reduce(owed.take(), group=owed.group, owed=True)
        peers = self._gathers(batch)
        rows = total.shape[0] // peers.size
        return PartialSum(total[peers.rank * rows : (peers.rank + 1) * rows], self.paid)

    def pick(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The rows [L, D] whose logits are wanted, on every rank, whichever holds them."""
        if batch.logit_rows is None:
            return hidden
        if self.everyone.size == 1:
            return hidden[batch.logit_rows]
        mine = batch.logit_rows >= 0
        rows = hidden[batch.logit_rows.clamp(min=0)].masked_fill(~mine[:, None], 0)
        return self.everyone.sum(rows)  # exact: every rank but one adds zero

    def _gathers(self, batch: Batch) -> Peers:
        return self.decode if batch.is_decode else self.prefill
