"""What engines are fed, and that a run which did not do what its column says is an error."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf

import pytest

from bench.drive import decode_steps, make_sequences, measure, prefill_steps
from bench.measuring import peer_refusal, weight_bytes, with_floors
from shared_config.presets import PRESETS, with_layers
from shared_config.results import Reductions
from shared_config.scheduler import Sequence, Step
from tests.bench_cases import model_spec, result


def sequences(batch: int = 3, length: int = 128) -> list[Sequence]:
    return make_sequences(model_spec(batches=(batch,)), batch, length, random.Random(0))


def test_sequences_share_no_page_and_no_slot_and_have_room_for_all_steps() -> None:
    spec = model_spec()
    made = sequences()
    pages = [page for sequence in made for page in sequence.pages]
    assert sorted(pages) == list(range(1, len(pages) + 1))  # page 0 and slot 0 are for padding
    assert [sequence.slot for sequence in made] == [1, 2, 3]
    assert all(len(sequence.pages) * spec.page_size >= 128 + spec.steps_per_cell for sequence in made)
    assert len({tuple(sequence.prompt) for sequence in made}) == 3


def test_prompts_are_cut_into_passes_and_all_are_covered() -> None:
    made = sequences()
    steps = list(prefill_steps(made, 200))
    assert [[(c.sequence.slot, c.start, c.num_tokens, c.samples) for c in step.chunks] for step in steps] == [
        [(1, 0, 128, True), (2, 0, 72, False)],
        [(2, 72, 56, True), (3, 0, 128, True)],
    ]
    assert all(not sequence.prefilling for sequence in made)


def test_decode_steps_feed_the_given_tokens() -> None:
    made = sequences(batch=2)
    list(prefill_steps(made, 10_000))
    for sequence in made:
        sequence.output = [1]
    fed = [
        [(chunk.start, chunk.sequence.output[-1]) for chunk in step.chunks]
        for step in decode_steps(made, [[5, 6], [7, 8]])
    ]
    assert fed == [[(128, 1), (128, 1)], [(129, 5), (129, 6)]]
    assert [sequence.output for sequence in made] == [[1, 5, 7], [1, 6, 8]]


class FakeEngine:
    """One layer with two reductions a pass; batches of up to 100 tokens fuse."""

    framework = "torch"
    modes = ("on", "off")
    is_first_rank = True

    def __init__(self, *, fuses: bool = True) -> None:
        self.fuses = fuses
        self.steps: list[tuple[str, Step]] = []
        self.tokens: list[int] = []

    def _pass(self, mode: str, step: Step) -> Reductions:
        self.steps.append((mode, step))
        fused = mode == "on" and self.fuses and step.num_tokens <= 100
        return Reductions(fused=2) if fused else Reductions(unfused=2)

    def run(self, mode: str, steps: Iterable[Step]) -> Reductions:
        return sum((self._pass(mode, step) for step in steps), Reductions())

    def decode(
        self, mode: str, sequences: list[Sequence], tokens: SequenceOf[SequenceOf[int]]
    ) -> tuple[list[float], Reductions]:
        self.tokens += [token for row in tokens for token in row]
        ran = sum((self._pass(mode, step) for step in decode_steps(sequences, tokens)), Reductions())
        return [100.0 if mode == "on" else 120.0] * len(tokens), ran

    def touched_experts(self, steps: Iterable[Step]) -> list[list[set[int]]]:
        return [[{0, 1, 2, number} for _ in range(2)] for number, _ in enumerate(steps, 3)]

    def communication_share(self, mode: str, action: Callable[[], object]) -> float | None:
        action()
        return 0.25 if mode == "on" else 0.5

    def expected_fused(self, mode: str, num_tokens: int) -> int:
        return 2 if mode == "on" and num_tokens <= 100 else 0

    def meet(self) -> None:
        self.steps.append(("meet", Step(False, ())))

    def gather(self, samples: list[float]) -> list[list[float]]:
        return [samples, [1.5 * sample for sample in samples]]


def test_a_cell_is_measured_in_both_modes_in_turn() -> None:
    engine, spec = FakeEngine(), model_spec(batches=(2,))
    rows = measure(engine, spec)
    assert [(row.phase, row.fusion) for row in rows] == [
        ("prefill", "on"), ("prefill", "off"), ("decode", "on"), ("decode", "off"),
    ]  # fmt: skip
    decode = rows[2]
    assert decode.timing.median_us == 150.0  # the slower rank's
    assert decode.timing.samples == spec.repeats * spec.decode_steps
    assert decode.tokens_per_s == pytest.approx(2 / 150e-6)
    assert (decode.fused, decode.unfused) == (2 * spec.decode_steps, 0)
    assert decode.distinct_experts == 4  # by pass
    assert rows[0].distinct_experts == 4  # one pass of 256 tokens
    assert [row.communication_share for row in rows] == [0.25, 0.5, 0.25, 0.5]
    meetings = [place for place, (mode, _) in enumerate(engine.steps) if mode == "meet"]
    assert [engine.steps[place + 1][0] for place in meetings] == ["on", "off"] * spec.repeats * 2
    longest = max(chunk.start for _, step in engine.steps for chunk in step.chunks)
    assert longest < 128 + spec.steps_per_cell <= spec.pages_per_sequence * spec.page_size


def test_experts_of_all_passes_of_a_prefill_count_together() -> None:
    (prefill, *_) = measure(FakeEngine(), model_spec(batches=(4,)))  # two passes of 256 tokens
    assert prefill.distinct_experts == 5


def test_experts_are_not_counted_twice_for_the_same_cell() -> None:
    spec = model_spec(batches=(2,))
    rows = measure(FakeEngine(), spec)
    engine = FakeEngine()
    engine.touched_experts = lambda steps: pytest.fail(f"counted again: {steps}")
    assert [row.distinct_experts for row in measure(engine, spec, like=rows)] == [4, 4, 4, 4]


def test_every_run_of_a_seed_feeds_the_same_random_tokens() -> None:
    fed = []
    for _ in range(2):
        engine = FakeEngine()
        measure(engine, model_spec(batches=(2,)))
        fed.append(engine.tokens)
    assert fed[0] == fed[1]
    assert len(set(fed[0])) > len(fed[0]) // 2


def test_a_fused_column_that_did_not_fuse_is_an_error() -> None:
    spec = model_spec(batches=(1,), lengths=(64,))
    with pytest.raises(RuntimeError, match="fusion on: 2 reductions should have run fused, 0 did"):
        measure(FakeEngine(fuses=False), spec)


def test_floors_are_of_the_row_s_own_ranks_batch_and_experts() -> None:
    spec = model_spec()
    rows = with_floors(result().model, spec, result().machine)
    torch, _, peer, prefill = (row.floor_us for row in rows)
    assert torch == pytest.approx(3280, rel=0.02)  # 75 experts at batch 8
    assert torch
    assert peer == pytest.approx(2 * torch, rel=0.05)  # one device reads all
    assert prefill
    assert prefill > torch


def test_the_peer_runs_only_where_its_weights_fit() -> None:
    machine = result().machine
    assert weight_bytes(model_spec().config) == pytest.approx(159e9, rel=0.03)  # 80 billion in bfloat16
    assert "GB of weights do not fit" in peer_refusal(model_spec(), machine)
    small = model_spec(hf_config=with_layers(PRESETS["80b"], 12))
    assert peer_refusal(small, machine) == ""
