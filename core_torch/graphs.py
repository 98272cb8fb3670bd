"""Decode in CUDA graphs, one for each batch bucket.

A replayed graph costs one launch instead of a thousand. Everything that a captured step touches lies still: the
inputs in one buffer, the caches, the workspaces of the fused op (made before; asking for one during capture is an
error). All ranks capture the same buckets in the same order, because a captured collective waits for its peers.
"""

from __future__ import annotations

import torch

from core_torch.batch import Batch, pack_decode, unpack_decode
from core_torch.cache import LayerCache
from core_torch.kernels.counts import ReductionCounts
from core_torch.models.qwen3_next import Qwen3Next
from core_torch.parallel import Parallel
from shared_config.placement import Placement
from shared_config.scheduler import Step
from shared_config.settings import EngineSettings

WARMUP_STEPS = 2  # libraries allocate and choose algorithms on their first calls, which must not be captured


def decode_buckets(max_num_seqs: int, *, deterministic: bool) -> list[int]:
    """Batch sizes to capture: powers of two and the maximum; deterministic runs use one shape only."""
    if deterministic:
        return [max_num_seqs]
    powers = [1 << i for i in range(max_num_seqs.bit_length()) if 1 << i < max_num_seqs]
    return [*powers, max_num_seqs]


class DecodeGraphs:
    """Captures on construction. `run` replays a decode step that was padded to the next bucket."""

    def __init__(
        self,
        model: Qwen3Next,
        cache: list[LayerCache],
        parallel: Parallel,
        settings: EngineSettings,
        max_pages: int,
    ) -> None:
        self.page_size, self.max_pages = settings.page_size, max_pages
        self._layout, self._place = parallel.layout, parallel.place
        self.buckets = decode_buckets(settings.max_num_seqs, deterministic=settings.deterministic)
        self._counts = [group.counts for group in (parallel.attention, parallel.mlp)]
        self._inputs: dict[int, torch.Tensor] = {}
        # A graph reads its inputs by address: every tensor of the captured batch must outlive the capture.
        self._batches: dict[int, Batch] = {}
        self._logits: dict[int, torch.Tensor] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._captured: dict[int, list[ReductionCounts]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        for rows in reversed(self.buckets):  # the largest first: the others fit into its memory
            self._capture(rows, model, cache, parallel.device)
        for counts in self._counts:
            counts.reset()  # warm-up and capture are nobody's results

    @torch.inference_mode()
    def _capture(
        self,
        rows: int,
        model: Qwen3Next,
        cache: list[LayerCache],
        device: torch.device,
    ) -> None:
        idle = pack_decode(Step(False, ()), page_size=self.page_size, rows=rows, pages=self.max_pages)
        self._inputs[rows] = idle.to(device)
        batch = unpack_decode(self._inputs[rows], self._place, self._layout.attn_dp_size)
        self._batches[rows] = batch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_STEPS):
                model(batch, cache)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        before = [counts.snapshot() for counts in self._counts]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._logits[rows] = model(batch, cache)
        self._graphs[rows] = graph
        self._captured[rows] = [c.difference(b) for c, b in zip(self._counts, before, strict=True)]

    def bucket(self, rows: int) -> int:
        """The captured size that `rows` are padded to."""
        return next(bucket for bucket in self.buckets if bucket >= rows)

    def run(self, placement: Placement) -> torch.Tensor:
        """Logits [attn_dp_size * bucket, V] of a decode step placed with `bucket`, valid until the next one."""
        rows, part = placement.pass_rows, placement.part(self._place.dp)
        packed = pack_decode(part, page_size=self.page_size, rows=rows, pages=self.max_pages)
        self._inputs[rows].copy_(packed.pin_memory(), non_blocking=True)
        self._graphs[rows].replay()
        for counts, captured in zip(self._counts, self._captured[rows], strict=True):
            counts += captured
        return self._logits[rows]

    def close(self) -> None:
        torch.cuda.synchronize()
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._logits.clear()
        self._batches.clear()
