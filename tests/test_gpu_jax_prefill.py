"""The kernels of prefill in JAX on GPUs: bit for bit what PyTorch gets from them, states in place; and that the
first calls of kernels beside fused reductions end where one process has two GPUs.

The work is in `gpu_jax_prefill_cases.py`.
"""

from __future__ import annotations

import pytest

from tests.test_gpu_jax import Cases

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    folder = tmp_path_factory.mktemp("gpu_jax_prefill")
    ran = Cases(folder, ("gdn", "moe"), module="tests.gpu_jax_prefill_cases", gpus=1)
    ran.wait(240)
    return ran


@pytest.mark.parametrize(("case", "results"), [("gdn", 6), ("moe", 3)])
def test_bitwise_equal_to_torch(case: str, results: int, kernels: Cases) -> None:
    found = kernels.result(case)
    assert found == dict.fromkeys(found, [0] * results)
    assert len(found) == 3


def test_first_calls_beside_fused_reductions_end(tmp_path_factory: pytest.TempPathFactory) -> None:
    ran = Cases(
        tmp_path_factory.mktemp("first"), ("engine_on_two",), module="tests.gpu_jax_prefill_cases", gpus=2
    )
    ran.wait(120)
    found = ran.result("engine_on_two")
    assert {"add_norm", "fresh_prefill", "gdn_prefill", "moe_prefill"} <= set(found["kernels"])
    assert found["fused"] > 0
    assert found["error"] < 0.05
