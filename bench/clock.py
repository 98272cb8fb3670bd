"""Times calls that every rank makes together: inside one CUDA graph on GPUs, one after another on CPU.

A call of a few microseconds cannot be timed alone, so `count` of them make one sample. On GPUs they are captured:
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
WARMUP_CALLS = 3

Call = Callable[[int], Any]


class Clock(Protocol):
    """`count` calls of `call(0)`, `call(1)`, ... `first` is what call 0 returned in the latest sample."""

    first: Any

    def sample_us(self) -> float:
        """Microseconds a call, on this rank. Collective. Adds what ran to the counts."""
        ...


def make_clock(
    call: Call, count: int, *, restore: Callable[[], None], counts: ReductionCounts, device: torch.device
) -> Clock:
    """Collective: all ranks make the same clocks in the same order. `restore` undoes what calls do to their inputs;
    it runs before each sample, untimed."""
    kind = GraphClock if device.type == "cuda" else PlainClock
    return kind(call, count, restore, counts)


class GraphClock:
    def __init__(self, call: Call, count: int, restore: Callable[[], None], counts: ReductionCounts) -> None:
        self._count, self._restore, self._counts = count, restore, counts
        self._meeting = torch.zeros(1, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for index in range(WARMUP_CALLS):
                call(index)
            dist.all_reduce(self._meeting)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        before = counts.snapshot()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.first = call(0)
            for index in range(1, count):
                call(index)
        self._captured = counts.difference(before)
        counts.reset()

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
    def __init__(self, call: Call, count: int, restore: Callable[[], None], counts: ReductionCounts) -> None:
        self._call, self._count, self._restore = call, count, restore
        self.first: Any = None
        for index in range(WARMUP_CALLS):
            call(index)
        counts.reset()

    def sample_us(self) -> float:
        self._restore()
        dist.barrier()
        start = time.perf_counter()
        self.first = self._call(0)
        for index in range(1, self._count):
            self._call(index)
        return (time.perf_counter() - start) * 1e6 / self._count
