"""What this machine's memory, links and arithmetic really reach, measured in the same run as everything else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from bench.stats import quantile

REPEATS = 10
COPY_BYTES = {"cuda": 1 << 31, "cpu": 1 << 26}
LINK_BYTES = 1 << 29
MATMUL_DIM = {"cuda": 8192, "cpu": 512}


def copy_bytes_per_s(device: str) -> float:
    """Memory bandwidth of one device: a copy's bytes, read and written, per second."""
    source = torch.empty(COPY_BYTES[device], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_s(lambda: target.copy_(source))


def matmul_flops_per_s(device: str, dtype: torch.dtype) -> float:
    """A square product of random data (zeros would run faster, for want of heat)."""
    n = MATMUL_DIM[device]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _median_s(lambda: a @ b)


def link_bytes_per_s() -> float | None:
    """Bytes per second in each direction between GPUs 0 and 1, while both directions are busy; None without two.

    Both busy, because an all-reduce sends and receives at once.
    """
    if torch.cuda.device_count() < 2 or not torch.cuda.can_device_access_peer(0, 1):
        return None
    ours = [torch.empty(LINK_BYTES, dtype=torch.uint8, device=f"cuda:{i}").fill_(i) for i in (0, 1)]
    arrivals = [torch.empty(LINK_BYTES, dtype=torch.uint8, device=f"cuda:{1 - i}") for i in (0, 1)]
    streams = [torch.cuda.Stream(device=i) for i in (0, 1)]

    def exchange() -> None:
        for source, target, stream in zip(ours, arrivals, streams, strict=True):
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)

    seconds = _median_s(exchange)
    if any(bool((arrival != i).any()) for i, arrival in enumerate(arrivals)):
        raise RuntimeError("a copy between GPUs 0 and 1 brought wrong data")
    return LINK_BYTES / seconds


def memory_bytes(device: str) -> int:
    """Of the first GPU, or of the machine."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cache_bytes(device: str) -> int:
    """The GPU's L2; 0 on CPU, where nothing here is fast enough for a cache to matter."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0


def _median_s(action: Callable[[], object]) -> float:
    samples = []
    for repeat in range(REPEATS + 2):
        _synchronize()
        start = time.perf_counter()
        action()
        _synchronize()
        if repeat >= 2:  # the first ones allocate and choose algorithms
            samples.append(time.perf_counter() - start)
    return quantile(samples, 0.5)


def _synchronize() -> None:
    if torch.cuda.is_available():
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.synchronize(gpu)
