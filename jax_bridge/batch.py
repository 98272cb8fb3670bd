"""The arrays that describe one forward pass.

Shapes: T rows of all sequences one after another, S sequences, C rows of the longest chunk, P pages of the longest
table, L rows whose logits are wanted. A decode pass has one token a sequence (T = S). Every size is padded to a power
of two, so that few programs serve all batches; padding rows belong to page 0 and slot 0, which no sequence owns.

Under attention-DP each DP rank has a pass of its own, all of the same shapes, and the host's arrays are theirs one
after another (`own` takes a rank's); what is wanted of them is one list, in the step's order.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, Shaped

from core_torch.kernels.gdn_prefill import CHUNK, chunk_tables
from jax_bridge.axes import MeshAxis
from shared_config.layout import ParallelLayout
from shared_config.placement import place_step
from shared_config.scheduler import Step

ONE_RANK = ParallelLayout()
MIN_PREFILL_ROWS = 16
MIN_PAGES = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Spans:
    """Where the chunks of a prefill pass lie: chunk s has `counts[s]` tokens, from position `starts[s]` on.

    `rows` are the flat rows of each chunk's tokens (padding points at row 0), `places` the way back: row t is
    element `places[t]` of the chunks laid out as [S * C]. `sequences` and `pieces` are the tables of `gdn_prefill`, in
    which the rows that pad the pass are one more sequence, and empty pieces fill up.
    """

    starts: Int32[Array, " S"]
    counts: Int32[Array, " S"]
    rows: Int32[Array, "S C"]
    places: Int32[Array, " T"]
    sequences: Int32[Array, "S+1 5"]
    pieces: Int32[Array, "N 4"]
    fresh: bool = field(metadata={"static": True})  # every chunk is its sequence's first

    def split(self, x: Shaped[Array, "T ..."]) -> Shaped[Array, "S C ..."]:
        """Rows as chunks."""
        return x[self.rows]

    def join(self, x: Shaped[Array, "S C ..."]) -> Shaped[Array, "T ..."]:
        """Chunks as rows."""
        return x.reshape(-1, *x.shape[2:])[self.places]

    @property
    def real(self) -> Shaped[Array, "S C"]:
        """Which elements of the chunks are tokens."""
        return jnp.arange(self.rows.shape[1], dtype=jnp.int32) < self.counts[:, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    token_ids: Int32[Array, " T"]
    positions: Int32[Array, " T"]  # within each sequence
    kv_slots: Int32[Array, " T"]  # page * page_size + offset
    page_tables: Int32[Array, "S P"]
    lengths: Int32[Array, " S"]  # this pass's tokens counted
    state_slots: Int32[Array, " S"]
    order: Int32[Array, " S"]  # each sequence's place in the step
    logit_rows: Int32[Array, " L"]  # the rows whose logits are wanted, of all passes one after another
    sample_rows: Int32[Array, " S"]  # of those, each sequence's last, in the step's order
    spans: Spans | None  # prefill chunks; None for decode

    @property
    def is_decode(self) -> bool:
        return self.spans is None

    @property
    def real(self) -> Bool[Array, " T"]:
        """Which rows are tokens; the others pad."""
        if self.spans is None:
            return self.state_slots > 0
        return jnp.arange(self.token_ids.shape[0], dtype=jnp.int32) < jnp.sum(self.spans.counts)

    def own(self, axis: MeshAxis) -> Batch:
        """The pass of this device's attention-DP rank, inside shard_map."""
        own = jax.tree.map(axis.own_rows, self)
        return replace(own, logit_rows=self.logit_rows, sample_rows=self.sample_rows)

    def next_token(self, token_ids: Int32[Array, " S"], page_size: int) -> Batch:
        """The decode pass after this one, of the tokens that this one chose, in the step's order."""
        positions = self.positions + 1
        pages = jnp.take_along_axis(self.page_tables, positions[:, None] // page_size, axis=1)[:, 0]
        return replace(
            self,
            token_ids=token_ids[self.order],
            positions=positions,
            kv_slots=pages * page_size + positions % page_size,
            lengths=self.lengths + 1,
            spans=None,
        )


def bucket(count: int, least: int = 1) -> int:
    """The power of two that holds `count` and `least`."""
    return 1 << (max(count, least) - 1).bit_length()


def build_batch(
    step: Step,
    *,
    page_size: int,
    layout: ParallelLayout = ONE_RANK,
    all_logits: bool = False,
    rows: int = 1,
    pages: int = MIN_PAGES,
) -> Batch:
    """Host arrays for `step`, padded, to at least `rows` sequences and `pages` columns.

    Logits are wanted of every row (`all_logits`) or of each chunk's last.
    """
    chunks, least = step.chunks, MIN_PREFILL_ROWS if step.prefill else rows
    placement = place_step(step, layout, round_up=lambda count: bucket(count, least))
    parts = [placement.part(dp) for dp in range(layout.attn_dp_size)]
    S = bucket(max(len(part.chunks) for part in parts), rows)
    C = bucket(max(chunk.num_tokens for chunk in chunks), MIN_PREFILL_ROWS)
    P = bucket(max(len(chunk.sequence.pages) for chunk in chunks), pages)
    passes = [_build_pass(part, step, page_size, placement.pass_rows, S, C, P) for part in parts]
    firsts = [
        chunk.sequence.dp_rank(len(parts)) * placement.pass_rows + first
        for chunk, first in zip(chunks, placement.firsts(), strict=True)
    ]
    wanted = [
        first + row
        for chunk, first in zip(chunks, firsts, strict=True)
        for row in (range(chunk.num_tokens) if all_logits else (chunk.num_tokens - 1,))
    ]
    samples = np.cumsum([chunk.num_tokens for chunk in chunks]) - 1 if all_logits else range(len(chunks))
    lists = {
        "logit_rows": _padded(wanted, bucket(len(wanted), least if all_logits else rows)),
        "sample_rows": _padded(samples, bucket(len(chunks), rows)),
    }
    joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *passes)
    return replace(joined, **lists)


