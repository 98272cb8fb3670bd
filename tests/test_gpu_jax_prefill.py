"""The kernels of prefill in JAX on GPUs: bit for bit what PyTorch gets from them, states in place; and which of them
hangs beside fused reductions where one process has two GPUs.

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


@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        ("add_norm", "add_norm"),
        ("gdn_prefill_on_two", "gdn_prefill"),
        ("moe_prefill_on_two", "moe_prefill"),
        ("fresh_prefill", "fresh_prefill"),
    ],
)
def test_a_first_call_beside_fused_reductions_ends(
    case: str, kernel: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A kernel that passes may leave `jax_bridge.kernels.compiled.FOR_ONE_GPU`."""
    folder = tmp_path_factory.mktemp(case)
    ran = Cases(folder, (case,), module="tests.gpu_jax_prefill_cases", gpus=2)
    ran.wait(100)
    found = ran.result(case)
    assert kernel in found["kernels"]
    assert found["fused"] > 0
    assert found["error"] < 0.05
