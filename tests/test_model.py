"""The engine against transformers' Qwen3NextForCausalLM, in float32 on CPU: every option of the architecture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core_torch import LLM, SamplingParams
from core_torch.cache import KVCache
from core_torch.session import SessionSpec, open_session
from shared_config import FusionRequest, ParallelLayout, Qwen3NextConfig
from shared_config.generation import Request
from shared_config.results import RequestOutput
from shared_config.settings import EngineSettings
from tests.reference import CONFIGS, greedy, logits_of, make_model, relative_error, save_model

TOLERANCE = 1e-4  # relative to the largest logit, float32
STEPS = 32
GREEDY = SamplingParams(
    temperature=0, max_tokens=STEPS, ignore_eos=True, return_logits=True, prompt_logprobs=True
)


class Reference:
    """One configuration's transformers model, saved as a checkpoint."""

    def __init__(self, name: str, folder: Path) -> None:
        self.model = make_model(name)
        packed = len(name) % 2 == 0  # both layouts get their share of the configurations
        self.folder = save_model(self.model, folder / name, packed=packed, shards=3 if packed else 1)

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        rng = np.random.default_rng(seed)
        return [int(t) for t in rng.integers(1, self.model.config.vocab_size, length)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            made[name] = Reference(name, tmp_path_factory.mktemp("checkpoints"))
        return made[name]

    return get


def check(output: RequestOutput, model: Any) -> None:
    tokens, rows = greedy(model, output.prompt_token_ids, STEPS)
    assert output.token_ids == tokens
    assert relative_error(np.stack(output.logits), rows) <= TOLERANCE
    prompt = torch.tensor(output.prompt_token_ids)
    want = torch.tensor(logits_of(model, output.prompt_token_ids)).log_softmax(-1)[:-1]
    want = want.gather(-1, prompt[1:, None])[:, 0].numpy()
    assert output.prompt_logprobs is not None
    assert np.abs(np.array(output.prompt_logprobs) - want).max(initial=0) <= 10 * TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_transformers(name: str, reference: Any) -> None:
    """Prefill in one piece, prefill in chunks that split pages and states, and 32 decode steps."""
    ref = reference(name)
    for chunk in (256, 29):
        with LLM(ref.folder, max_step_tokens=chunk, max_model_len=160) as llm:
            check(llm.generate(ref.prompt(75), GREEDY)[0], ref.model)


def test_mixed_batch_agrees_with_one_at_a_time(reference: Any) -> None:
    """More requests of different lengths than slots: they wait, share steps, and give what they give alone."""
    ref = reference("base")
    prompts = [ref.prompt(length, seed=length) for length in (1, 3, 17, 63, 40, 2, 67)]
    with LLM(ref.folder, max_num_seqs=3, max_step_tokens=48, max_model_len=160) as llm:
        outputs = llm.generate(prompts, GREEDY)
    assert [o.prompt_token_ids for o in outputs] == prompts
    for output in outputs:
        check(output, ref.model)


def test_padding_rows_touch_no_real_state(reference: Any) -> None:
    """Deterministic runs pad every decode step to all rows and pages: the results and the free pages stay the same."""
    ref = reference("base")
    with LLM(ref.folder, max_num_seqs=8, max_model_len=160, num_pages=30, deterministic=True) as llm:
        for output in llm.generate([ref.prompt(9), ref.prompt(40, seed=2)], GREEDY):
            check(output, ref.model)
        assert llm._session is not None
        runner = llm._session.runner
        for cache in runner.cache:
            if isinstance(cache, KVCache):  # page 0 and the pages of 9 + 32 and 40 + 32 tokens were written
                written = cache.k.flatten(1).any(1).nonzero().flatten().tolist()
                assert written == list(range(1 + 3 + 5))


def generate_on_rank(
    folder: str, prompts: list[list[int]], request: FusionRequest, dtype: str
) -> list[RequestOutput]:
    """Runs on every rank of a pool: a session over the pool's ranks."""
    config = Qwen3NextConfig.from_hf(folder)
    spec = SessionSpec(
        config,
        ParallelLayout(tp_size=int(os.environ["WORLD_SIZE"])),
        request,
        EngineSettings(folder, dtype=dtype, max_step_tokens=48, max_num_seqs=3, max_model_len=160),
        "cpu",
        None,
    )
    with open_session(spec, local_rank=0) as session:
        requests = [Request(i, None, prompt, GREEDY, 0) for i, prompt in enumerate(prompts)]
        final = {o.index: o for outputs in session.generate(requests) for o in outputs}
    return [final[i] for i in range(len(prompts))]


@pytest.mark.parametrize(
    ("name", "world_size"),
    [("base", 2), ("base", 4), ("dense_layers", 2), ("odd_sizes", 4), ("tied", 2), ("attention_bias", 2),
     ("single_kv_head", 4), ("many_value_heads", 4)],
)  # fmt: skip
def test_tensor_parallel_agrees_with_transformers(
    name: str, world_size: int, reference: Any, ranks: Any
) -> None:
    """Real gloo ranks; KV heads are replicated where there are fewer than ranks; all ranks give the same."""
    ref = reference(name)
    prompts = [ref.prompt(67), ref.prompt(5, seed=1)]
    by_rank = ranks(world_size).run(
        generate_on_rank, str(ref.folder), prompts, FusionRequest(), "auto", timeout=120
    )
    for outputs in by_rank:
        assert [o.token_ids for o in outputs] == [o.token_ids for o in by_rank[0]]
    for output in by_rank[0]:
        check(output, ref.model)
        assert output.reductions.fused == 0
        assert output.reductions.unfused > 0


def test_reference_backend_fuses_and_counts_every_norm_reduction(reference: Any, ranks: Any) -> None:
    """The `reference` backend goes through decision, votes, self-test and deferral as the GPU kernel does."""
    ref = reference("base")
    prompts = [ref.prompt(67)]
    request = FusionRequest(mode="on", backend="reference")
    by_rank = ranks(2).run(generate_on_rank, str(ref.folder), prompts, request, "auto", timeout=120)
    output = by_rank[0][0]
    check(output, ref.model)
    layers = ref.model.config.num_hidden_layers
    steps = 2 + STEPS - 1  # 67 prompt tokens in chunks of 48, then one token a step
    assert (output.reductions.fused, output.reductions.unfused) == (2 * layers * steps, 0)
