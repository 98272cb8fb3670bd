"""Both engines on two GPUs: the trained checkpoint in bfloat16, fused in both, and fused against unfused in each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TRAINED = Path(__file__).parent / "data" / "tiny-qwen3-next"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def test_engines_agree_on_two_gpus(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    command = [
        sys.executable, "-m", "jax_bridge", "parity", f"--model={TRAINED}", "--tp=2", "--prompts=8",
        "--with-unfused", f"--json={report_file}",
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUMPY_DTYPE_PROMOTION")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(report_file.read_text())
    assert report["passed"]
    by_engines = {tuple(e["name"] for e in c["engines"]): c for c in report["comparisons"]}
    assert len(by_engines) == 4
    counts = by_engines["torch", "jax"]["levels"][-1]["values"]
    assert counts["torch"] == counts["jax"]
    fused, unfused = counts["jax"]
    assert fused > 0
    assert unfused == 0
    for engine in ("torch", "jax"):
        assert by_engines[engine, f"{engine}, unfused"]["levels"][-1]["values"][f"{engine}, unfused"][0] == 0
