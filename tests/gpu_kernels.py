"""What the tests of single kernels share: inputs, distances, graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from bench.clock import capture, on_another_stream
from tests.triton_interpreter import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
EPS = 1e-6
SLACK = 1.1  # times the plain path's distance from float64


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
    on_another_stream(call)
    return capture(call)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """To be imported by a module whose tests draw their inputs."""
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
    if not INTERPRETED:
        torch.cuda.synchronize()  # a failed kernel fails its own test
