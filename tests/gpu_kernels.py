"""What the tests of single kernels share: inputs, distances, graphs, and times beside a copy's bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from tests.triton_interpreter import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
EPS = 1e-6
SLACK = 1.1  # times the plain path's distance from float64
REPLAYS = 7
COPY_BYTES = 1 << 30


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def distance(got: Tensor, want: Tensor) -> float:
    """In the 2-norm, relative; NaN stays NaN and fails every comparison."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def assert_as_close(got: Tensor, plain: Tensor, want: Tensor, slack: float = SLACK) -> None:
    mine, base = distance(got, want), distance(plain, want)
    assert mine <= slack * base + 1e-6, (mine, base)


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """`call` in a CUDA graph, after one eager run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """To be imported by a module whose tests draw their inputs."""
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
    if not INTERPRETED:
        torch.cuda.synchronize()  # a failed kernel fails its own test


def median_us(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds a call: all of `calls` in one CUDA graph. Together they touch far more than the L2 cache holds."""

    def chain() -> Tensor:
        for call in calls:
            call()
        return torch.empty(0)

    graph, _ = captured(chain)
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[REPLAYS // 2]


def copy_bandwidth() -> float:
    """Bytes per second that a kernel reads and writes; a graph's memcpy node is slower."""
    source = torch.ones(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (median_us([lambda: torch.add(source, 1, out=target)] * 4) * 1e-6)
