"""Settings and fixtures for all tests: virtual JAX devices, strict promotion, poisoned memory, real ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

# Optimisation level 0 halves the time that XLA takes to compile.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.ranks import RankPool

torch.set_num_threads(1)
if not torch.cuda.is_available():  # torch.empty is NaN-filled, so that reading unwritten memory shows
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(scope="session")
def _pools() -> Iterator[dict[int, RankPool]]:
    pools: dict[int, RankPool] = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def ranks(_pools: dict[int, RankPool]) -> Callable[[int], RankPool]:
    """`ranks(N)`: N gloo ranks, shared by the whole session and started again when a test has broken them."""

    def get(world_size: int) -> RankPool:
        pool = _pools.get(world_size)
        if pool is None or not pool.alive:
            pool = _pools[world_size] = RankPool(world_size)
        return pool

    return get


@pytest.fixture
def fresh_ranks() -> Iterator[Callable[[int], RankPool]]:
    """`fresh_ranks(N)`: N gloo ranks of this test's own, for tests that break them."""
    pools: list[RankPool] = []

    def get(world_size: int) -> RankPool:
        pools.append(RankPool(world_size))
        return pools[-1]

    yield get
    for pool in pools:
        pool.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without CUDA GPUs the `gpu` tests are skipped, each saying so."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count >= 1:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs CUDA GPUs"))
