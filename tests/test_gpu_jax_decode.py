"""The compiled decode kernels in JAX on GPUs: bit for bit what PyTorch gets from them, in place, and in the engine.

The work is in `gpu_jax_decode_cases.py`; `-s -k times` prints how long each kernel takes in XLA's CUDA graphs.
"""

from __future__ import annotations

import json

import pytest

from tests.test_gpu_jax import Cases
from tests.test_gpu_model import SLACK, TIE

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]

MODULE = "tests.gpu_jax_decode_cases"
NAMES = {"add_norm", "few_rows", "gdn_decode", "moe_decode", "norm_rope", "paged_decode", "vocabulary"}


def result(tmp_path_factory: pytest.TempPathFactory, *cases: str, gpus: int = 1) -> Cases:
    ran = Cases(tmp_path_factory.mktemp("gpu_jax_decode"), cases, module=MODULE, gpus=gpus)
    ran.wait(240)
    return ran


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return result(tmp_path_factory, "equal_to_torch", "equal_in_a_loop")


def test_bitwise_equal_to_torch_and_in_place(kernels: Cases) -> None:
    found = kernels.result("equal_to_torch")
    assert len(found) == 6 * 4
    assert {
        name: case for name, case in found.items() if any(case["different"]) or not case["in_place"]
    } == {}


def test_steps_of_a_loop_go_on_from_their_own_state(kernels: Cases) -> None:
    assert kernels.result("equal_in_a_loop") == {name: [0, 0, 0] for name in ("gdn", "attention", "layer")}


@pytest.mark.parametrize(("case", "gpus"), [("engine_on_one", 1), ("engine_on_two", 2)])
def test_the_engine_is_as_good_as_with_plain_kernels(
    case: str, gpus: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = result(tmp_path_factory, case, gpus=gpus).result(case)
    assert {name: found["kernels"][name] for name in NAMES} == {key: [True, ""] for key in NAMES}
    mine, base = found["relative"]
    assert mine <= SLACK * base
    gaps = [*found["partings"], *found["partings_of_the_loop"]]
    assert all(gap <= TIE * found["rms"] for gap in gaps)


def test_times(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = result(tmp_path_factory, "times").result("times")
    print(json.dumps(found, indent=1))
    assert all(us > 0 for us in found.values())
