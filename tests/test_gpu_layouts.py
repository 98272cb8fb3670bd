"""Layouts on GPUs, with the real kernels: against one GPU in float32, fused where the rules allow it, and in graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from core_torch import LLM, SamplingParams
from core_torch.kernels import selftest
from core_torch.session import SessionSpec, open_session
from shared_config import FusionDecision, FusionRequest, ParallelLayout, Qwen3NextConfig
from shared_config.results import Reductions
from shared_config.settings import EngineSettings
from tests.ranks import RankPool
from tests.test_gpu_model import PROMPTS, TINY, Outputs, assert_as_good, generate, logits_in_batches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(240),
]

LONG = ["x = 1\n" * 40, *PROMPTS]  # about 240 tokens: chunks of 96 split it, and pages and states with it
TOKENS = 32
TOLERANCE = 1e-4  # relative to the largest logit, float32
Pools = Callable[[int], RankPool]

# What a pass of eight layers reduces (fused, unfused) where it may fuse.
LAYOUTS = {
    ParallelLayout(2, ep_size=2): Reductions(16, 0),
    ParallelLayout(2, attn_cp_size=2): Reductions(0, 8),
    ParallelLayout(2, moe_dp_size=2): Reductions(8, 0),
    ParallelLayout(2, attn_dp_size=2, ep_size=2): Reductions(0, 8),
    ParallelLayout(4): Reductions(16, 0),  # as many ranks as heads: a KV head on two
    ParallelLayout(4, attn_cp_size=2, moe_dp_size=2): Reductions(16, 0),
    ParallelLayout(4, attn_cp_size=2, moe_dp_size=2, ep_size=2): Reductions(16, 0),
    ParallelLayout(4, attn_cp_size=2): Reductions(8, 8),
    ParallelLayout(4, attn_cp_size=2, attn_dp_size=2, ep_size=4): Reductions(0, 8),
}


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    """Ranks with a GPU each, for all tests of this file."""
    made: dict[int, RankPool] = {}

    def get(world_size: int) -> RankPool:
        if torch.cuda.device_count() < world_size:
            pytest.skip(f"needs {world_size} CUDA GPUs")
        if world_size not in made:
            made[world_size] = RankPool(world_size, backend="nccl")
        return made[world_size]

    yield get
    for pool in made.values():
        pool.close()


def make_spec(layout: ParallelLayout, request: FusionRequest, **options: Any) -> SessionSpec:
    config, tokenizer = Qwen3NextConfig.from_hf(TINY), str(TINY / "tokenizer.json")
    limits = {"max_model_len": 512, "max_step_tokens": 96, "deterministic": request.deterministic}
    settings = EngineSettings(str(TINY), **{**limits, **options})
    return SessionSpec(config, layout, request, settings, "cuda", tokenizer)


def on_rank(specs: list[SessionSpec]) -> list[tuple[FusionDecision, Outputs, list[int], bytes]]:
    """On every rank: each spec's decision, outputs, the sizes of the groups that were self-tested, all logits."""
    found = []
    run = selftest.run
    for spec in specs:
        tested: list[int] = []

        def noted(buffers: Any, cases: Any, world_size: int, tested: list[int] = tested) -> None:
            run(buffers, cases, world_size)
            tested.append(world_size)

        selftest.run = noted
        try:
            with open_session(spec, dist.get_rank()) as session:
                outputs = generate(session, LONG, TOKENS)
        finally:
            selftest.run = run
        logits = np.concatenate([np.stack(output.logits) for output in outputs]).tobytes()
        found.append((session.decision, outputs if dist.get_rank() == 0 else [], tested, logits))
    return found


def alone(**options: Any) -> Outputs:
    """On one GPU, in this process."""
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, return_logits=True)
    with LLM(TINY, device="cuda", max_model_len=512, max_step_tokens=96, **options) as llm:
        return llm.generate(LONG, params)


@pytest.fixture(scope="module")
def truth() -> Outputs:
    return alone(dtype="float32", cuda_graphs=False)


@pytest.fixture(scope="module")
def bfloat16() -> Outputs:
    return alone(kernels="plain")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_agrees_with_one_gpu(
    layout: ParallelLayout, pools: Pools, truth: Outputs, bfloat16: Outputs
) -> None:
    """float32 eager to 1e-4, bfloat16 in graphs as close to it as one GPU's; fused and not; all ranks the same bits."""
    specs = [
        make_spec(layout, FusionRequest(mode="off"), dtype="float32", cuda_graphs=False),
        make_spec(layout, FusionRequest(), dtype="float32", cuda_graphs=False),
        make_spec(layout, FusionRequest(mode="off")),
        make_spec(layout, FusionRequest()),
        make_spec(layout, FusionRequest(), cuda_graphs=False),
    ]
    by_rank = pools(layout.tp_size).run(on_rank, specs, timeout=200)
    sizes = {layout.attn_tp_size, layout.moe_reduce_size} - {1}
    for i, spec in enumerate(specs):
        decision, outputs, tested, logits = by_rank[0][i]
        fused = spec.request.mode == "auto" and layout.attn_dp_size == 1
        assert decision.enabled == fused, decision.reason
        assert all(on_ranks[i][3] == logits for on_ranks in by_rank)
        if fused:
            assert decision.backend == "trtllm"
            assert sorted(tested) == sorted(sizes)
        if spec.settings.dtype == "float32":
            for got, want in zip(outputs, truth, strict=True):
                assert got.token_ids == want.token_ids
                error = np.abs(np.stack(got.logits) - np.stack(want.logits)).max()
                assert error <= TOLERANCE * np.abs(np.stack(want.logits)).max()
        else:
            assert_as_good(outputs, bfloat16, truth)
        each = LAYOUTS[layout] if fused else Reductions(0, LAYOUTS[layout].fused + LAYOUTS[layout].unfused)
        chunks = -(-len(outputs[0].prompt_token_ids) // 96)
        passes = chunks + TOKENS - 1
        assert outputs[0].reductions == Reductions(each.fused * passes, each.unfused * passes)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.tp_size == 2], ids=str)
def test_a_deterministic_layout_is_batch_invariant(layout: ParallelLayout, pools: Pools) -> None:
    """The same bits alone and in batches of 2 and 8, on both ranks, also where the other data-parallel rank runs it."""
    spec = make_spec(layout, FusionRequest(deterministic=True), max_num_seqs=8, max_model_len=256)
    by_rank = pools(2).run(logits_in_batches, spec, PROMPTS[1], {1: 0, 2: 1, 8: 3}, timeout=120)
    assert len({found for rank in by_rank for found in rank}) == 1
