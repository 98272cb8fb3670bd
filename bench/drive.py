"""Feeds an engine prompts and next tokens, the same to every engine, and times it.

The next tokens are random, not the engine's own: with random weights an engine's own choices soon repeat, and a batch
of equal tokens touches few experts, so it would read a fraction of the weights that a real batch reads.

Shapes: B sequences (the batch), L tokens of each prompt.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from statistics import fmean
from typing import Protocol

from tqdm import tqdm

from bench.result import WARM_UPS, ModelRow, ModelSpec
from bench.stats import slowest, summarize
from shared_config.results import Reductions
from shared_config.sampling import SamplingParams
from shared_config.scheduler import Chunk, Sequence, Step


class Engine(Protocol):
    """One rank's end of an engine. All ranks make the same calls in the same order.

    `modes`: what it can run of "on" and "off" (fusion), or "none" where there is nothing to fuse.
    """

    @property
    def framework(self) -> str: ...

    @property
    def modes(self) -> tuple[str, ...]: ...

    @property
    def is_first_rank(self) -> bool: ...

    def run(self, mode: str, steps: Iterable[Step]) -> Reductions:
        """Runs passes, and waits for them. What the model chooses is nobody's next token."""
        ...

    def decode(
        self, mode: str, sequences: list[Sequence], tokens: SequenceOf[SequenceOf[int]]
    ) -> tuple[list[float], Reductions]:
        """A decode step for each row of tokens [steps, B], which become the sequences' next ones
        -> (microseconds a step, one or more samples; the reductions of all steps)."""
        ...

    def touched_experts(self, steps: Iterable[Step]) -> list[list[set[int]]]:
        """Runs passes -> for each pass and MoE layer, the experts that were touched."""
        ...

    def communication_share(self, mode: str, action: Callable[[], object]) -> float | None:
        """Does `action`, which runs this engine, under a profiler; None where that shows no communication."""
        ...

    def expected_fused(self, mode: str, num_tokens: int) -> int:
        """How many reductions of a pass over `num_tokens` tokens the decision wants fused."""
        ...

    def meet(self) -> None:
        """Waits for all ranks."""
        ...

    def gather(self, samples: list[float]) -> list[list[float]]:
        """All ranks' samples."""
        ...


def make_sequences(spec: ModelSpec, batch: int, length: int, generator: random.Random) -> list[Sequence]:
    """New sequences with random prompts, each with its own slot and with the pages that it will need."""
    pages = spec.pages_per_sequence
    params = SamplingParams(temperature=0, max_tokens=spec.steps_per_cell, ignore_eos=True)
    sequences = []
    for row in range(batch):
        prompt = [generator.randrange(spec.vocab_size) for _ in range(length)]
        sequence = Sequence(row, prompt, params, slot=row + 1)
        sequence.pages = list(range(1 + row * pages, 1 + (row + 1) * pages))
        sequences.append(sequence)
    return sequences


def prefill_steps(sequences: list[Sequence], max_step_tokens: int) -> Iterator[Step]:
    """Passes over the prompts from their starts, each of at most `max_step_tokens` tokens."""
    for sequence in sequences:
        sequence.computed, sequence.output = 0, []
    while waiting := [sequence for sequence in sequences if sequence.prefilling]:
        budget, chunks = max_step_tokens, []
        for sequence in waiting:
            left = len(sequence.prompt) - sequence.computed
            count = min(budget, left)
            if count:
                chunks.append(Chunk(sequence, sequence.computed, count, count == left))
            budget -= count
        yield Step(True, tuple(chunks))
        for chunk in chunks:
            chunk.sequence.computed += chunk.num_tokens


def decode_steps(sequences: list[Sequence], tokens: SequenceOf[SequenceOf[int]]) -> Iterator[Step]:
    """A pass over one token of each sequence for each row of tokens [steps, B]: those that follow the pass."""
    for row in tokens:
        yield Step(False, tuple(Chunk(sequence, sequence.computed, 1, True) for sequence in sequences))
        for sequence, token in zip(sequences, row, strict=True):
            sequence.computed += 1
            sequence.output.append(token)


def measure(engine: Engine, spec: ModelSpec, like: SequenceOf[ModelRow] = ()) -> list[ModelRow]:
    """Every cell of the grid, both phases, in all modes of the engine. Experts are not counted again in cells that
    `like` has: rows of the same model, whose inputs were the same."""
    counted = {(row.phase, row.batch, row.length): row.distinct_experts for row in like}
    cells = [(batch, length) for length in spec.lengths for batch in spec.batches]
    title = f"model, {engine.framework}, fusion {' and '.join(engine.modes)}"
    progress = tqdm(cells, desc=title, unit="cell", disable=not engine.is_first_rank, leave=False)
    return [row for batch, length in progress for row in _Cell(engine, spec, batch, length, counted).rows()]


