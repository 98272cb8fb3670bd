"""The parity suite: both engines are equal on the trained checkpoint, and planted faults are found where they are."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from core_torch.session import SessionSpec as TorchSpec
from core_torch.session import open_session as open_torch
from core_torch.trace import make_record as record_torch
from jax_bridge import LLM, SamplingParams
from jax_bridge.layers import norm
from jax_bridge.parity.compare import Comparison, compare, ulps
from jax_bridge.parity.run import prompt_texts
from jax_bridge.parity.tolerances import TOLERANCES
from jax_bridge.trace import make_record as record_jax
from shared_config import FusionRequest, ParallelLayout, Qwen3NextConfig
from shared_config.generation import load_tokenizer
from shared_config.results import Reductions
from shared_config.settings import EngineSettings
from shared_config.trace import Record, TraceJob
from tests.faults import EXPECTED, jax_fault, torch_fault
from tests.reference import CONFIGS, FULL, LINEAR, make_model, save_model

TRAINED = Path(__file__).parent / "data" / "tiny-qwen3-next"
CHUNK = 32
WHOLE = 1024  # prompts in one piece, side by side: one program to compile


def torch_record(folder: str, job: TraceJob, dtype: str, fault: str | None, chunk: int = CHUNK) -> Record:
    """Runs on every rank of a pool, or here alone."""
    spec = TorchSpec(
        Qwen3NextConfig.from_hf(folder),
        ParallelLayout(tp_size=int(os.environ.get("WORLD_SIZE", "1"))),
        FusionRequest(),
        EngineSettings(folder, dtype=dtype, max_step_tokens=chunk, max_model_len=512),
        "cpu",
        str(tokenizer) if (tokenizer := Path(folder, "tokenizer.json")).exists() else None,
    )
    with open_torch(spec, local_rank=0) as session:
        planted = torch_fault(fault, session.runner) if fault else contextlib.nullcontext()
        with planted:
            return record_torch(session, job)


def open_jax(folder: Path, tp: int, dtype: str, chunk: int = CHUNK) -> LLM:
    return LLM(folder, tp, dtype=dtype, device="cpu", max_step_tokens=chunk, max_model_len=512)


def jax_record(llm: LLM, job: TraceJob, fault: str | None = None) -> Record:
    assert llm._session is not None
    with jax_fault(fault, llm._session.runner) if fault else contextlib.nullcontext():
        return record_jax(llm._session, job)


def failure(comparison: Comparison) -> tuple[str, str] | None:
    return None if comparison.failed is None else (comparison.failed.level, comparison.failed.where)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with one layer of each kind."""
    options = {"layer_types": [LINEAR, FULL], "num_hidden_layers": 2}
    with mock.patch.dict(CONFIGS, {"two_layers": options}):
        return save_model(make_model("two_layers"), tmp_path_factory.mktemp("two_layers"), packed=True)


FAULT_JOB = TraceJob(
    prompts=[np.random.default_rng(0).integers(1, 131, 2 * CHUNK).tolist()],
    forced_tokens=3,
    continuations=[[5, 6, 7]],
    op_tokens=(67,),
)


