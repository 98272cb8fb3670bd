"""The JAX engine against transformers' Qwen3NextForCausalLM and against the PyTorch engine, float32 on CPU."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import core_torch
from jax_bridge import LLM, SamplingParams
from jax_bridge.cache import KVCache, StateCache
from jax_bridge.parallel import choose_devices
from jax_bridge.sampler import Choice, sample
from shared_config import FusionError
from shared_config.results import Reductions, RequestOutput
from shared_config.scheduler import Chunk, Sequence, Step
from tests.reference import CONFIGS, greedy, logits_of, make_model, relative_error, save_model

TOLERANCE = 1e-4  # relative to the largest logit, float32
STEPS = 6
GREEDY = SamplingParams(
    temperature=0, max_tokens=STEPS, ignore_eos=True, return_logits=True, prompt_logprobs=True
)
SMALL: dict[str, Any] = {"device": "cpu", "max_step_tokens": 32, "max_model_len": 128, "max_num_seqs": 3}


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
    """Tokens, the logits that they were chosen from, and the prompt's log-probabilities, against transformers."""
    steps = len(output.token_ids)
    tokens, rows = greedy(model, output.prompt_token_ids, steps)
    assert output.token_ids == tokens
    assert relative_error(np.stack(output.logits), rows) <= TOLERANCE
    prompt = torch.tensor(output.prompt_token_ids)
    want = torch.tensor(logits_of(model, output.prompt_token_ids)).log_softmax(-1)[:-1]
    want = want.gather(-1, prompt[1:, None])[:, 0].numpy()
    assert output.prompt_logprobs is not None
    assert np.abs(np.array(output.prompt_logprobs) - want).max(initial=0) <= 10 * TOLERANCE


# What a decode step does differently; the rest of a configuration shows in prefill.
DECODED = (
    "base",
    "attention_only",
    "linear_only",
    "odd_sizes",
    "equal_linear_heads",
    "full_rotary",
    "dense_layers",
)


@pytest.mark.parametrize(
    ("name", "tp"), [*((name, 2) for name in CONFIGS), ("base", 1), ("single_kv_head", 4)]
)
def test_three_ways(name: str, tp: int, reference: Any) -> None:
    """transformers, PyTorch and JAX: prefill in two chunks that split pages and states, then decode steps."""
    ref = reference(name)
    prompt = ref.prompt(56)
    params = replace(GREEDY, max_tokens=STEPS if name in DECODED else 1)
    with LLM(ref.folder, tp, **SMALL) as llm:
        output = llm.generate(prompt, params)[0]
    check(output, ref.model)
    with core_torch.LLM(ref.folder, **SMALL) as llm:
        other = llm.generate(prompt, params)[0]
    assert output.token_ids == other.token_ids
    assert relative_error(np.stack(output.logits), np.stack(other.logits)) <= TOLERANCE
    assert output.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=10 * TOLERANCE)


@pytest.fixture(scope="module")
def base(reference: Any) -> Any:
    """The base configuration at TP 2, fused through the reference backend: (LLM, its reference).

    Its EOS is the fifth token that transformers gives for prompt(9, seed=9); tests that do not want it ignore it.
    """
    ref = reference("base")
    tokens, _ = greedy(ref.model, ref.prompt(9, seed=9), 5)
    assert tokens.index(tokens[4]) == 4
    config = json.loads((ref.folder / "config.json").read_text())
    folder = ref.folder.parent / "base_with_eos"
    shutil.copytree(ref.folder, folder)
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": tokens[4]}))
    with LLM(folder, 2, fusion="on", backend="reference", **SMALL) as llm:
        yield llm, ref


def test_mixed_batch_agrees_with_one_at_a_time(base: Any) -> None:
    """More requests of different lengths than slots: they wait, share steps, and give what they give alone."""
    llm, ref = base
    prompts = [ref.prompt(length, seed=length) for length in (1, 17, 63, 2)]
    outputs = llm.generate(prompts, GREEDY)
    assert [o.prompt_token_ids for o in outputs] == prompts
    for output in outputs:
        check(output, ref.model)


