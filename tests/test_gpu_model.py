"""The engine on GPUs: fused against unfused, CUDA graphs against eager, determinism, and memory given back."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from core_torch import LLM, SamplingParams
from core_torch.kernels.workspace import Workspace
from core_torch.session import Session, SessionSpec, open_session
from shared_config import FusionDecision, FusionRequest, ParallelLayout, Qwen3NextConfig
from shared_config.generation import Request
from shared_config.results import RequestOutput
from shared_config.settings import EngineSettings
from tests.ranks import RankPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(240),
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
Outputs = list[RequestOutput]
# A bfloat16 run is judged by float32: it may be this much further from it than the unfused bfloat16 run is.
SLACK = 1.25
TIE = 6  # RMS errors between two logits that count as a tie: each may be off by about three


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Two ranks that serve all tests of this file: starting processes is most of a run's time."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    pool = RankPool(2, backend="nccl")
    yield pool
    pool.close()


def make_spec(request: FusionRequest, shared_size: int | None = None, **options: Any) -> SessionSpec:
    """The trained checkpoint, or with `shared_size` random weights and a shared expert of that size."""
    config, tokenizer = Qwen3NextConfig.from_hf(TINY), str(TINY / "tokenizer.json")
    if shared_size is not None:
        config = replace(config, shared_expert_intermediate_size=shared_size)
        options["load_format"] = "dummy"
    settings = EngineSettings(
        str(TINY), deterministic=request.deterministic, **{"max_model_len": 512, **options}
    )
    return SessionSpec(config, ParallelLayout(tp_size=2), request, settings, "cuda", tokenizer)


def generate(session: Session, prompts: list[str], max_tokens: int) -> Outputs:
    assert isinstance(session.tokenizer, Tokenizer)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, return_logits=True)
    requests = [Request(i, p, session.tokenizer.encode(p).ids, params, 0) for i, p in enumerate(prompts)]
    final = {o.index: o for outputs in session.generate(requests) for o in outputs}
    return [final[i] for i in range(len(prompts))]


def on_rank(spec: SessionSpec, prompts: list[str], max_tokens: int) -> tuple[FusionDecision, Outputs]:
    """On every rank of the pool: open a session, generate, close it."""
    with open_session(spec, dist.get_rank()) as session:
        return session.decision, generate(session, prompts, max_tokens)


def counting_choices(spec: SessionSpec, prompts: list[str]) -> tuple[FusionDecision, Outputs, int]:
    """`on_rank` for one token of each prompt, and how many reductions added a token's choices."""
    adding = Workspace.run_choices
    with mock.patch.object(Workspace, "run_choices", autospec=True, side_effect=adding) as spied:
        return *on_rank(spec, prompts, 1), spied.call_count


def run(
    pool: RankPool, prompts: list[str], request: FusionRequest, max_tokens: int = 64, **options: Any
) -> tuple[FusionDecision, Outputs]:
    """Rank 0's decision and outputs."""
    return pool.run(on_rank, make_spec(request, **options), prompts, max_tokens, timeout=90)[0]


class Error:
    """How far bfloat16 outputs are from float32's, as long as both have chosen the same tokens."""

    def __init__(self, got: list[RequestOutput], truth: list[RequestOutput]) -> None:
        squares = norm = 0.0
        count = 0
        self.partings: list[float] = []
        for a, b in zip(got, truth, strict=True):
            pairs = enumerate(zip(a.token_ids, b.token_ids, strict=True))
            end = next((i for i, (x, y) in pairs if x != y), len(b.token_ids))
            rows = min(end + 1, len(b.token_ids))  # the logits of the first difference come from equal tokens
            difference = np.stack(a.logits[:rows]) - np.stack(b.logits[:rows])
            squares += float((difference**2).sum())
            norm += float((np.stack(b.logits[:rows]) ** 2).sum())
            count += difference.size
            if end < len(b.token_ids):
                best, second = np.sort(b.logits[end])[:-3:-1]
                self.partings.append(float(best - second))
        self.rms = (squares / count) ** 0.5
        self.relative = (squares / norm) ** 0.5


def assert_as_good(
    got: list[RequestOutput], unfused: list[RequestOutput], truth: list[RequestOutput]
) -> None:
    """As close to float32 as the unfused run is; tokens part from float32's only where its two best logits are within
    a few RMS errors of the unfused run."""
    mine, base = Error(got, truth), Error(unfused, truth)
    assert mine.relative <= SLACK * base.relative, (mine.relative, base.relative)
    assert all(gap <= TIE * base.rms for gap in mine.partings), (mine.partings, base.rms)