def _padded(values: Iterable[int], size: int) -> Any:
    """numpy's arrays, which jit takes as they are."""
    values = np.fromiter(values, np.int32)
    return np.pad(values, (0, size - len(values)))


def _build_pass(part: Step, step: Step, page_size: int, T: int, S: int, C: int, P: int) -> Batch:
    """The arrays of one DP rank, which runs `part` of `step`."""
    chunks = part.chunks

    def zeros(*shape: int) -> Any:
        return np.zeros(shape, np.int32)

    token_ids, positions, kv_slots = zeros(T), zeros(T), zeros(T)
    tables, lengths, slots, starts, counts = zeros(S, P), zeros(S) + 1, zeros(S), zeros(S), zeros(S)
    chunk_rows, places = zeros(S, C), zeros(T)
    fresh = all(chunk.start == 0 for chunk in step.chunks)  # of all ranks: their passes are alike
    numbers = {id(chunk): number for number, chunk in enumerate(step.chunks)}
    first = 0
    for i, chunk in enumerate(chunks):
        sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
        mine = slice(first, first + chunk.num_tokens)
        token_ids[mine] = sequence.tokens[chunk.start : end]
        positions[mine] = at = np.arange(chunk.start, end)
        kv_slots[mine] = np.asarray(sequence.pages)[at // page_size] * page_size + at % page_size
        tables[i, : len(sequence.pages)] = sequence.pages
        lengths[i], slots[i], starts[i], counts[i] = end, sequence.slot, chunk.start, chunk.num_tokens
        chunk_rows[i, : chunk.num_tokens] = np.arange(mine.start, mine.stop)
        places[mine] = i * C + np.arange(chunk.num_tokens)
        first = mine.stop
    return Batch(
        token_ids=token_ids,
        positions=positions,
        kv_slots=kv_slots,
        page_tables=tables,
        lengths=lengths,
        state_slots=slots,
        order=_padded((numbers[id(chunk)] for chunk in chunks), S),
        logit_rows=zeros(0),
        sample_rows=zeros(0),
        spans=Spans(starts, counts, chunk_rows, places, *_tables(counts, slots, starts, T), fresh)
        if step.prefill
        else None,
    )


@dataclass(frozen=True)
class _Piece:
    """See `core_torch.kernels.gdn_prefill.Piece`."""

    first: int
    num_tokens: int
    slot: int
    start: int


def _tables(counts: Any, slots: Any, starts: Any, T: int) -> tuple[Any, Any]:
    firsts = np.concatenate(([0], np.cumsum(counts)))
    padding = (T - firsts[-1], 0, 0)
    sizes = [*zip(counts, slots, starts, strict=True), padding]
    sequences, pieces = chunk_tables(
        [_Piece(int(first), *map(int, rest)) for first, rest in zip(firsts, sizes, strict=True)]
    )
    room = T // CHUNK + len(sequences)  # a sequence's last piece may be short
    return sequences, np.pad(pieces, ((0, room - len(pieces)), (0, 0)))
