"""Scheduling, sampling and the loop from requests to text, without a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core_torch.sampler import sample
from shared_config.generation import Generation, Launched, Request, StepResult, is_greedy
from shared_config.results import Reductions
from shared_config.sampling import SamplingParams, uniform
from shared_config.scheduler import Scheduler, Sequence, Step


def scheduler(num_pages: int = 12, max_step_tokens: int = 8, max_model_len: int = 40) -> Scheduler:
    return Scheduler(
        num_pages=num_pages,
        page_size=4,
        num_slots=3,
        max_step_tokens=max_step_tokens,
        max_model_len=max_model_len,
    )


class CountingRunner:
    """Answers with token ids that tell which sequence and position they belong to, and checks every step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.steps: list[Step] = []

    def run(self, step: Step) -> StepResult:
        self.steps.append(step)
        running = self.scheduler.running
        pages = [page for s in running for page in s.pages]
        assert len(pages) == len(set(pages))
        assert 0 not in pages
        assert len({s.slot for s in running}) == len(running)
        for chunk in step.chunks:
            s = chunk.sequence
            assert chunk.start == s.computed
            assert len(s.pages) * self.scheduler.page_size >= chunk.start + chunk.num_tokens
        tokens = [1000 * (c.sequence.index + 1) + len(c.sequence.output) for c in step.chunks if c.samples]
        return StepResult(tokens, Reductions(unfused=1), prompt_logprobs=[[] for _ in step.chunks])


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 45), st.integers(1, 12)), min_size=1, max_size=8),
    slots=st.integers(1, 4),
    budget=st.integers(1, 16),
    alone=st.booleans(),
)
def test_every_request_ends_with_its_own_tokens(
    sizes: list[tuple[int, int]], slots: int, budget: int, alone: bool
) -> None:
    """Whatever the mix: each request is refused with a reason, or gets exactly its tokens in order."""
    s = Scheduler(
        num_pages=12, page_size=4, num_slots=slots, max_step_tokens=budget, max_model_len=40,
        one_prefill_at_a_time=alone,
    )  # fmt: skip
    requests = [
        Request(i, None, [1] * length, SamplingParams(max_tokens=n), 0) for i, (length, n) in enumerate(sizes)
    ]
    generation, runner = Generation(requests, s, None, (0,)), CountingRunner(s)
    for _ in generation.run(runner):
        pass
    for i, (length, n) in enumerate(sizes):
        output = generation.outputs[i]
        if length + n > 40:
            assert output.finish_reason == "refused"
            assert f"{length} tokens" in (output.error or "")
        else:
            assert output.token_ids == [1000 * (i + 1) + k for k in range(n)]
            assert output.finish_reason == "length"
    assert s.free_pages == 12
    assert not s.running
    for step in runner.steps:
        assert step.num_tokens <= (budget if step.prefill else slots)
        assert not (alone and step.prefill and len(step.chunks) > 1)


def test_prompts_do_not_starve_running_requests() -> None:
    s = scheduler(max_step_tokens=4, num_pages=30)
    requests = [Request(i, None, [1] * 12, SamplingParams(max_tokens=8), 0) for i in range(3)]
    runner = CountingRunner(s)
    for _ in Generation(requests, s, None, ()).run(runner):
        pass
    kinds = "".join("P" if step.prefill else "D" for step in runner.steps)
    assert "PPP" not in kinds[kinds.index("D") :]


def test_refusals_name_the_numbers() -> None:
    assert "empty" in (scheduler().refusal(0, SamplingParams()) or "")
    assert "exceeds max_model_len = 40" in (scheduler().refusal(30, SamplingParams(max_tokens=11)) or "")
    few = scheduler(num_pages=2, max_model_len=400)
    assert "needs 3 KV pages and the cache has 2" in (few.refusal(8, SamplingParams(max_tokens=1)) or "")
    with pytest.raises(ValueError, match="empty"):
        scheduler().add(Sequence(0, [], SamplingParams()))


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(96 + i) for i in ids if i or not skip_special_tokens)


class Spell:
    def __init__(self, word: list[int]) -> None:
        self.word = word

    def run(self, step: Step) -> StepResult:
        tokens = [self.word[len(c.sequence.output)] for c in step.chunks if c.samples]
        return StepResult(tokens, Reductions(fused=2), prompt_logprobs=[[] for _ in step.chunks])


@pytest.mark.parametrize(
    ("params", "text", "reason", "count"),
    [
        (SamplingParams(max_tokens=5), "abcde", "length", 5),
        (SamplingParams(max_tokens=9), "abcdefg", "stop", 8),  # token 0 is EOS
        (SamplingParams(max_tokens=9, ignore_eos=True), "abcdefgh", "length", 9),
        (SamplingParams(max_tokens=9, stop=("de",)), "abc", "stop", 5),
        (SamplingParams(max_tokens=9, stop=("zz", "c", "b")), "a", "stop", 2),
    ],
)
def test_how_a_request_ends(params: SamplingParams, text: str, reason: str, count: int) -> None:
    s = scheduler()
    generation = Generation([Request(0, "", [1], params, 0)], s, Letters(), (0,))
    updates = list(generation.run(Spell([1, 2, 3, 4, 5, 6, 7, 0, 8])))
    output = generation.outputs[0]
    assert (output.text, output.finish_reason, len(output.token_ids)) == (text, reason, count)
    assert len(updates) == count
    assert output.reductions == Reductions(fused=2 * count)


