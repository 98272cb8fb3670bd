"""Layouts in JAX on GPUs, with the real kernels: against one GPU in float32, fused where the rules allow it.

The work is in `gpu_jax_layout_cases.py`.
"""

from __future__ import annotations

import pytest

from shared_config.results import Reductions
from tests.test_gpu_jax import Cases

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]

MODULE = "tests.gpu_jax_layout_cases"
TOLERANCE = 1e-4  # relative to the largest logit, float32

# GPUs, and what a pass of eight layers reduces (fused, unfused).
LAYOUTS = {
    "ep2": (2, Reductions(16, 0)),
    "cp2": (2, Reductions(0, 8)),
    "moe_dp2": (2, Reductions(8, 0)),
    "dp2_ep2": (2, Reductions(0, 8)),
    "tp4": (4, Reductions(16, 0)),  # as many ranks as heads: a KV head on two
    "tp4_cp2": (4, Reductions(8, 8)),
    "tp4_cp2_moe_dp2": (4, Reductions(16, 0)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_agrees_with_one_gpu(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    gpus, each = LAYOUTS[name]
    ran = Cases(tmp_path_factory.mktemp(name), (name,), module=MODULE, gpus=gpus)
    ran.wait(240)
    found = ran.result(name)
    enabled, backend, reason = found["fused"]
    assert enabled == (not name.startswith("dp")), reason
    assert backend == ("trtllm" if enabled else "unfused")
    assert found["same_tokens"]
    assert found["error"] <= TOLERANCE
    passes = found["passes"]
    assert found["reductions"] == [each.fused * passes, each.unfused * passes]


def test_the_op_over_every_axis_of_four_gpus(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Groups of neighbours, of GPUs that are none ([0, 2] and [1, 3]), and all four."""
    ran = Cases(tmp_path_factory.mktemp("groups"), ("groups_of_four",), module=MODULE, gpus=4)
    ran.wait(120)
    found = ran.result("groups_of_four")
    assert {name: group["groups"] for name, group in found.items()} == {"cp": 2, "tp": 2, "cpxtp": 1}
    for group in found.values():
        assert group["fused"] == [True, 1]
        assert group["error"] < 1e-4