@pytest.fixture(scope="module")
def jax_engine(two_layers: Path) -> Any:
    with open_jax(two_layers, 2, "float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def sound(jax_engine: LLM, two_layers: Path, _pools: Any) -> dict[str, Record]:
    """Both engines' records of the fault job, without a fault."""
    del _pools
    return {"jax": jax_record(jax_engine, FAULT_JOB)}


@pytest.fixture
def sound_torch(sound: dict[str, Record], two_layers: Path, ranks: Any) -> Record:
    if "torch" not in sound:
        sound["torch"] = ranks(2).run(torch_record, str(two_layers), FAULT_JOB, "float32", None)[0]
    return sound["torch"]


def test_sound_engines_agree(sound: dict[str, Record], sound_torch: Record) -> None:
    comparison = compare(sound_torch, sound["jax"])
    assert failure(comparison) is None
    assert [level.level for level in comparison.levels] == ["op", "layer", "logits"]
    assert len(sound_torch.rows) == 2 * CHUNK + 3
    assert list(sound_torch.points) == [
        "embedding", "layers.0.mixer", "layers.0.mlp", "layers.1.mixer", "layers.1.mlp", "logits",
    ]  # fmt: skip


@pytest.mark.parametrize("fault", EXPECTED)
def test_fault_in_torch_is_found(fault: str, sound: dict[str, Record], two_layers: Path, ranks: Any) -> None:
    faulty = ranks(2).run(torch_record, str(two_layers), FAULT_JOB, "float32", fault)[0]
    check_found(fault, compare(faulty, sound["jax"]))


@pytest.mark.parametrize("fault", EXPECTED)
def test_fault_in_jax_is_found(fault: str, jax_engine: LLM, sound_torch: Record) -> None:
    check_found(fault, compare(sound_torch, jax_record(jax_engine, FAULT_JOB, fault)))


def check_found(fault: str, comparison: Comparison) -> None:
    found, expected = failure(comparison), EXPECTED[fault]
    assert found is not None
    assert found[0] == expected.level
    assert expected.where in found[1]
    if fault == "off-by-one cache position":
        assert (
            f"position {2 * CHUNK} (decode)" in found[1]
        )  # the first token that was written by a decode step


def test_a_part_is_no_sum(jax_engine: LLM) -> None:
    """In JAX a reduction that is left out does not even trace: a part's type says that it differs between ranks."""

    def unreduced(partial: Any, residual: Any, weight: Any, **_: Any) -> tuple[Any, Any]:
        return residual + partial, residual + partial * weight

    with (
        mock.patch.object(norm, "allreduce_residual_rmsnorm", unreduced),
        pytest.raises(ValueError, match="out_specs"),
    ):
        jax_record(jax_engine, dataclasses.replace(FAULT_JOB, op_tokens=()))


def changed(record: Record, **values: Any) -> Record:
    return dataclasses.replace(record, **values)


def test_each_level_fails_by_itself(trained: dict[str, Record]) -> None:
    """Numbers of one level are changed in a record; that level fails, and none before it."""
    right = trained["torch"]
    logits = right.points["logits"].copy()
    logits[7, 3] += 0.01 * np.abs(logits[7]).max()
    wrong = compare(right, changed(right, points=right.points | {"logits": logits}))
    assert failure(wrong) == ("logits", "error 0.01 at " + place(right, 7))

    first = right.greedy[2]
    tokens = list(first.token_ids)
    tokens[4] = int(first.best_ids[4, 7])
    parted = changed(
        right, greedy=[*right.greedy[:2], dataclasses.replace(first, token_ids=tokens), *right.greedy[3:]]
    )
    found = failure(compare(right, parted))
    assert found is not None
    assert found[0] == "greedy"
    assert found[1].startswith("prompt 2 differs from token 4 on")

    best = first.best_logits.copy()
    best[4, 7] = best[4, 0]  # now the two are a tie
    tied = changed(
        right, greedy=[*right.greedy[:2], dataclasses.replace(first, best_logits=best), *right.greedy[3:]]
    )
    tie = compare(tied, parted)
    assert failure(tie) is None
    assert next(level for level in tie.levels if level.level == "greedy").summary.endswith("1 part at a tie")

    counted = dataclasses.replace(first, reductions=Reductions(unfused=1))
    found = failure(compare(right, changed(right, greedy=[*right.greedy[:2], counted, *right.greedy[3:]])))
    assert found is not None
    assert found[0] == "counts"

    for bad in (np.nan, np.inf):
        rows = right.points["layers.0.mlp"].copy()
        rows[1, 0] = bad
        found = failure(compare(right, changed(right, points=right.points | {"layers.0.mlp": rows})))
        assert found is not None
        assert found[0] == "layer"
        assert place(right, 1) in found[1]


def place(record: Record, row: int) -> str:
    prompt, position, is_decode = record.rows[row].tolist()
    return f"prompt {prompt}, position {position} ({'decode' if is_decode else 'prefill'})"


def test_records_of_other_jobs_are_refused(sound: dict[str, Record], sound_torch: Record) -> None:
    with pytest.raises(ValueError, match="different jobs"):
        compare(sound_torch, changed(sound["jax"], rows=sound["jax"].rows[:-1]))
    with pytest.raises(ValueError, match="compare equal dtypes"):
        compare(sound_torch, changed(sound["jax"], dtype="bfloat16"))


def test_ulps_are_those_of_the_row() -> None:
    want = np.array([[1.0, 1.0, 1.0, 1e-6]], np.float32)
    got = want + np.array([[2.0**-23, 2.0**-22, 0, 2.0**-24]], np.float32)
    assert np.allclose(ulps(got, want, "float32"), [[1, 2, 0, 1]], atol=0.01)
    assert np.allclose(ulps(want + 2**-7, want, "bfloat16"), [[1, 1, 1, 2]], atol=0.01)


@pytest.fixture(scope="module")
def trained_prompts() -> list[list[int]]:
    tokenizer: Any = load_tokenizer(str(TRAINED / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in prompt_texts(8)]


@pytest.fixture(scope="module")
def trained(trained_prompts: list[list[int]]) -> dict[str, Record]:
    """PyTorch's record of the trained checkpoint in float32 on one rank."""
    job = TraceJob(trained_prompts, max_tokens=128, forced_tokens=2, op_tokens=(67,))
    return {"torch": torch_record(str(TRAINED), job, "float32", None, WHOLE)}


@pytest.mark.parametrize("tp", [1, 2])
def test_trained_checkpoint_continues_alike(
    tp: int, trained: dict[str, Record], trained_prompts: list[list[int]]
) -> None:
    """Eight prompts, 128 greedy tokens each: the same tokens in PyTorch and in JAX."""
    params = SamplingParams(temperature=0, max_tokens=128, ignore_eos=True)
    with open_jax(TRAINED, tp, "float32", WHOLE) as llm:
        outputs = llm.generate(trained_prompts, params)
    assert [o.token_ids for o in outputs] == [greedy.token_ids for greedy in trained["torch"].greedy]
    assert [o.text for o in outputs] == [greedy.text for greedy in trained["torch"].greedy]


def test_bfloat16_is_within_the_table(trained_prompts: list[list[int]], ranks: Any) -> None:
    """Every level, on the trained checkpoint over two ranks."""
    job = TraceJob(trained_prompts[:4], max_tokens=12, forced_tokens=6, op_tokens=(67,))
    left = ranks(2).run(torch_record, str(TRAINED), job, "bfloat16", None, WHOLE, timeout=120)[0]
    job = dataclasses.replace(job, continuations=[greedy.token_ids for greedy in left.greedy])
    with open_jax(TRAINED, 2, "bfloat16", WHOLE) as llm:
        comparison = compare(left, jax_record(llm, job))
    assert failure(comparison) is None
    assert [level.level for level in comparison.levels] == ["op", "layer", "logits", "greedy", "counts"]
    float32 = compare(changed(left, dtype="float32"), changed(comparison.right, dtype="float32"))
    assert float32.failed is not None  # the table tells the dtypes apart


def test_every_limit_has_a_reason() -> None:
    for tolerance in TOLERANCES.values():
        for limit in dataclasses.asdict(tolerance).values():
            assert limit["value"] > 0
            assert len(limit["why"]) > 10


def test_command_reports_and_exits(two_layers: Path, tmp_path: Path) -> None:
    """The whole command: PyTorch's ranks in their own processes, then JAX, a report, a plot, exit 0."""
    command = [
        sys.executable, "-m", "jax_bridge", "parity", f"--model={two_layers}", "--tp=2", "--device=cpu",
        "--backend=reference", "--prompts=2", "--max-tokens=3", "--forced-tokens=2",
        f"--json={tmp_path / 'report.json'}", f"--plot={tmp_path / 'report.png'}",
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "parity of torch and jax: equal within tolerance" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"]
    (comparison,) = report["comparisons"]
    assert [engine["fused"] for engine in comparison["engines"]] == [True, True]
    assert [level["level"] for level in comparison["levels"]] == ["op", "layer", "logits", "greedy", "counts"]
    assert comparison["levels"][-1]["values"]["torch"] == comparison["levels"][-1]["values"]["jax"]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
