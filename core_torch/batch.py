"""The tensors that describe one forward pass.

Shapes: T tokens of all sequences one after another, S sequences, P pages of the longest one. A decode pass has one
token a sequence (T = S) and only fixed-shape tensors, so that it can be captured; rows that pad it up to a bucket
belong to page 0 and slot 0, which no sequence owns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, within each sequence
    kv_slots: torch.Tensor  # [T] int64, page * page_size + offset
    page_tables: torch.Tensor  # [S, P] int64
    lengths: torch.Tensor  # [S] int64, this pass's tokens counted
    state_slots: torch.Tensor  # [S] int64
    logit_rows: torch.Tensor  # [L] int64, the rows whose logits are wanted
    spans: tuple[Span, ...]  # prefill chunks; empty for decode

    @property
    def is_decode(self) -> bool:
        return not self.spans


def build_prefill(step: Step, *, page_size: int, device: torch.device, all_logits: bool = False) -> Batch:
    """Tensors for a prefill step; logits of every row with `all_logits`, else of the rows that sample."""
    token_ids: list[int] = []
    positions: list[int] = []
    kv_slots: list[int] = []
    logit_rows: list[int] = []
    spans: list[Span] = []
    for chunk in step.chunks:
        sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
        spans.append(Span(len(token_ids), chunk.num_tokens, chunk.start, sequence.slot))
        token_ids += sequence.prompt[chunk.start : end]
        positions += range(chunk.start, end)
        kv_slots += [_kv_slot(chunk, p, page_size) for p in range(chunk.start, end)]
        if all_logits:
            logit_rows += range(spans[-1].first, len(token_ids))
        elif chunk.samples:
            logit_rows.append(len(token_ids) - 1)
    width = max(len(chunk.sequence.pages) for chunk in step.chunks)
    tables = [chunk.sequence.pages + [0] * (width - len(chunk.sequence.pages)) for chunk in step.chunks]

    def tensor(values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Batch(
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        kv_slots=tensor(kv_slots),
        page_tables=tensor(tables),
        lengths=tensor([chunk.start + chunk.num_tokens for chunk in step.chunks]),
        state_slots=tensor([chunk.sequence.slot for chunk in step.chunks]),
        logit_rows=tensor(logit_rows),
        spans=tuple(spans),
    )


def pack_decode(step: Step, *, page_size: int, rows: int, pages: int) -> torch.Tensor:
    """A decode step padded to `rows` rows, as one [5 + pages, rows] int64 CPU tensor: a single copy to the device.

    Padding rows are token 0 at position 0 of page 0 and slot 0.
    """
    columns = []
    for chunk in step.chunks:
        s, position = chunk.sequence, chunk.start
        last = s.output[-1] if s.output else s.prompt[-1]
        table = s.pages[:pages] + [0] * (pages - len(s.pages))
        columns.append([last, position, _kv_slot(chunk, position, page_size), position + 1, s.slot, *table])
    columns += [[0, 0, 0, 1, 0] + [0] * pages] * (rows - len(columns))
    return torch.tensor(columns, dtype=torch.int64).T.contiguous()


def unpack_decode(packed: torch.Tensor) -> Batch:
    """The batch whose tensors are views of `pack_decode`'s tensor, wherever that lies now."""
    token_ids, positions, kv_slots, lengths, state_slots = packed[:5]
    return Batch(
        token_ids=token_ids,
        positions=positions,
        kv_slots=kv_slots,
        page_tables=packed[5:].T,
        lengths=lengths,
        state_slots=state_slots,
        logit_rows=torch.arange(packed.shape[1], device=packed.device),
        spans=(),
    )


def _kv_slot(chunk: Chunk, position: int, page_size: int) -> int:
    return chunk.sequence.pages[position // page_size] * page_size + position % page_size