class _Cell:
    """One batch size with one prompt length."""

    def __init__(
        self,
        engine: Engine,
        spec: ModelSpec,
        batch: int,
        length: int,
        counted: dict[tuple[str, int, int], float],
    ) -> None:
        self.engine, self.spec, self.batch, self.length, self.counted = engine, spec, batch, length, counted
        self.generator = random.Random(f"{batch} {length}")  # alike on all ranks, and in every engine
        self.sequences = make_sequences(spec, batch, length, self.generator)

    def rows(self) -> list[ModelRow]:
        return [*self._prefill(), *self._decode()]

    def _prompts(self) -> list[Step]:
        return list(prefill_steps(self.sequences, self.spec.max_step_tokens))

    def _tokens(self, steps: int) -> list[list[int]]:
        return [
            [self.generator.randrange(self.spec.vocab_size) for _ in range(self.batch)] for _ in range(steps)
        ]

    def _prefill(self) -> list[ModelRow]:
        engine, modes = self.engine, self.engine.modes
        experts = self.counted.get(("prefill", self.batch, self.length))
        if experts is None:
            passes = engine.touched_experts(self._prompts())
            experts = _mean([len(set().union(*layer)) for layer in zip(*passes, strict=True)])
        ran = {}
        for mode in modes * WARM_UPS:
            ran[mode] = engine.run(mode, self._prompts())
        samples: dict[str, list[float]] = {mode: [] for mode in modes}
        for mode in modes * self.spec.repeats:
            steps = self._prompts()
            engine.meet()
            start = time.perf_counter()
            ran[mode] = engine.run(mode, steps)
            samples[mode].append((time.perf_counter() - start) * 1e6)
        rows = []
        for mode in modes:
            steps = self._prompts()
            expected = sum(engine.expected_fused(mode, step.num_tokens) for step in steps)
            self._check_fused("prefill", mode, ran[mode], expected)
            share = engine.communication_share(mode, functools.partial(engine.run, mode, steps))
            rows.append(self._row("prefill", mode, samples[mode], ran[mode], experts, share))
        return rows

    def _decode(self) -> list[ModelRow]:
        engine, modes, spec = self.engine, self.engine.modes, self.spec
        for sequence, token in zip(self.sequences, self._tokens(1)[0], strict=True):
            sequence.output = [token]
        for mode in modes * WARM_UPS:
            engine.decode(mode, self.sequences, self._tokens(spec.decode_steps))
        samples: dict[str, list[float]] = {mode: [] for mode in modes}
        ran = {}
        for mode in modes * spec.repeats:
            tokens = self._tokens(spec.decode_steps)
            engine.meet()
            taken, ran[mode] = engine.decode(mode, self.sequences, tokens)
            samples[mode] += taken
        experts = self.counted.get(("decode", self.batch, self.length))
        if experts is None:
            passes = engine.touched_experts(decode_steps(self.sequences, self._tokens(spec.decode_steps)))
            experts = _mean([len(layer) for layers in passes for layer in layers])
        rows = []
        for mode in modes:
            expected = spec.decode_steps * engine.expected_fused(mode, self.batch)
            self._check_fused("decode", mode, ran[mode], expected)
            action = functools.partial(engine.decode, mode, self.sequences, self._tokens(spec.decode_steps))
            share = engine.communication_share(mode, action)
            rows.append(self._row("decode", mode, samples[mode], ran[mode], experts, share))
        return rows

    def _check_fused(self, phase: str, mode: str, ran: Reductions, expected: int) -> None:
        if ran.fused != expected:
            raise RuntimeError(
                f"{phase}, batch {self.batch}, length {self.length}, fusion {mode}: {expected} reductions should have "
                f"run fused, {ran.fused} did ({ran.unfused} unfused)"
            )

    def _row(
        self,
        phase: str,
        mode: str,
        samples: list[float],
        ran: Reductions,
        experts: float,
        share: float | None,
    ) -> ModelRow:
        timing = summarize(slowest(self.engine.gather(samples)))
        new_tokens = self.batch * (self.length if phase == "prefill" else 1)
        return ModelRow(
            framework=self.engine.framework,
            phase=phase,
            fusion=mode,
            batch=self.batch,
            length=self.length,
            timing=timing,
            tokens_per_s=new_tokens / timing.median_us * 1e6,
            distinct_experts=experts,
            floor_us=None,
            communication_share=share,
            fused=ran.fused,
            unfused=ran.unfused,
        )


def _mean(counts: list[int]) -> float:
    """0 for a model without MoE layers."""
    return fmean(counts) if counts else 0.0