@pytest.fixture(scope="module")
def truth(pool: RankPool) -> Outputs:
    return run(pool, PROMPTS, FusionRequest(mode="off"), dtype="float32", cuda_graphs=False)[1]


@pytest.fixture(scope="module")
def unfused(pool: RankPool) -> Outputs:
    decision, outputs = run(pool, PROMPTS, FusionRequest(mode="off"))
    assert not decision.enabled
    assert all(o.reductions.fused == 0 for o in outputs)
    return outputs


def test_batches_above_the_limit_run_unfused_one_by_one(pool: RankPool) -> None:
    request = FusionRequest(mode="on", max_bytes=16 * 256 * 2)  # 16 tokens of hidden 256 in bf16
    decision, outputs = run(pool, ["x = 1\n" * 40], request, max_tokens=8)
    assert decision.enabled
    assert outputs[0].reductions.unfused == 16  # the prefill
    assert outputs[0].reductions.fused == 16 * 7


@pytest.mark.parametrize("shared_size", [None, 32], ids=["apart", "among the routed"])
def test_a_pass_of_long_calls_has_the_unfused_bits(pool: RankPool, shared_size: int | None) -> None:
    """They run in `pair_allreduce`, whose bits are those of NCCL's sum with `add_norm` after it. A shared expert of the
    routed ones' size is one of a token's choices, which are then added in the same kernel."""
    lines = "x = 1\n" * 150
    prompts = [f"{i} = {i}\n{lines}" for i in range(12)]
    options = {"max_step_tokens": 8192, "max_model_len": 1024, "max_num_seqs": 12, "shared_size": shared_size}
    spec = make_spec(FusionRequest(mode="on"), **options)
    decision, outputs, calls_with_choices = pool.run(counting_choices, spec, prompts, timeout=90)[0]
    assert calls_with_choices == (0 if shared_size is None else 8)  # one a layer
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    assert decision.max_backend_tokens(2) < tokens <= 8192, decision.pair.source
    assert all(
        (o.reductions.fused, o.reductions.unfused) == (2 * 8, 0) for o in outputs
    )  # one pass, 8 layers
    _, want = run(pool, prompts, FusionRequest(mode="off"), max_tokens=1, **options)
    for mine, plain in zip(outputs, want, strict=True):
        assert np.array_equal(mine.logits[0], plain.logits[0])


def test_fused_agrees_with_unfused_and_every_reduction_is_counted(
    pool: RankPool, unfused: Outputs, truth: Outputs
) -> None:
    decision, outputs = run(pool, PROMPTS, FusionRequest(mode="on"))
    assert decision.enabled
    assert decision.backend == "trtllm"
    assert_as_good(outputs, unfused, truth)
    assert all(o.reductions.unfused == 0 for o in outputs)
    assert outputs[0].reductions.fused == 2 * 8 * 64  # 2 a layer, 8 layers, 1 prefill and 63 decode steps


def test_auto_fuses_here(pool: RankPool) -> None:
    decision, outputs = run(pool, PROMPTS[:2], FusionRequest(), max_tokens=4)
    assert decision.enabled, decision.reason
    assert outputs[0].reductions.fused > 0


@pytest.mark.parametrize("mode", ["on", "off"])
def test_graphs_agree_with_eager(mode: str, pool: RankPool, unfused: Outputs, truth: Outputs) -> None:
    _, outputs = run(pool, PROMPTS, FusionRequest(mode=mode), cuda_graphs=False)
    assert_as_good(outputs, unfused, truth)


def logits_in_batches(spec: SessionSpec, prompt: str, sizes: dict[int, int]) -> list[bytes]:
    """On every rank: the bytes of `prompt`'s logits in batches of each size, at its given place."""
    filler = [PROMPTS[i % 8] + "\n" * (i % 5) for i in range(31)]
    found = []
    with open_session(spec, dist.get_rank()) as session:
        assert not session.decision.enabled
        for size, at in sizes.items():
            texts = filler[: size - 1]
            texts.insert(at, prompt)
            output = generate(session, texts, max_tokens=24)[at]
            assert output.reductions.fused == 0
            found.append(np.stack(output.logits).tobytes())
    return found


def test_deterministic_is_never_fused_and_batch_invariant(pool: RankPool) -> None:
    """The same prompt gives the same bits alone and inside batches of 2, 8 and 32, on both ranks."""
    spec = make_spec(FusionRequest(deterministic=True), max_num_seqs=32, max_model_len=256)
    by_rank = pool.run(logits_in_batches, spec, PROMPTS[1], {1: 0, 2: 1, 8: 3, 32: 17}, timeout=90)
    assert len({found for rank in by_rank for found in rank}) == 1


