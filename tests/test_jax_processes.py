"""Two JAX processes, two virtual devices each, that agree over the coordination service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import free_port

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    """What each process saw, in the order of the processes."""
    port = free_port()
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.jax_processes", str(index), "2", str(port)],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def test_groups_within_a_process_fuse(seen: list[dict[str, Any]]) -> None:
    for mine in seen:
        assert mine["within"]["fused"] == 1
        assert mine["within"]["error"] < 1e-5
        assert mine["within"]["id"] == 0


def test_a_group_across_processes_is_unfused_on_cpu(seen: list[dict[str, Any]]) -> None:
    for mine in seen:
        assert not mine["across"]["enabled"]
        assert "lie in several processes" in mine["across"]["reason"]
        assert mine["across"]["error"] < 1e-5
    assert [mine["across"]["warned"] for mine in seen] == [1, 0], "the first process says it once"


def test_a_failure_in_one_process_stops_both(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["fails"] == seen[1]["fails"]
    assert not seen[0]["fails"]["enabled"]
    assert "out of memory" in seen[0]["fails"]["reason"]


def test_processes_that_decided_differently_do_not_fuse(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["decisions"] == seen[1]["decisions"]
    assert not seen[0]["decisions"]["enabled"]
    assert "comparing decisions" in seen[0]["decisions"]["reason"]


def test_processes_that_open_different_things_both_raise(seen: list[dict[str, Any]]) -> None:
    for mine in seen:
        assert "the processes open different communicators" in mine["arguments"]["error"]


def test_ids_are_free_in_every_process(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["ids"] == {"id": 1}
    assert seen[1]["ids"] == {"id": 1, "own": 0}
