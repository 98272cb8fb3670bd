"""The tensors that describe one forward pass.

Shapes: T tokens of all sequences one after another, S sequences, P pages of the longest one. A decode pass has one
token a sequence (T = S) and only fixed-shape tensors, so that it can be captured; rows that pad it up to a bucket
belong to page 0 and slot 0, which no sequence owns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared_config.scheduler import Step


@dataclass(frozen=True)
class Span:
    """A prefill chunk: rows `first..first+num_tokens-1` of the pass are positions `start...` of a sequence."""

    first: int
    num_tokens: int
    start: int


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


def build_batch(
    step: Step,
    *,
    page_size: int,
    device: torch.device,
    all_logits: bool = False,
    rows: int = 0,
    pages: int = 0,
) -> Batch:
    """Tensors for `step`, a decode pass padded to `rows` rows and page tables to `pages` columns."""
    token_ids: list[int] = []
    positions: list[int] = []
    kv_slots: list[int] = []
    tables: list[list[int]] = []
    lengths: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    spans: list[Span] = []
    for chunk in step.chunks:
        sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
        first = len(token_ids)
        token_ids += sequence.tokens[chunk.start : end]
        positions += range(chunk.start, end)
        kv_slots += [
            sequence.pages[p // page_size] * page_size + p % page_size for p in range(chunk.start, end)
        ]
        tables.append(sequence.pages)
        lengths.append(end)
        slots.append(sequence.slot)
        if step.prefill:
            spans.append(Span(first, chunk.num_tokens, chunk.start))
        if all_logits:
            logit_rows += range(first, len(token_ids))
        elif chunk.samples:
            logit_rows.append(len(token_ids) - 1)
    for row in range(len(token_ids), rows):
        token_ids.append(0)
        positions.append(0)
        kv_slots.append(0)
        tables.append([])
        lengths.append(1)
        slots.append(0)
        logit_rows.append(row)
    width = max(pages, *(len(table) for table in tables))
    padded = [table + [0] * (width - len(table)) for table in tables]

    def tensor(values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Batch(
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        kv_slots=tensor(kv_slots),
        page_tables=tensor(padded),
        lengths=tensor(lengths),
        state_slots=tensor(slots),
        logit_rows=tensor(logit_rows),
        spans=tuple(spans),
    )
