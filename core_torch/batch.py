"""The tensors that describe one forward pass on one rank.

Shapes: T tokens of all sequences one after another, R of them on this rank (all but in context-parallel prefill), S
sequences, P pages of the longest one, L rows whose logits are wanted. A decode pass has one token a sequence (T = S)
and only fixed-shape tensors, so that it can be captured. Rows that pad a pass belong to page 0 and slot 0, which no
sequence owns; in prefill they are one more chunk at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from core_torch.decode_rows import TABLE, DecodeRows
from core_torch.kernels.flash_prefill import Ragged, flat_slots, lay_out
from core_torch.kernels.gdn_prefill import Chunks, cut_into_chunks
from shared_config.layout import RankPlace
from shared_config.placement import ELSEWHERE, Placement
from shared_config.scheduler import Chunk, Step


@dataclass(frozen=True)
class Span:
    """A prefill chunk: rows `first..first+num_tokens-1` of the pass are positions `start...` of the sequence whose
    state is in `slot`."""

    first: int
    num_tokens: int
    start: int
    slot: int


@dataclass
class Batch:
    token_ids: torch.Tensor  # [R] int64
    positions: torch.Tensor  # [T] int64, within each sequence
    kv_slots: torch.Tensor  # [T] int64, page * page_size + offset
    page_tables: torch.Tensor  # [S, P] int64
    lengths: torch.Tensor  # [S] int64, this pass's tokens counted
    state_slots: torch.Tensor  # [S] int64
    # [L] int64, of this rank's rows; ELSEWHERE for a row that another rank holds; None: all of this rank's, in order
    logit_rows: torch.Tensor | None
    spans: tuple[Span, ...]  # prefill chunks; empty for decode
    chunks: Chunks | None = None  # of prefill, for Gated DeltaNet's kernels
    ragged: Ragged | None = None  # of prefill, for the attention's

    @property
    def is_decode(self) -> bool:
        return not self.spans


def build_prefill(
    placement: Placement,
    place: RankPlace,
    wanted: list[tuple[int, int]],
    *,
    page_size: int,
    device: torch.device,
) -> Batch:
    """Tensors for a prefill step on the rank at `place`; `wanted` rows get logits (see `Placement.local_rows`)."""
    chunks = placement.part(place.dp).chunks
    pieces: list[tuple[Span, Sequence[int], Sequence[int]]] = []  # and its tokens and pages
    first = 0
    for chunk in chunks:
        prompt, pages = chunk.sequence.prompt, chunk.sequence.pages
        span = Span(first, chunk.num_tokens, chunk.start, chunk.sequence.slot)
        pieces.append((span, prompt[chunk.start : chunk.start + chunk.num_tokens], pages))
        first += chunk.num_tokens
    if padding := placement.pass_rows - first:
        pieces.append((Span(first, padding, 0, 0), [0] * padding, [0] * -(-padding // page_size)))
    spans, tokens, tables = zip(*pieces, strict=True)
    width = max(map(len, tables))
    ends = [span.start + span.num_tokens for span in spans]
    slots = [
        flat_slots(table, span.start, end, page_size)
        for span, table, end in zip(spans, tables, ends, strict=True)
    ]

    def tensor(values: object) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(device)

    held = placement.held(place.cp)
    return Batch(
        token_ids=tensor(np.concatenate(tokens)[held.start : held.stop]),
        positions=tensor(np.concatenate([np.arange(s.start, e) for s, e in zip(spans, ends, strict=True)])),
        kv_slots=tensor(np.concatenate(slots)),
        page_tables=tensor([[*table, *[0] * (width - len(table))] for table in tables]),
        lengths=tensor(ends),
        state_slots=tensor([span.slot for span in spans]),
        logit_rows=tensor(placement.local_rows(wanted, place)),
        spans=spans,
        chunks=cut_into_chunks(spans, device),
        ragged=lay_out([span.num_tokens for span in spans], tables, ends, page_size, device),
    )


def pack_decode(step: Step, *, page_size: int, rows: int, pages: int) -> torch.Tensor:
    """A decode step padded to `rows` rows: `DecodeRows.packed` [5 + pages, rows] as one CPU tensor."""
    packed = DecodeRows(page_size=page_size, rows=rows, pages=pages)
    packed.fill(step)
    return torch.from_numpy(packed.packed)


def unpack_decode(packed: torch.Tensor, place: RankPlace, attn_dp_size: int) -> Batch:
    """The batch whose tensors are views of `pack_decode`'s tensor, wherever that lies now.

    Logits are wanted of all rows of all attention-DP ranks, one rank's after another's.
    """
    rows, logit_rows = packed.shape[1], None
    if attn_dp_size > 1:
        logit_rows = packed.new_full((attn_dp_size * rows,), ELSEWHERE)
        if place.cp == 0:
            logit_rows[place.dp * rows : (place.dp + 1) * rows] = torch.arange(rows, device=packed.device)
    token_ids, positions, kv_slots, lengths, state_slots = packed[:TABLE]
    return Batch(
        token_ids=token_ids,
        positions=positions,
        kv_slots=kv_slots,
        page_tables=packed[TABLE:].T,
        lengths=lengths,
        state_slots=state_slots,
        logit_rows=logit_rows,
        spans=(),
    )


def _kv_slot(chunk: Chunk, position: int, page_size: int) -> int:
    return chunk.sequence.pages[position // page_size] * page_size + position % page_size