def test_every_norm_reduction_is_fused_and_counted(base: Any) -> None:
    llm, ref = base
    assert llm.fusion.enabled
    output = llm.generate(ref.prompt(56), GREEDY)[0]
    steps = 2 + STEPS - 1
    assert output.reductions == Reductions(fused=2 * ref.model.config.num_hidden_layers * steps)


def test_padded_passes_are_fused_too(reference: Any) -> None:
    """Rows that pad a pass to a power of two count where its reductions' memory is sized."""
    small: dict[str, Any] = SMALL | {"max_step_tokens": 20, "max_num_seqs": 3}
    with LLM(reference("base").folder, 2, fusion="on", backend="reference", **small) as llm:
        outputs = llm.generate([[3] * 20, [5] * 33], replace(GREEDY, max_tokens=2))
    assert all(output.reductions.unfused == 0 < output.reductions.fused for output in outputs)


def test_loop_gives_what_single_steps_give(base: Any) -> None:
    """Tokens and counts; requests that end at different steps leave the loop and let others in."""
    llm, ref = base
    prompts = [ref.prompt(length, seed=length) for length in (1, 17, 63, 2)]
    lengths = [20, 3, 11, 1]
    params = [replace(GREEDY, max_tokens=n, return_logits=False) for n in lengths]
    runner = llm._session.runner
    loop = llm.generate(prompts, params)
    runner.decode_steps = 1
    single = llm.generate(prompts, params)
    runner.decode_steps = 8
    assert [o.token_ids for o in loop] == [o.token_ids for o in single]
    assert [len(o.token_ids) for o in loop] == lengths
    assert [o.reductions for o in loop] == [o.reductions for o in single]


def test_loop_ends_at_eos(base: Any) -> None:
    """The row whose EOS comes within a loop ends there and the others go on; a loop without rows left stops."""
    llm, ref = base
    prompts = [ref.prompt(9, seed=9), ref.prompt(30, seed=30)]
    stops = SamplingParams(temperature=0, max_tokens=20)
    params = [stops, replace(stops, ignore_eos=True)]
    first, second = llm.generate(prompts, params)
    assert (first.finish_reason, len(first.token_ids)) == ("stop", 5)
    assert second.token_ids == greedy(ref.model, prompts[1], 20)[0]
    executed = []
    runner, execute = llm._session.runner, llm._session.runner.execute
    runner.execute = lambda program, inputs: executed.append(execute(program, inputs)) or executed[-1]
    alone = llm.generate(prompts[0], params[0])[0]
    runner.execute = execute
    assert alone.token_ids == first.token_ids
    (_, count), _ = executed[-1]
    assert int(count) == 4  # one token came from the prefill; the loop was asked for 8


def test_seeded_sampling_is_its_own_business(base: Any) -> None:
    """Beside other requests a seeded one gets what PyTorch, with the same uniform numbers, gives it alone."""
    llm, ref = base
    prompts = [ref.prompt(length, seed=length) for length in (12, 5, 13)]
    params = [
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=seed, max_tokens=12, ignore_eos=True)
        for seed in (1, 2, 3)
    ]
    together = llm.generate(prompts, params)
    with core_torch.LLM(ref.folder, **SMALL) as other:
        for output, prompt, own in zip(together, prompts, params, strict=True):
            assert output.token_ids == other.generate(prompt, own)[0].token_ids


