"""Times a chain of calls, of one device or of all ranks together: as one CUDA graph on GPUs, one by one on CPU.

A call of a few microseconds cannot be timed alone, so a chain of `count` calls is one sample. On GPUs it is captured:
a launch from Python costs more than the kernels. Before each sample the ranks meet on the device, behind a delay
in which the CPU queues everything; what is timed then waits neither for Python nor for a late peer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from core_torch.kernels.counts import ReductionCounts

DELAY_CYCLES = 500_000  # about 0.3 ms
T = TypeVar("T")


def on_another_stream(action: Callable[[], object]) -> None:
    """What a graph captures has to run once before, and not on the default stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        action()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def capture(chain: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """`chain` as a CUDA graph, and what it returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = chain()
    return graph, returned


def samples_us(
    calls: Sequence[Callable[[], object]], repeats: int, device: torch.device, *, in_graph: bool = True
) -> list[float]:
    """Microseconds a call of one device alone, where all of `calls` in turn are one sample of `repeats`.

    To find their operands in memory, they touch more than a cache holds. Without `in_graph` a GPU runs them as they
    are launched, which is what an engine does that captures no graph.
    """

    def chain() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        chain()
        found = []
        for _ in range(repeats):
            began = time.perf_counter()
            chain()
            found.append((time.perf_counter() - began) * 1e6 / len(calls))
        return found
    run = chain
    on_another_stream(chain)
    if in_graph:
        run = capture(chain)[0].replay
    return [_between_events_us(run) / len(calls) for _ in range(repeats)]


def _between_events_us(run: Callable[[], object], meet: Callable[[], object] = lambda: None) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(DELAY_CYCLES)
    meet()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


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
    restore: Callable[[], object],
    counts: ReductionCounts,
    device: torch.device,
) -> Clock:
    """A clock for `chain()`, which makes `count` calls. All ranks make the same clocks in the same order. `restore`
    undoes what the chain did to its inputs; it runs before each sample, untimed."""
    kind = GraphClock if device.type == "cuda" else PlainClock
    return kind(chain, count, restore, counts)


class GraphClock:
    def __init__(
        self, chain: Callable[[], Any], count: int, restore: Callable[[], object], counts: ReductionCounts
    ) -> None:
        self._count, self._restore, self._counts = count, restore, counts
        self._meeting = torch.zeros(1, device="cuda")

        def warm_up() -> None:
            chain()
            dist.all_reduce(self._meeting)

        on_another_stream(warm_up)
        before = counts.snapshot()
        self._graph, self.last = capture(chain)
        self._captured = counts.difference(before)

    def sample_us(self) -> float:
        self._restore()
        elapsed = _between_events_us(self._graph.replay, lambda: dist.all_reduce(self._meeting))
        self._counts += self._captured
        return elapsed / self._count


class PlainClock:
    def __init__(
        self, chain: Callable[[], Any], count: int, restore: Callable[[], object], counts: ReductionCounts
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
