"""The engine on GPUs: fused against unfused, CUDA graphs against eager, determinism, and memory given back."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core_torch import LLM, SamplingParams
from shared_config.results import RequestOutput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(240),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]

TINY = Path(__file__).parent / "data/tiny-qwen3-next"
PROMPTS = [
    "import os\nimport sys\n\n\ndef main(",
    "class Stack:\n    def __init__(self):",
    "def read_lines(path):",
    "for i in range(",
    "    def test_empty(self):",
    "if __name__ ==",
    "try:\n    import",
    "# Copyright",
]
# A bfloat16 run is judged by float32: it may be this much further from it than the unfused bfloat16 run is.
SLACK = 1.25


def run(
    prompts: list[str], max_tokens: int = 64, tp: int = 2, **options: Any
) -> tuple[Any, list[RequestOutput]]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, return_logits=True)
    with LLM(TINY, tp, device="cuda", **{"max_model_len": 512, **options}) as llm:
        return llm.fusion, llm.generate(prompts, params)


class Error:
    """How far bfloat16 outputs are from float32's, as long as both have chosen the same tokens."""

    def __init__(self, got: list[RequestOutput], truth: list[RequestOutput]) -> None:
        squares = norm = 0.0
        self.worst, self.partings = 0.0, []
        for a, b in zip(got, truth, strict=True):
            pairs = enumerate(zip(a.token_ids, b.token_ids, strict=True))
            end = next((i for i, (x, y) in pairs if x != y), len(b.token_ids))
            rows = min(end + 1, len(b.token_ids))  # the logits of the first difference come from equal tokens
            difference = np.stack(a.logits[:rows]) - np.stack(b.logits[:rows])
            squares += float((difference**2).sum())
            norm += float((np.stack(b.logits[:rows]) ** 2).sum())
            self.worst = max(self.worst, float(np.abs(difference).max()))
            if end < len(b.token_ids):
                best, second = np.sort(b.logits[end])[:-3:-1]
                self.partings.append(float(best - second))
        self.relative = (squares / norm) ** 0.5


def assert_as_good(
    got: list[RequestOutput], unfused: list[RequestOutput], truth: list[RequestOutput]
) -> None:
    """As close to float32 as the unfused run is; tokens part from float32's only at ties within the unfused noise."""
    mine, base = Error(got, truth), Error(unfused, truth)
    assert mine.relative <= SLACK * base.relative, (mine.relative, base.relative)
    assert all(gap <= 2 * base.worst for gap in mine.partings), (mine.partings, base.worst)


@pytest.fixture(scope="module")
def truth() -> list[RequestOutput]:
    return run(PROMPTS, tp=1, dtype="float32", cuda_graphs=False)[1]


@pytest.fixture(scope="module")
def unfused() -> list[RequestOutput]:
    decision, outputs = run(PROMPTS, fusion="off")
    assert not decision.enabled
    assert all(o.reductions.fused == 0 for o in outputs)
    return outputs


def test_fused_agrees_with_unfused_and_every_reduction_is_counted(
    unfused: list[RequestOutput], truth: list[RequestOutput]
) -> None:
    decision, outputs = run(PROMPTS, fusion="on")
    assert decision.enabled
    assert decision.backend == "trtllm"
    assert_as_good(outputs, unfused, truth)
    assert all(o.reductions.unfused == 0 for o in outputs)
    assert outputs[0].reductions.fused == 2 * 8 * 64  # 2 a layer, 8 layers, 1 prefill and 63 decode steps


def test_auto_fuses_here() -> None:
    decision, outputs = run(PROMPTS[:2], max_tokens=4)
    assert decision.enabled, decision.reason
    assert outputs[0].reductions.fused > 0


def test_two_ranks_agree_with_one(unfused: list[RequestOutput], truth: list[RequestOutput]) -> None:
    _, outputs = run(PROMPTS, tp=1)
    assert_as_good(outputs, unfused, truth)


def test_graphs_agree_with_eager(unfused: list[RequestOutput], truth: list[RequestOutput]) -> None:
    for fusion in ("on", "off"):
        _, outputs = run(PROMPTS, fusion=fusion, cuda_graphs=False)
        assert_as_good(outputs, unfused, truth)


def test_batches_above_the_limit_run_unfused_one_by_one() -> None:
    limit = 16 * 256 * 2  # 16 tokens of hidden 256 in bf16
    decision, outputs = run(["x = 1\n" * 40], max_tokens=8, fusion="on", max_fused_bytes=limit)
    assert decision.enabled
    assert outputs[0].reductions.unfused == 16  # the prefill
    assert outputs[0].reductions.fused == 16 * 7


def test_deterministic_is_never_fused_and_batch_invariant() -> None:
    """The same prompt gives the same bits alone and inside batches of 2, 8 and 32."""
    prompt, logits = PROMPTS[1], []
    filler = [PROMPTS[i % 8] + "\n" * (i % 5) for i in range(31)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, return_logits=True)
    with LLM(TINY, 2, device="cuda", deterministic=True, max_num_seqs=32, max_model_len=256) as llm:
        assert not llm.fusion.enabled
        for size, at in ((1, 0), (2, 1), (8, 3), (32, 17)):
            batch = filler[: size - 1]
            batch.insert(at, prompt)
            output = llm.generate(batch, params)[at]
            assert output.reductions.fused == 0
            logits.append(np.stack(output.logits))
    for other in logits[1:]:
        assert np.array_equal(logits[0], other)


def used_mib() -> list[int]:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(x) for x in subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()]


def test_memory_is_back_after_close() -> None:
    run(PROMPTS[:1], max_tokens=2)
    before = used_mib()
    run(PROMPTS[:1], max_tokens=2)
    assert max(abs(a - b) for a, b in zip(used_mib(), before, strict=True)) <= 16
