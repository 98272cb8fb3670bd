"""Context parallelism inside a mixer: its rows are traded for heads, and back.

A rank of a context-parallel group holds a piece of a prefill pass, and its weights all heads of its attention-TP rank.
Between its two projections a mixer works head by head along the whole sequence, so there each rank takes all rows of
its share of the heads ("Ulysses", Jacobs et al., arXiv 2309.14509). Attention and Gated DeltaNet are then exactly the
unsharded computation, chunked prefill included, and caches hold a rank's own heads alone.

The other way for Gated DeltaNet is to pass the recurrent state on, rank by rank. At the 80B model's size that moves
less: 2 MiB a sequence and boundary, against 32 KiB for each token of a rank (1 - 1/cp of them leave it). But a rank
waits for the one before it in every such layer (36 of 48), so that context parallelism would not make those faster;
here all ranks work at once, and one exchange serves both kinds of mixer.

Shapes: R rows of this rank, T of its pass (cp R in prefill, R in decode), W columns of all heads, w of own heads.
"""

from __future__ import annotations

import torch

from core_torch.batch import Batch
from core_torch.pieces import Peers
from shared_config.checkpoint import head_share


class HeadExchange:
    """`parts`: (heads, columns of one head) of each component of a projection's output, over all heads.

    `heads` and `sizes` are this rank's heads and columns of each component. KV heads that are fewer than the ranks are
    replicated. Everything that the core reads is traded, gates too, so that the core needs to know nothing of it.
    """

    def __init__(self, context: Peers, parts: list[tuple[int, int]]) -> None:
        self.context, self.parts = context, parts
        self._shares = [head_share(heads, context.rank, context.size, "heads") for heads, _ in parts]
        self.heads = [len(share) for share in self._shares]
        self.sizes = [own * width for own, (_, width) in zip(self.heads, parts, strict=True)]

    def to_heads(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[R, W] -> [T, w]."""
        if self.context.size == 1:
            return x
        columns = x.split([heads * width for heads, width in self.parts], dim=-1)
        if batch.is_decode:
            own = zip(columns, self._shares, self.parts, strict=True)
            return torch.cat([c[:, s.start * width : s.stop * width] for c, s, (_, width) in own], dim=-1)
        shares = [self._shares_of(c, *part) for c, part in zip(columns, self.parts, strict=True)]
        return self.context.all_to_all(torch.cat(shares, dim=-1)).flatten(0, 1)

    def _shares_of(self, columns: torch.Tensor, heads: int, width: int) -> torch.Tensor:
        """[R, heads * width] -> each rank's share of the heads, [cp, R, own heads * width]."""
        size = self.context.size
        each = columns.unflatten(-1, (heads, width))
        if heads < size:
            each = each.repeat_interleave(size // heads, dim=1)
        return each.unflatten(1, (size, -1)).flatten(2).transpose(0, 1)

    def to_rows(self, out: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[T, v] of own heads -> [R, cp v] of all heads."""
        size = self.context.size
        if size == 1:
            return out
        if batch.is_decode:
            shares = self.context.all_gather(out)
        else:
            shares = self.context.all_to_all(out.unflatten(0, (size, -1)))
        return shares.transpose(0, 1).flatten(1)
