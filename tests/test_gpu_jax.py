"""The fused op in JAX on two GPUs (more where there are): bit for bit what PyTorch gets, and in CUDA graphs.

The work is in `gpu_jax_cases.py`; this starts its processes once and looks at what they found.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import free_port

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

CASES = (
    "readme_example",
    "digest",
    "thousand_executions",
    "independent_calls",
    "two_threads",
    "transformations",
    "exchange",
    "ffi_equals_torch",
    "cupy_equals_torch",
)
MAIN_TIMEOUT_S = 150
EXTRA_TIMEOUT_S = 60


def _end_with_the_parent() -> None:
    """A process that hangs on a GPU must not outlive a killed pytest (Linux: PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Cases:
    """The processes of one run, and what their cases gave so far."""

    def __init__(
        self,
        folder: Path,
        cases: tuple[str, ...],
        *,
        module: str = "tests.gpu_jax_cases",
        gpus: int = 2,
        processes: int = 1,
        xla_flags: str = "",
    ) -> None:
        if torch.cuda.device_count() < gpus:
            pytest.skip(f"needs {gpus} GPUs")
        self.files = [folder / f"process{index}.jsonl" for index in range(processes)]
        self.logs = [folder / f"process{index}.log" for index in range(processes)]
        port = free_port()
        self.processes = []
        for index in range(processes):
            environment = {
                **os.environ,
                "XLA_FLAGS": xla_flags,
                "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.4"),
                "CROSSFUSE_TEST_DUMP": str(folder / "dump"),
                "CROSSFUSE_TEST_RANKS": str(gpus),
            }
            if processes < gpus:
                # A kernel that waits for the other GPU must not meet the driver loading a module in this process.
                environment["CUDA_MODULE_LOADING"] = "EAGER"
            if processes > 1:
                environment["CROSSFUSE_TEST_PROCESS"] = f"{index} {processes} {port}"
            with self.logs[index].open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, str(self.files[index]), *cases],
                        cwd=Path(__file__).parent.parent,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        preexec_fn=_end_with_the_parent,
                    )
                )

    def wait(self, timeout_s: float) -> None:
        """Until all have ended; one that is late is killed, and its next case is the one that hung."""
        try:
            for process in self.processes:
                process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in self.processes:
                process.kill()
                process.wait()

    def result(self, case: str, process: int = 0) -> dict[str, Any]:
        lines = [json.loads(line) for line in self.files[process].read_text().splitlines()]
        for line in lines:
            if line["case"] == case:
                print(json.dumps(line, indent=1)[:6000])
                assert "error" not in line, line["error"]
                return line["result"]
        done = [line["case"] for line in lines]
        pytest.fail(
            f"{case} gave no answer (done: {done}); end of its log:\n{self.logs[process].read_text()[-6000:]}"
        )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    folder = tmp_path_factory.mktemp("gpu_jax")
    flags = f"--xla_dump_to={folder / 'dump'} --xla_dump_hlo_module_re=.*captured.*"
    cases = Cases(folder, CASES, xla_flags=flags)
    cases.wait(MAIN_TIMEOUT_S)
    return cases