def generate_alone(prompts: list[str], max_tokens: int = 64, **options: Any) -> Outputs:
    """On one GPU, in this process."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, return_logits=True)
    with LLM(TINY, device="cuda", **{"max_model_len": 512, **options}) as llm:
        return llm.generate(prompts, params)


def test_graphs_read_nothing_that_was_freed() -> None:
    """A long prefill after the capture takes whatever memory is free; what a graph reads must not be among it."""
    prompts = ["x = 1\n" * 40, *PROMPTS]
    truth = generate_alone(prompts, dtype="float32", cuda_graphs=False)
    eager = generate_alone(prompts, cuda_graphs=False)
    assert_as_good(generate_alone(prompts), eager, truth)


def test_long_prompts_are_as_good_in_kernels_as_in_plain_torch() -> None:
    """Passes of 400 tokens: several sequences in one, and sequences that go on from an earlier pass."""
    lines = ["x = 1\n", "for i in range(10):\n    print(i)\n", "import os\n"]
    prompts = [line * count for line, count in zip(lines, (150, 40, 90), strict=True)]
    options = {"max_step_tokens": 400, "max_model_len": 1024, "max_tokens": 8}
    truth = generate_alone(prompts, dtype="float32", kernels="plain", cuda_graphs=False, **options)
    plain = generate_alone(prompts, kernels="plain", **options)
    assert_as_good(generate_alone(prompts, **options), plain, truth)


def test_compiled_kernels_are_as_good_as_plain_ones() -> None:
    truth = generate_alone(PROMPTS, dtype="float32", cuda_graphs=False)
    plain = generate_alone(PROMPTS, kernels="plain", cuda_graphs=False)
    with LLM(TINY, device="cuda", max_model_len=512) as llm:
        assert all(answer.usable for answer in llm.kernels.values()), llm.kernels
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, return_logits=True)
        assert_as_good(llm.generate(PROMPTS, params), plain, truth)


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_queued_ahead_choose_the_same_tokens(ranks: int) -> None:
    """With logits a step waits for the one before it and gathers them; without, its tokens stay on the device and the
    next step is queued. Requests of different lengths join and leave."""
    if torch.cuda.device_count() < ranks:
        pytest.skip("needs two CUDA GPUs")
    lengths = [64, 3, 17, 40, 1, 64, 25, 9]
    with LLM(TINY, ranks, device="cuda", max_model_len=512, max_num_seqs=6) as llm:
        waiting, queued = (
            llm.generate(
                PROMPTS,
                [
                    SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, return_logits=w)
                    for n in lengths
                ],
            )
            for w in (True, False)
        )
        ended = llm.generate(
            PROMPTS, SamplingParams(temperature=0, max_tokens=200)
        )  # by what they say, if at all
    assert [o.token_ids for o in queued] == [o.token_ids for o in waiting]
    assert [o.reductions for o in queued] == [o.reductions for o in waiting]
    assert [len(o.token_ids) for o in queued] == lengths
    for output in ended:
        assert output.finish_reason == ("length" if len(output.token_ids) == 200 else "stop")


def test_one_gpu_is_deterministic_too() -> None:
    """The same bits in batches of 1, 2, 8 and 32, with CUDA graphs."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, return_logits=True)
    filler = [PROMPTS[i % 8] + "\n" * (i % 5) for i in range(31)]
    found = set()
    with LLM(TINY, device="cuda", deterministic=True, max_num_seqs=32, max_model_len=256) as llm:
        for size, at in {1: 0, 2: 1, 8: 3, 32: 17}.items():
            texts = filler[: size - 1]
            texts.insert(at, PROMPTS[1])
            found.add(np.stack(llm.generate(texts, params)[at].logits).tobytes())
    assert len(found) == 1


def used_mib() -> list[int]:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(x) for x in subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()]


def test_two_worker_ranks_agree_with_one_and_give_the_memory_back(unfused: Outputs, truth: Outputs) -> None:
    """The whole `LLM`, at both sizes; closing it is quick and leaves nothing on the GPUs."""
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, return_logits=True)
    with LLM(TINY, device="cuda", max_model_len=512) as llm:
        assert_as_good(llm.generate(PROMPTS, params), unfused, truth)
    torch.cuda.empty_cache()
    before = used_mib()
    with LLM(TINY, 2, device="cuda", max_model_len=512) as llm:
        assert_as_good(llm.generate(PROMPTS, params), unfused, truth)
        assert llm.fusion.enabled
        start = time.monotonic()
    assert time.monotonic() - start < 15
    assert max(abs(a - b) for a, b in zip(used_mib(), before, strict=True)) <= 16
