"""`LLM` from outside: worker ranks, streaming, errors that end a run, and the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core_torch import LLM, SamplingParams
from core_torch.worker import RankFailure
from shared_config import FusionError
from tests.reference import make_model, save_model

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests/data/tiny-qwen3-next"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("base"), tmp_path_factory.mktemp("llm"), packed=True)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, tensor_parallel_size=2, max_model_len=128, num_pages=40) as llm:
        yield llm


def test_two_workers_give_what_one_rank_gives(llm: LLM, folder: Path) -> None:
    prompts = [[3, 4, 5, 6], [9] * 33]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(folder) as alone:
        want = alone.generate(prompts, params)
        assert want[0].reductions.fused == want[0].reductions.unfused == 0  # one rank owes nothing
    got = llm.generate(prompts, params)
    assert [o.token_ids for o in got] == [o.token_ids for o in want]
    assert got[0].reductions.unfused == got[1].reductions.unfused == 2 * 4 * 8
    assert not llm.fusion.enabled
    assert llm.fusion.reason


def test_stream_grows_and_ends_as_the_list_does(llm: LLM) -> None:
    params = SamplingParams(temperature=0.8, seed=11, max_tokens=6, ignore_eos=True)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for output in llm.generate([[1, 2, 3], [4, 5]], params, stream=True):
        assert output.token_ids[:-1] == seen[output.index]
        seen[output.index] = output.token_ids
    assert list(seen.values()) == [o.token_ids for o in llm.generate([[1, 2, 3], [4, 5]], params)]


def test_an_abandoned_stream_leaves_the_ranks_usable(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for _ in llm.generate([[1, 2, 3]], params, stream=True):
        break
    assert len(llm.generate([[1, 2, 3]], params)[0].token_ids) == 20


def test_seeds_decide_samples_whatever_runs_beside(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, top_k=20, top_p=0.9, seed=5, max_tokens=10, ignore_eos=True)
    alone = llm.generate([[7, 8, 9]], params)[0].token_ids
    beside = llm.generate([[1] * 20, [7, 8, 9], [2, 3]], params)[1].token_ids
    other = llm.generate([[7, 8, 9]], SamplingParams(temperature=1.0, seed=6, max_tokens=10, ignore_eos=True))
    assert alone == beside
    assert alone != other[0].token_ids
    unseeded = SamplingParams(temperature=1.0, max_tokens=10, ignore_eos=True)
    assert len({tuple(o.token_ids) for o in llm.generate([[7, 8, 9]] * 4, unseeded)}) > 1


def test_an_impossible_request_is_refused_and_the_others_go_on(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (4, 120, 4)]
    outputs = llm.generate([[1, 2], [3] * 30, [5]], params)
    assert [o.finish_reason for o in outputs] == ["length", "refused", "length"]
    assert "max_model_len = 128" in (outputs[1].error or "")


@pytest.mark.parametrize(
    ("prompts", "params", "match"),
    [
        ([[1, 999]], SamplingParams(), "token id 999, outside the vocabulary of 131"),
        ("text", SamplingParams(), "has no tokenizer.json"),
        ([[1], [2]], [SamplingParams()], "1 entries for 2 prompts"),
    ],
)
def test_bad_prompts_are_named(llm: LLM, prompts: object, params: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        llm.generate(prompts, params)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tensor_parallel_size": 3}, "3"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"device": "tpu"}, "device must be"),
        ({"page_size": 0}, "page_size must be at least 1"),
        ({"fusion": "maybe"}, "maybe"),
    ],
)
def test_bad_arguments_are_named(folder: Path, options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LLM(folder, **options)  # type: ignore[arg-type]


def test_demanded_fusion_that_cannot_be_had_is_an_error(folder: Path) -> None:
    with pytest.raises(FusionError, match="compute capability|GPU|flashinfer"):
        LLM(folder, tensor_parallel_size=2, fusion="on", device="cpu")


@pytest.mark.parametrize("during", ["idle", "generating"])
def test_a_killed_rank_ends_the_run_with_its_name(folder: Path, during: str) -> None:
    llm = LLM(folder, tensor_parallel_size=2, max_model_len=512)
    try:
        assert llm._workers is not None
        victim = llm._workers.pids[1]
        params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
        start = 0.0
        with pytest.raises(RankFailure, match=rf"rank 1 \(pid {victim}\) was killed by signal 9"):
            if during == "idle":
                os.kill(victim, signal.SIGKILL)
                time.sleep(0.2)
            for step, _ in enumerate(llm.generate([[1, 2, 3]], params, stream=True)):
                if step == 3:
                    os.kill(victim, signal.SIGKILL)
                start = start or time.monotonic()
        assert not start or time.monotonic() - start < 20
        with pytest.raises(RuntimeError, match="closed"):
            llm.generate([[1]], params)
    finally:
        llm.close()


def run(*command: str, timeout: int = 120) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_generate_command() -> None:
    done = run(
        "-m",
        "core_torch",
        "generate",
        "--model",
        str(TINY),
        "--tp",
        "2",
        "--max-tokens",
        "8",
        "--prompt",
        "def ",
    )
    assert done.returncode == 0, done.stderr
    assert "fusion: off (" in done.stdout
    assert "reductions: 0 fused, 128 unfused" in done.stdout  # 8 layers, 2 each, 8 steps
    assert "tokens/s over 2 rank(s)" in done.stdout


def test_generate_command_says_what_is_wrong(tmp_path: Path) -> None:
    done = run("-m", "core_torch", "generate", "--model", str(tmp_path), "--prompt", "x")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_under_torchrun_each_process_is_a_rank(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import os\n"
        "from core_torch import LLM, SamplingParams\n"
        f"with LLM({str(folder)!r}, tensor_parallel_size=2, device='cpu') as llm:\n"
        "    out = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=5, ignore_eos=True))[0]\n"
        f"with open({str(tmp_path)!r} + '/rank' + os.environ['RANK'], 'w') as file:\n"
        "    print(out.token_ids, file=file)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
    assert done.returncode == 0, done.stderr
    ranks = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert len(ranks[0].split(",")) == 5
