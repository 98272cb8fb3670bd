"""The benchmark end to end on CPU: real ranks, virtual devices, files; and parts that fail."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import launch
from bench.__main__ import main
from bench.launch import PartError, run_part
from bench.result import Result

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "data" / "tiny-qwen3-next"


def test_ranks_answer_for_rank_0() -> None:
    answer = run_part("tests.bench_cases", {"rank_1": "answers"}, world_size=2, timeout_s=60)
    assert answer == {"rank": "0", "world_size": "2", "given": {"rank_1": "answers"}}


@pytest.mark.parametrize(
    ("rank_1", "timeout_s", "message"),
    [
        ("raises", 60, "rank 1: Traceback(.|\n)*ValueError: no such model"),
        ("dies", 60, "rank 1: was killed by signal 9"),
        ("hangs", 4, r"ranks \[0, 1\] gave no answer in 4 s"),
    ],
)
def test_a_rank_that_fails_ends_the_part_and_says_why(
    rank_1: str, timeout_s: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.5)
    start = time.monotonic()
    with pytest.raises(PartError, match=message):
        run_part("tests.bench_cases", {"rank_1": rank_1}, world_size=2, timeout_s=timeout_s)
    assert time.monotonic() - start < 30


def test_sigterm_ends_the_ranks_too(tmp_path: Path) -> None:
    program = (
        "from bench.launch import run_part\nfrom shared_config import cli\ncli.end_on_sigterm()\n"
        "run_part('tests.bench_cases', {'rank_1': 'hangs', 'folder': %r}, world_size=2, timeout_s=60)"
    )
    with subprocess.Popen([sys.executable, "-c", program % str(tmp_path)], cwd=ROOT) as process:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        ranks = [int(file.name) for file in tmp_path.iterdir()]
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
    assert len(ranks) == 2
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def two_layer_model(folder: Path) -> Path:
    """A config without weights: one layer of each kind of the tiny checkpoint."""
    config = json.loads((TINY / "config.json").read_text())
    config |= {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "vocab_size": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.timeout(300)
def test_everything_on_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out"
    grid = ["--batches", "2", "--lengths", "9", "--decode-steps", "2", "--repeats", "2", "--chunk", "32"]
    model = ["--model", str(two_layer_model(tmp_path)), "--load-format", "dummy", "--dtype", "float32"]
    done = bench(
        "all", "--device", "cpu", "--tokens", "1,3", "--hidden", "64", *model, *grid, "--out", str(out)
    )
    assert done.returncode == 0, done.stderr

    loaded = Result.load(out / "result.json")
    assert loaded.machine.label.startswith("CPU")
    assert {(row.framework, row.method) for row in loaded.op} == {
        ("torch", "fused"), ("torch", "unfused"), ("torch", "allreduce"), ("jax", "fused_ffi"), ("jax", "psum_norm"),
    }  # fmt: skip
    for row in loaded.op:
        assert (row.fused > 0) == row.method.startswith("fused")
        assert row.max_error < 2e-5
    cells = {(row.framework, row.phase, row.fusion): row for row in loaded.model}
    assert cells.keys() == {
        *itertools.product(("torch", "jax"), ("prefill", "decode"), ("on", "off")),
        *itertools.product(("transformers",), ("prefill", "decode"), ("none",)),
    }
    for (framework, phase, mode), row in cells.items():
        reductions = (
            2 * 2 * {"prefill": 1, "decode": 2}[phase]
        )  # two a layer, two layers, one pass or two steps
        assert row.fused == (reductions if mode == "on" else 0)
        assert row.unfused == (reductions if mode == "off" else 0)
        assert row.floor_us
        assert row.floor_us > 0
        assert 4 <= row.distinct_experts <= 16
        if framework == "torch":
            assert row.communication_share
            assert 0 < row.communication_share < 1
    assert set(loaded.decisions) == {"torch op", "jax op", "torch model", "jax model"}
    assert all(decision.enabled for decision in loaded.decisions.values())
    alone, pair, kernels, memory, jax_kernels = loaded.notes
    assert alone.startswith("kernels plain: add_norm, few_rows, ")
    assert pair.startswith("two ranks: kernels plain: ")
    assert jax_kernels.startswith("jax: kernels plain: add_norm, ")
    assert kernels.startswith("torch: kernels plain: ")
    assert memory.startswith("torch: memory of rank 0: weights")

    assert loaded.kernel_spec is not None
    names = {row.kernel.split(":")[0] for row in loaded.kernels}
    assert names == {
        "add_norm", "combine + pair_allreduce", "few_rows", "flash_prefill", "gdn_decode", "gdn_prefill", "moe_decode",
        "moe_prefill", "norm_rope", "paged_decode", "pair_allreduce", "vocabulary",
    }  # fmt: skip
    assert {(row.num_tokens, row.length) for row in loaded.kernels if row.kernel == "gdn_prefill"} == {
        (9, 9),
        (27, 9),
    }
    for row in loaded.kernels:
        assert row.timing is None, "nothing is compiled for a CPU"
        rates = loaded.machine.rates
        floor_s = max(row.memory_bytes / rates.memory_bytes_per_s, row.flops / rates.flops_per_s)
        assert row.floor_us == pytest.approx(1e6 * floor_s)  # a CPU's cache may well be faster

    assert {file.name for file in out.iterdir()} == {"result.json", "op.png", "prefill.png", "decode.png"}
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["op_fused_us_by_tokens"].keys() == {"1", "3"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "--preset", "80b", "--model", "x"], "give --model or --preset"),
        (["kernels", "--preset", "80b", "--model", "x"], "give --model or --preset"),
        (["kernels", "--model", "nowhere"], "no model config at nowhere"),
        (["model", "--preset", "80b", "--load-format", "safetensors"], "shapes only"),
        (["model", "--model", "nowhere"], "no model config at nowhere"),
        (["model", "--model", str(TINY), "--layers", "2"], "--layers cuts a preset"),
        (["op", "--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--tokens", "0"], ["--tokens", "a"], ["--frameworks", "numpy"]])
def test_arguments_that_are_nothing_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["op", *arguments])
