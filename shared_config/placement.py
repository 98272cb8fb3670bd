"""Which rows of a step each rank holds, computed alike on every rank from the step and the layout.

Attention-DP deals out the sequences: each DP rank's pass has the rows of its own alone. In prefill its context-parallel
ranks cut that pass into contiguous pieces of equal size; in decode, with one row a sequence, each holds it whole.
Inside the mixers the pass is whole again on every context-parallel rank, for that rank's share of the heads. All DP
ranks' passes are padded to one size, so that the MoE can gather them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared_config.layout import ParallelLayout, RankPlace
from shared_config.scheduler import Step

ELSEWHERE = -1  # in `Placement.local_rows`: a row that another rank holds


@dataclass(frozen=True)
class Placement:
    """`pass_rows`: the rows of every DP rank's pass, padding included; real rows come first, in the step's order."""

    layout: ParallelLayout
    step: Step
    pass_rows: int

    @property
    def cut(self) -> bool:
        """Whether context-parallel ranks hold different rows."""
        return self.step.prefill and self.layout.attn_cp_size > 1

    @property
    def rows(self) -> int:
        """The rows that every rank holds outside its mixers."""
        return self.pass_rows // self.layout.attn_cp_size if self.cut else self.pass_rows

    def part(self, dp: int) -> Step:
        """The chunks that DP rank `dp` runs, as a step of its own; it may have none."""
        size = self.layout.attn_dp_size
        return Step(self.step.prefill, tuple(c for c in self.step.chunks if c.sequence.dp_rank(size) == dp))

    def held(self, cp: int) -> range:
        """The rows of its DP rank's pass that context-parallel rank `cp` holds."""
        first = cp * self.rows if self.cut else 0
        return range(first, first + self.rows)

    def firsts(self) -> list[int]:
        """For each chunk of the step, the row of its DP rank's pass that it begins at."""
        ends, firsts = [0] * self.layout.attn_dp_size, []
        for chunk in self.step.chunks:
            dp = chunk.sequence.dp_rank(len(ends))
            firsts.append(ends[dp])
            ends[dp] += chunk.num_tokens
        return firsts

    def local_rows(self, wanted: Sequence[tuple[int, int]], place: RankPlace) -> list[int]:
        """Where the rank at `place` holds each of `wanted`, (index of a chunk, offset in it); ELSEWHERE if it does not.

        Exactly one piece has each row: of context-parallel ranks with the same rows the first one does.
        """
        firsts, held = self.firsts(), self.held(place.cp)
        rows = []
        for index, offset in wanted:
            row = firsts[index] + offset
            mine = self.step.chunks[index].sequence.dp_rank(self.layout.attn_dp_size) == place.dp
            has_it = mine and row in held and (self.cut or place.cp == 0)
            rows.append(row - held.start if has_it else ELSEWHERE)
        return rows

    def decode_rows(self) -> list[int]:
        """For each chunk of a decode step, its row among all DP ranks' rows one after another."""
        size = self.layout.attn_dp_size
        pairs = zip(self.step.chunks, self.firsts(), strict=True)
        return [chunk.sequence.dp_rank(size) * self.pass_rows + first for chunk, first in pairs]


def place_step(
    step: Step, layout: ParallelLayout, *, round_up: Callable[[int], int] = lambda rows: rows
) -> Placement:
    """The placement of `step`: passes as long as the longest DP rank's needs, rounded up by `round_up` (to a shape that
    is compiled or captured already) and, in prefill, to a multiple of the context-parallel size."""
    counts = [0] * layout.attn_dp_size
    for chunk in step.chunks:
        counts[chunk.sequence.dp_rank(len(counts))] += chunk.num_tokens
    rows = round_up(max(counts))
    pieces = layout.attn_cp_size if step.prefill else 1
    return Placement(layout, step, -(-rows // pieces) * pieces)
