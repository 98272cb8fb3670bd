"""The example of `jax_bridge`'s docstring, which the README shows too, as a user would run it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import jax_bridge

pytestmark = pytest.mark.timeout(120)


def example() -> str:
    """The first indented block."""
    blocks = (jax_bridge.__doc__ or "").split("\n\n")
    return textwrap.dedent(next(block for block in blocks if block.startswith("    ")))


def test_the_readme_shows_it() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert textwrap.indent(example(), "    ") in readme


def test_it_is_short() -> None:
    assert len(example().splitlines()) <= 12


@pytest.mark.parametrize("num_devices", [1, 2])
def test_it_runs_on_a_machine_without_a_gpu(num_devices: int, tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(example())
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
    }
    done = subprocess.run(
        [sys.executable, str(file)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert f"0 fused, {num_devices - 1} unfused" in done.stdout
    # partial sums of ones: the norm is 1, and the weight of ones scales it by 1 + 1
    assert "[[2 2 2" in done.stdout