class Device:
    """Runs a step at a time; a token depends on its sequence and place, and 0 (the end) comes up now and then."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.last: dict[int, tuple[int, int]] = {}  # by sequence: the next position, and its token

    def start(self, step: Step) -> list[int]:
        tokens = []
        for chunk in step.chunks:
            sequence = chunk.sequence
            assert len(sequence.pages) * 4 >= chunk.start + chunk.num_tokens
            at = chunk.start - len(sequence.prompt)
            if 0 <= at < len(sequence.output):
                self.last[sequence.index] = (chunk.start, sequence.output[at])
            elif not step.prefill:
                assert self.last[sequence.index][0] == chunk.start
            if chunk.samples:
                end = chunk.start + chunk.num_tokens
                token = (sequence.index * 7919 + end * 104729) % 11 % 9
                self.last[sequence.index] = (end, token)
                tokens.append(token)
        return tokens


class OneByOne(Device):
    def run(self, step: Step) -> StepResult:
        return StepResult(self.start(step), Reductions(unfused=1), prompt_logprobs=[[] for _ in step.chunks])


class Queueing(OneByOne):
    def launch(self, step: Step) -> Launched:
        self.in_flight += 1
        assert self.in_flight <= 2
        result = self.run(step)

        def wait() -> StepResult:
            self.in_flight -= 1
            return result

        return Launched(wait)

    def queues(self, step: Step) -> bool:
        return not step.prefill and is_greedy(step)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 14)), min_size=1, max_size=6),
    slots=st.integers(1, 4),
    stop=st.sampled_from([(), ("gg",), ("b", "ca")]),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_steps_queued_ahead_change_no_output(
    sizes: list[tuple[int, int]], slots: int, stop: tuple[str, ...], temperature: float
) -> None:
    """Ends by token, text and length, and requests that wait for pages: the same tokens and texts. (A request that
    waited for a place may share its prefill's steps with others.)"""
    found = []
    for runner in (OneByOne(), Queueing()):
        s = Scheduler(num_pages=14, page_size=4, num_slots=slots, max_step_tokens=9, max_model_len=40)
        requests = [
            Request(i, "", [1] * n, SamplingParams(max_tokens=m, stop=stop, temperature=temperature), 0)
            for i, (n, m) in enumerate(sizes)
        ]
        generation = Generation(requests, s, Letters(), (0,))
        for _ in generation.run(runner):
            pass
        assert (s.free_pages, s.running, runner.in_flight) == (14, [], 0)
        found.append([(o.token_ids, o.text, o.finish_reason) for o in generation.outputs.values()])
    assert found[0] == found[1]


def test_a_greedy_run_is_queued_ahead() -> None:
    class Watched(Queueing):
        most = 0

        def launch(self, step: Step) -> Launched:
            launched = super().launch(step)
            self.most = max(self.most, self.in_flight)
            return launched

    for temperature, most in ((0.0, 2), (1.0, 1)):
        runner, params = Watched(), SamplingParams(max_tokens=8, temperature=temperature, ignore_eos=True)
        list(Generation([Request(0, None, [1], params, 0)], scheduler(), None, ()).run(runner))
        assert runner.most == most


def test_a_failing_step_leaves_the_scheduler_clean() -> None:
    class Broken:
        def run(self, step: Step) -> StepResult:
            raise RuntimeError("boom")

    s = scheduler()
    with pytest.raises(RuntimeError, match="boom"):
        list(
            Generation([Request(0, None, [1, 2], SamplingParams(max_tokens=4), 0)], s, None, ()).run(Broken())
        )
    assert not s.running
    assert not s.waiting


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0),
     ("top_p", 1.1), ("stop", ("",))],
)  # fmt: skip
def test_bad_sampling_parameters_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"SamplingParams.{name} must be"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def draw(
    logits: torch.Tensor, n: int = 4000, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> np.ndarray:
    """The share of each token in `n` draws of one row of logits."""
    draws = torch.tensor([uniform(7, i) for i in range(n)], dtype=torch.float32)
    tokens = sample(
        logits.expand(n, -1),
        torch.full((n,), temperature),
        torch.full((n,), top_k),
        torch.full((n,), top_p),
        draws,
    )
    return np.bincount(tokens.numpy(), minlength=logits.shape[-1]) / n


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 0.5, -1.0, 1.0, float("-inf")])
    for temperature in (0.5, 1.0, 2.0):
        want = (logits / temperature).softmax(-1).numpy()
        assert np.abs(draw(logits, temperature=temperature) - want).max() < 0.02
    assert draw(logits, temperature=0.0)[0] == 1.0


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert np.abs(draw(logits, top_k=2) - np.array([0.625, 0.375, 0, 0])).max() < 0.02
    assert np.abs(draw(logits, top_p=0.6) - np.array([0.625, 0.375, 0, 0])).max() < 0.02
    assert draw(logits, top_p=0.5)[0] == 1.0  # the first token reaches 0.5 by itself
    assert draw(logits, top_k=1)[0] == 1.0


def test_a_draw_that_rounds_to_one_takes_the_last_token_that_is_left() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    one = torch.ones(1)
    for top_k, top_p, last in ((2, 1.0, 1), (0, 0.9, 2), (0, 1.0, 3)):
        token = sample(logits, one, torch.tensor([top_k]), torch.tensor([top_p]), one)
        assert token.tolist() == [last]


def test_uniform_depends_on_seed_and_position_alone() -> None:
    values = [uniform(seed, position) for seed in range(50) for position in range(50)]
    assert all(0 <= v < 1 for v in values)
    assert len(set(values)) == len(values)
    assert abs(np.mean(values) - 0.5) < 0.02
    assert uniform(3, 4) == uniform(3, 4)
