"""Decode in CUDA graphs, one for each batch bucket.

A replayed graph costs one launch instead of a thousand. Everything that a captured step touches lies still: the
inputs in one buffer, the caches, the workspaces of the fused op (made before; asking for one during capture is an
error). All ranks capture the same buckets in the same order, because a captured collective waits for its peers.

A graph ends with each row's best token, which it leaves where the next step reads it: that step may be launched while
this one runs. What the host knows of it (positions, places in the cache) goes through one of a few staging buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from core_torch.batch import Batch, unpack_decode
from core_torch.cache import LayerCache
from core_torch.decode_rows import TABLE, DecodeRows
from core_torch.kernels.counts import ReductionCounts
from core_torch.models.qwen3_next import Qwen3Next
from core_torch.parallel import Parallel
from shared_config.placement import Placement
from shared_config.scheduler import Step
from shared_config.settings import EngineSettings

Tensors = tuple[torch.Tensor, torch.Tensor]

WARMUP_STEPS = 2  # libraries allocate and choose algorithms on their first calls, which must not be captured
STAGES = 3  # steps of a bucket whose numbers may be on their way at once; more wait for the oldest


def decode_buckets(max_num_seqs: int, *, deterministic: bool) -> list[int]:
    """Batch sizes to capture: powers of two and the maximum; deterministic runs use one shape only."""
    if deterministic:
        return [max_num_seqs]
    powers = [1 << i for i in range(max_num_seqs.bit_length()) if 1 << i < max_num_seqs]
    return [*powers, max_num_seqs]


def new_graph() -> torch.cuda.CUDAGraph:
    return torch.cuda.CUDAGraph()


def new_pool() -> Any:
    return torch.cuda.graph_pool_handle()


def warm_up(call: Callable[[], object]) -> None:
    """On a stream of its own, as the capture will be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_STEPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def capture(graph: torch.cuda.CUDAGraph, pool: Any, call: Callable[[], Tensors]) -> Tensors:
    """`call`'s results, which every replay writes again."""
    with torch.cuda.graph(graph, pool=pool):
        return call()


class Stage:
    """Page-locked memory for one step's way to the device and back; `event` is behind its last use."""

    def __init__(self, shape: tuple[int, int], num_tokens: int) -> None:
        self.inputs = torch.empty(shape, dtype=torch.int64, pin_memory=True)
        self.tokens = torch.empty(num_tokens, dtype=torch.int64, pin_memory=True)
        self.event = torch.cuda.Event()
        self.event.record()

    def wait(self) -> None:
        self.event.synchronize()


class Bucket:
    """The captured step of `rows` rows, and what it reads and writes.

    A graph reads its inputs by address: every tensor of the captured batch must outlive the capture.
    """

    def __init__(self, rows: int, pages: int, page_size: int, parallel: Parallel) -> None:
        self.rows = rows
        self.host = DecodeRows(page_size=page_size, rows=rows, pages=pages)
        self.inputs = torch.from_numpy(self.host.packed.copy()).to(parallel.device)
        self.batch: Batch = unpack_decode(self.inputs, parallel.place, parallel.layout.attn_dp_size)
        every_row = rows * parallel.layout.attn_dp_size
        self.stages = [Stage((len(self.inputs), rows), every_row) for _ in range(STAGES)]
        self.turn = 0
        self.graph = new_graph()
        self.logits = self.tokens = torch.empty(0)  # this rank's [L, W] of logits, tokens [L]
        self.counts: list[ReductionCounts] = []

    def upload(self, step: Step) -> Stage:
        """Puts the step's numbers where the graph reads them, in the stream's order."""
        stage = self.stages[self.turn]
        self.turn = (self.turn + 1) % STAGES
        stage.wait()
        changed, known = self.host.fill(step)
        assert known or not changed, "a step whose tokens are not known yet follows one of the same sequences"
        # Unknown tokens are on the device already, and tables that did not change.
        part = slice(0 if known else 1, None if changed else TABLE)
        np.copyto(stage.inputs.numpy()[part], self.host.packed[part])
        self.inputs[part].copy_(stage.inputs[part], non_blocking=True)
        return stage


class LaunchedTokens:
    """The tokens of a step that may still be running, a chunk's in its row of `rows`."""

    def __init__(self, stage: Stage, rows: list[int]) -> None:
        self._stage, self._rows = stage, rows

    def wait(self) -> list[int]:
        """To be asked before STAGES more steps of as many rows are launched."""
        self._stage.wait()
        tokens = self._stage.tokens.tolist()
        return [tokens[row] for row in self._rows]


class DecodeGraphs:
    """Captures on construction. A decode step is padded to the next bucket and replayed."""

    def __init__(
        self,
        model: Qwen3Next,
        cache: list[LayerCache],
        parallel: Parallel,
        settings: EngineSettings,
        max_pages: int,
    ) -> None:
        self._head, self._parallel = model.lm_head, parallel
        self._counts = [group.counts for group in (parallel.attention, parallel.mlp)]
        self._pool = new_pool()
        sizes = decode_buckets(settings.max_num_seqs, deterministic=settings.deterministic)
        self._buckets = {rows: Bucket(rows, max_pages, settings.page_size, parallel) for rows in sizes}
        for bucket in reversed(self._buckets.values()):  # the largest first: the others fit into its memory
            self._capture(bucket, model, cache)
        for counts in self._counts:
            counts.reset()  # warm-up and capture are nobody's results

    @torch.inference_mode()
    def _capture(self, bucket: Bucket, model: Qwen3Next, cache: list[LayerCache]) -> None:
        parallel = self._parallel

        def run() -> Tensors:
            logits = model.lm_head.local(model.hidden_states(bucket.batch, cache))
            tokens = model.lm_head.argmax(logits)
            if parallel.pieces.everyone.size > 1:  # pieces may differ in the last bits of their logits
                parallel.broadcast_tokens(tokens)
            first = parallel.place.dp * bucket.rows if parallel.layout.attn_dp_size > 1 else 0
            bucket.batch.token_ids.copy_(tokens[first : first + bucket.rows])
            return logits, tokens

        warm_up(run)
        before = [counts.snapshot() for counts in self._counts]
        bucket.logits, bucket.tokens = capture(bucket.graph, self._pool, run)
        bucket.counts = [c.difference(b) for c, b in zip(self._counts, before, strict=True)]

    def bucket(self, rows: int) -> int:
        """The captured size that `rows` are padded to."""
        return next(size for size in self._buckets if size >= rows)

    def launch(self, placement: Placement) -> LaunchedTokens:
        """Starts a decode step, placed with `bucket`, whose sequences all take their best token.

        The next step of the same sequences may be launched before the tokens are asked for.
        """
        bucket, stage = self._replay(placement)
        stage.tokens.copy_(bucket.tokens, non_blocking=True)
        stage.event.record()
        return LaunchedTokens(stage, placement.decode_rows())

    def logits(self, placement: Placement) -> torch.Tensor:
        """Logits [attn_dp_size * bucket, V] in float32 of a decode step placed with `bucket`."""
        bucket, stage = self._replay(placement)
        stage.event.record()
        return self._head.gather(bucket.logits).float()

    def _replay(self, placement: Placement) -> tuple[Bucket, Stage]:
        bucket = self._buckets[placement.pass_rows]
        stage = bucket.upload(placement.part(self._parallel.place.dp))
        bucket.graph.replay()
        for counts, captured in zip(self._counts, bucket.counts, strict=True):
            counts += captured
        return bucket, stage

    def close(self) -> None:
        torch.cuda.synchronize()
        for bucket in self._buckets.values():
            bucket.graph.reset()
        self._buckets.clear()