def test_padding_rows_touch_no_real_state(base: Any) -> None:
    """Three requests run in four rows; pages and slots that none of them owns stay as they were."""
    llm, ref = base
    runner, scheduler = llm._session.runner, llm._session.scheduler
    before = jax.tree.map(np.asarray, runner.cache)
    lengths, page_size = (7, 18, 5), llm._session.spec.settings.page_size
    pages = sum(-(-(n + STEPS) // page_size) for n in lengths)
    owned = {
        KVCache: {0, *list(scheduler._free_pages[0])[:pages]},
        StateCache: {0, *list(scheduler._free_slots)[:3]},
    }
    llm.generate([ref.prompt(length, seed=length) for length in lengths], GREEDY)
    for old, new in zip(before, runner.cache, strict=True):
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            changed = np.flatnonzero((a != np.asarray(b)).reshape(len(a), -1).any(1))
            assert set(changed.tolist()) <= owned[type(new)]


def test_cache_is_updated_in_place(base: Any) -> None:
    llm, ref = base
    runner = llm._session.runner

    def addresses() -> list[int]:
        leaves = jax.tree.leaves(runner.cache)
        return [shard.data.unsafe_buffer_pointer() for leaf in leaves for shard in leaf.addressable_shards]

    llm.generate(ref.prompt(5), GREEDY)
    before = addresses()
    llm.generate(ref.prompt(5), GREEDY)
    assert addresses() == before


def test_programs_compiled_ahead_are_not_compiled_again(base: Any, caplog: pytest.LogCaptureFixture) -> None:
    llm, ref = base
    runner = llm._session.runner
    steps = []
    for length in (40, 100):  # in two programs that no other test asks for
        sequence = Sequence(0, ref.prompt(length), SamplingParams(temperature=0), slot=1)
        sequence.pages = list(range(1, 1 + -(-length // runner.settings.page_size)))
        steps.append(Step(True, (Chunk(sequence, 0, length, True),)))
    with jax.log_compiles():
        runner.compile([runner.job(step) for step in steps * 2])
        assert caplog.text.count("module conversion jit(run_pass)") == 2
        caplog.clear()
        for step in steps:
            assert len(runner.run(step).tokens) == 1
        assert "jit(run_pass)" not in caplog.text, "lowered or compiled again"


def test_stream_stops_and_refusals(base: Any) -> None:
    """A stream grows; an impossible request is refused and the others go on; what is closed says so."""
    llm, ref = base
    grown = [len(o.token_ids) for o in llm.generate(ref.prompt(5), GREEDY, stream=True)]
    assert grown == list(range(1, STEPS + 1))
    outputs = llm.generate([ref.prompt(200), ref.prompt(4)], GREEDY)
    assert [o.finish_reason for o in outputs] == ["refused", "length"]
    assert "exceeds max_model_len = 128" in (outputs[0].error or "")
    with pytest.raises(ValueError, match="token id 131"):
        llm.generate([[131]])
    with pytest.raises(ValueError, match="no tokenizer.json"):
        llm.generate("text")


def test_arguments_are_checked(reference: Any) -> None:
    folder = reference("base").folder
    with pytest.raises(ValueError, match="num_attention_heads 4 is not divisible by the attention-TP size 3"):
        LLM(folder, 3, device="cpu")
    with pytest.raises(ValueError, match="needs 64 CPU devices, JAX was started with"):
        choose_devices("cpu", 64)
    with pytest.raises(ValueError, match="needs 1 GPUs"):
        LLM(folder, device="cuda")
    with pytest.raises(ValueError, match="decode_steps must be at least 1"):
        LLM(folder, device="cpu", decode_steps=0)
    with pytest.raises(FusionError, match="fusion='on' cannot be met"):
        LLM(folder, 2, fusion="on", device="cpu")


def test_draws_at_the_edges() -> None:
    """A draw of 1 (rounded up) takes the last token that is left, never one that was cut."""
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]] * 4, np.float32))
    choice = Choice(
        temperature=jnp.ones(4, jnp.float32),
        top_k=jnp.array([0, 2, 0, 0], jnp.int32),
        top_p=jnp.array([1, 1, 0.6, 1], jnp.float32),
        draws=jnp.array([1.0, 1.0, 1.0, 0.0], jnp.float32),
    )
    assert np.asarray(sample(jnp.asarray(logits), choice)).tolist() == [3, 1, 1, 0]