@pytest.fixture(scope="module")
def ran_concurrently(ran: Cases, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    del ran  # one after another: they use the same GPUs
    flags = "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT"
    cases = Cases(tmp_path_factory.mktemp("concurrent"), ("independent_calls",), xla_flags=flags)
    cases.wait(EXTRA_TIMEOUT_S)
    return cases


@pytest.fixture(scope="module")
def ran_in_two_processes(ran_concurrently: Cases, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    del ran_concurrently
    cases = Cases(tmp_path_factory.mktemp("processes"), ("digest",), processes=2)
    cases.wait(EXTRA_TIMEOUT_S)
    return cases


@pytest.mark.parametrize(("case", "num_shapes"), [("ffi_equals_torch", 15), ("cupy_equals_torch", 3)])
def test_bitwise_equal_to_the_torch_op(ran: Cases, case: str, num_shapes: int) -> None:
    found = ran.result(case)
    # 12 token counts: two biases with two outputs and one sum, on two ranks.
    assert found["compared"] == num_shapes * 12 * 5 * 2
    assert found["different"] == [], "hidden, dtype, call, output, rank, elements, largest difference"


def test_a_thousand_executions_are_replays_of_a_graph(ran: Cases) -> None:
    found = ran.result("thousand_executions")
    for transport in ("ffi", "cupy"):
        assert found[transport]["wrong"] == 0
        # The host launches when XLA captures. Every kernel that ran without it was replayed by a CUDA graph.
        assert 0 < found[transport]["host_launches"] < found[transport]["kernels"] / 4, found[transport]


def test_independent_calls_in_one_order(ran: Cases) -> None:
    found = ran.result("independent_calls")
    assert {transport: found[transport]["wrong"] for transport in found} == {"ffi": 0, "cupy": 0}


def test_independent_calls_under_concurrent_command_buffers(ran_concurrently: Cases) -> None:
    found = ran_concurrently.result("independent_calls")
    assert {transport: found[transport]["wrong"] for transport in found} == {"ffi": 0, "cupy": 0}


def test_two_threads_that_dispatch(ran: Cases) -> None:
    assert ran.result("two_threads")["wrong"] == [0, 0]


def test_transformations(ran: Cases) -> None:
    found = ran.result("transformations")
    assert found.pop("gradient_error") < 1e-4
    assert found == {"donated": True, "vmap": True, "scan": True, "export": True, "fused_in_gradient": 1}


def test_exchange_and_own_kernels(ran: Cases) -> None:
    found = ran.result("exchange")
    assert "order the tensors as mesh.devices" in found.pop("wrong_order")
    assert found.pop("cupy_wrong") == 0
    # 100 executions of 8 kernels on the same buffers: Python runs when XLA captures, not at every step.
    assert found.pop("cupy_python_calls") < 100 * 8 / 4
    assert all(found.values()), found


def test_two_processes_get_the_same_bits(ran: Cases, ran_in_two_processes: Cases) -> None:
    alone = ran.result("digest")
    assert alone["fused"] == 8
    assert len(alone["digests"]) == 2, "hidden and residual, the same on both ranks"
    for index in range(2):
        mine = ran_in_two_processes.result("digest", index)
        assert mine["fused"] == 8, mine["reason"]
        assert mine["local_devices"] == [index]
        assert mine["digests"] == alone["digests"]


@pytest.mark.parametrize("gpus", [4, 8])
def test_more_gpus(gpus: int, ran_in_two_processes: Cases, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same bits as the torch op's, and the same from one process and from two that share the GPUs."""
    del ran_in_two_processes
    folder = tmp_path_factory.mktemp(f"gpus{gpus}")
    alone = Cases(folder, ("digest", "ffi_equals_torch"), gpus=gpus)
    alone.wait(MAIN_TIMEOUT_S)
    found = alone.result("ffi_equals_torch")
    assert found["compared"] == 15 * 12 * 5 * gpus
    assert found["different"] == [], "hidden, dtype, call, output, rank, elements, largest difference"
    digest = alone.result("digest")
    assert digest["fused"] == 8
    assert len(digest["digests"]) == 2, "hidden and residual, the same on all ranks"
    halves = Cases(tmp_path_factory.mktemp("halves"), ("digest",), gpus=gpus, processes=2)
    halves.wait(EXTRA_TIMEOUT_S)
    for index in range(2):
        mine = halves.result("digest", index)
        assert mine["fused"] == 8, mine["reason"]
        assert len(mine["local_devices"]) == gpus // 2
        assert mine["digests"] == digest["digests"]


def test_the_readme_s_example(ran: Cases) -> None:
    printed = ran.result("readme_example")["printed"]
    assert "1 fused, 0 unfused" in printed
    assert "[[2 2 2" in printed
