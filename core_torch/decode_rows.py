"""The rows of decode steps on the host, kept from step to step: while the same sequences go on, few numbers change.

Shapes: S sequences in `rows` rows, the last ones padding; P pages of a table.
"""

from __future__ import annotations

import numpy as np

from shared_config.scheduler import Chunk, Sequence, Step

TOKEN, POSITION, KV_SLOT, LENGTH, STATE_SLOT, TABLE = range(6)


class DecodeRows:
    """`packed` int64 [5 + P, rows]: token, position, place in the KV cache, length, state slot, page table.

    Rows that pad are token 0 at position 0 of page 0 and slot 0, which no sequence owns.
    """

    def __init__(self, *, page_size: int, rows: int, pages: int) -> None:
        self.page_size = page_size
        self.packed = np.zeros((TABLE + pages, rows), np.int64)
        self.packed[LENGTH] = 1
        self._owners: list[tuple[Sequence, list[int]]] = []

    def fill(self, step: Step) -> tuple[bool, bool]:
        """Takes the numbers of a decode step -> (whether any tables or slots changed, whether the tokens are known).

        They are not where the step before it is still running: its tokens are this step's.
        """
        sequences, count = [chunk.sequence for chunk in step.chunks], len(step.chunks)
        changed = len(self._owners) != count or any(
            sequence is not owner or sequence.pages is not pages
            for sequence, (owner, pages) in zip(sequences, self._owners, strict=True)
        )
        if changed:
            self._take(sequences)
        packed, starts = self.packed, np.array([chunk.start for chunk in step.chunks], np.int64)
        table = packed[TABLE:]
        packed[POSITION, :count] = starts
        packed[LENGTH, :count] = starts + 1
        pages = table[starts // self.page_size, np.arange(count)]
        packed[KV_SLOT, :count] = pages * self.page_size + starts % self.page_size
        tokens = [token for chunk in step.chunks if (token := _token(chunk)) is not None]
        known = len(tokens) == count
        if known:
            packed[TOKEN, :count] = tokens
        return changed, known

    def _take(self, sequences: list[Sequence]) -> None:
        packed, limit = self.packed, len(self.packed) - TABLE
        packed[:] = 0
        packed[LENGTH] = 1
        packed[STATE_SLOT, : len(sequences)] = [sequence.slot for sequence in sequences]
        for row, sequence in enumerate(sequences):
            pages = sequence.pages[:limit]
            packed[TABLE : TABLE + len(pages), row] = pages
        self._owners = [(sequence, sequence.pages) for sequence in sequences]


def _token(chunk: Chunk) -> int | None:
    """The token that a decode chunk runs, or None when the step that chooses it has not ended."""
    sequence, at = chunk.sequence, chunk.start - len(chunk.sequence.prompt)
    if at < 0:
        return sequence.prompt[chunk.start]
    return sequence.output[at] if at < len(sequence.output) else None
