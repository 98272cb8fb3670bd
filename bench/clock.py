"""Times a chain of calls that every rank makes together: as one CUDA graph on GPUs, one by one on CPU.

A call of a few microseconds cannot be timed alone, so a chain of `count` calls is one sample. On GPUs it is captured:
a launch from Python costs more than the kernels. Before each sample the ranks meet on the device, behind a delay
in which the CPU queues everything; what is timed then waits neither for Python nor for a late peer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from core_torch.kernels.counts import ReductionCounts

DELAY_CYCLES = 500_000  # about 0.3 ms


class Clock(Protocol):
    """`last` is what the chain returned in the latest sample."""

    last: Any

    def sample_us(self) -> float:
        """Microseconds a call, on this rank. Collective. Adds what ran to the counts."""
        ...


def make_clock(
    chain: Callable[[], Any],
    count: int,
    *,
    restore: Callable[[], None],
    counts: ReductionCounts,
    device: torch.device,
) -> Clock:
    """A clock for `chain()`, which makes `count` calls. All ranks make the same clocks in the same order. `restore`
    undoes what the chain did to its inputs; it runs before each sample, untimed."""
    kind = GraphClock if device.type == "cuda" else PlainClock
    return kind(chain, count, restore, counts)


class GraphClock:
    def __init__(
        self, chain: Callable[[], Any], count: int, restore: Callable[[], None], counts: ReductionCounts
    ) -> None:
        self._count, self._restore, self._counts = count, restore, counts
        self._meeting = torch.zeros(1, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            chain()
            dist.all_reduce(self._meeting)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        before = counts.snapshot()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.last = chain()
        self._captured = counts.difference(before)

    def sample_us(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._restore()
        torch.cuda.synchronize()
        torch.cuda._sleep(DELAY_CYCLES)
        dist.all_reduce(self._meeting)
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        self._counts += self._captured
        return start.elapsed_time(end) * 1e3 / self._count


class PlainClock:
    def __init__(
        self, chain: Callable[[], Any], count: int, restore: Callable[[], None], counts: ReductionCounts
    ) -> None:
        del counts  # the calls count themselves
        self._chain, self._count, self._restore = chain, count, restore
        self.last: Any = None

    def sample_us(self) -> float:
        self._restore()
        dist.barrier()
        start = time.perf_counter()
        self.last = self._chain()
        return (time.perf_counter() - start) * 1e6 / self._count
