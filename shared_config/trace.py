"""What a parity run records of an engine, and the job that both engines are given.

Shapes: R rows (one for each token that ran, in the order of the steps), D hidden, V vocabulary, N ranks, T tokens.

An engine answers a job with a `Record`:

    op       the reduction on operands that both engines make from a seed
    points   the residual stream after each mixer and each MLP, and the logits, while given tokens are fed in:
             prompts in chunks beside one another, then decode steps, so that caches and states take part
    greedy   what it generates by itself, with the best logits of every step
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared_config.results import Reductions, RequestOutput
from shared_config.sampling import SamplingParams
from shared_config.scheduler import Scheduler, Sequence, Step

LOGITS = "logits"
BEST = 8  # logits that are kept of each greedy step
OP_EPS = 1e-6


@dataclass(frozen=True)
class TraceJob:
    """prompts: token ids. continuations: the tokens fed in after each prompt; None takes the engine's own greedy
    ones. forced_tokens of each are fed, max_tokens are generated (0: none). op_tokens: batch sizes for the op."""

    prompts: list[list[int]]
    max_tokens: int = 0
    forced_tokens: int = 0
    continuations: list[list[int]] | None = None
    op_tokens: tuple[int, ...] = ()
    seed: int = 0

    def greedy_params(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_tokens, temperature=0, ignore_eos=True, return_logits=True)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> TraceJob:
        values = json.loads(path.read_text())
        return cls(**values | {"op_tokens": tuple(values["op_tokens"])})


@dataclass
class Greedy:
    """One prompt's own continuation: tokens, the `BEST` highest logits of each step and whose they are."""

    token_ids: list[int]
    text: str
    best_ids: np.ndarray
    best_logits: np.ndarray
    reductions: Reductions

    @classmethod
    def of(cls, output: RequestOutput) -> Greedy:
        """Of an output with logits."""
        logits = np.stack(output.logits)
        best = np.argsort(-logits, axis=-1, kind="stable")[:, :BEST]
        return cls(
            output.token_ids, output.text, best, np.take_along_axis(logits, best, -1), output.reductions
        )


@dataclass
class Record:
    """An engine's answer. `engine` is a name such as "torch"; `fused` whether its decision fuses; arrays are float32
    (exact for every dtype that an engine runs in)."""

    engine: str
    dtype: str
    fused: bool
    why: str
    versions: dict[str, str]
    op: dict[str, np.ndarray] = field(default_factory=dict)  # "<tokens>/residual", "<tokens>/normed" [T, D]
    rows: np.ndarray = field(
        default_factory=lambda: np.zeros((0, 3), np.int64)
    )  # prompt, position, is decode
    points: dict[str, np.ndarray] = field(default_factory=dict)  # [R, D] in the model's order, LOGITS [R, V]
    greedy: list[Greedy] = field(default_factory=list)

    def save(self, path: Path) -> None:
        meta = {
            "head": [self.engine, self.dtype, self.fused, self.why, self.versions],
            "greedy": [[g.token_ids, g.text, g.reductions.fused, g.reductions.unfused] for g in self.greedy],
        }
        arrays = {f"op:{key}": value for key, value in self.op.items()}
        arrays |= {f"point:{key}": value for key, value in self.points.items()}
        for i, g in enumerate(self.greedy):
            arrays |= {f"best_ids:{i}": g.best_ids, f"best_logits:{i}": g.best_logits}
        np.savez(path, meta=np.array(json.dumps(meta)), rows=self.rows, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Record:
        with np.load(path) as file:
            meta = json.loads(str(file["meta"]))
            record = cls(*meta["head"], rows=file["rows"])
            for key in file.files:
                kind, _, name = key.partition(":")
                if kind == "op":
                    record.op[name] = file[key]
                elif kind == "point":
                    record.points[name] = file[key]
            for i, (token_ids, text, fused, unfused) in enumerate(meta["greedy"]):
                best = file[f"best_ids:{i}"], file[f"best_logits:{i}"]
                record.greedy.append(Greedy(token_ids, text, *best, Reductions(fused, unfused)))
        return record


def point_names(num_layers: int) -> list[str]:
    """The points of a model, in its order: each is the residual stream that a norm's payment leaves."""
    names = ["embedding"]
    for i in range(num_layers):
        names += [f"layers.{i}.mixer", f"layers.{i}.mlp"]
    return names


def op_operands(
    num_tokens: int, hidden_size: int, ranks: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(partial [N, T, D], residual [T, D], weight [D]) in float32, the same for every caller."""
    rng = np.random.default_rng((seed, num_tokens))
    partial = rng.standard_normal((ranks, num_tokens, hidden_size), np.float32)
    residual = 4 * rng.standard_normal((num_tokens, hidden_size), np.float32)
    return partial, residual, rng.standard_normal(hidden_size, np.float32) / 4


def feed(
    run: Callable[[Step], dict[str, np.ndarray]],
    scheduler: Scheduler,
    prompts: list[list[int]],
    continuations: list[list[int]],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(rows, points): feed every prompt and its continuation through `run`, which gives a step's points by row.

    The scheduler decides the steps, as in a real run; what the model would have chosen does not matter.
    """
    following: dict[int, Iterator[int]] = {}
    for i, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        # Logits are wanted of every row, so prompts ask for their log-probabilities.
        params = SamplingParams(max_tokens=len(continuation) + 1, temperature=0, prompt_logprobs=True)
        scheduler.add(Sequence(i, prompt, params))
        following[i] = iter(continuation)
    rows: list[tuple[int, int, bool]] = []
    taken: dict[str, list[np.ndarray]] = {}
    try:
        while (step := scheduler.next_step()) is not None:
            for name, values in run(step).items():
                taken.setdefault(name, []).append(values)
            scheduler.advance(step)
            for chunk in step.chunks:
                positions = range(chunk.start, chunk.start + chunk.num_tokens)
                rows += [(chunk.sequence.index, position, not step.prefill) for position in positions]
                if chunk.samples:
                    token = next(following[chunk.sequence.index], None)
                    if token is None:
                        scheduler.finish(chunk.sequence)
                    else:
                        chunk.sequence.output.append(token)
    finally:
        scheduler.reset()
    return np.array(rows), {name: np.concatenate(values) for name, values in taken.items()}


def continuations_of(job: TraceJob, record: Record) -> list[list[int]]:
    """What is fed after each prompt: the job's tokens, or those that the engine has generated."""
    given: list[Any] = job.continuations or [greedy.token_ids for greedy in record.greedy]
    if not given and job.forced_tokens:
        raise ValueError("a job that feeds tokens needs continuations, or max_tokens to make its own")
    return [tokens[: job.forced_tokens] for tokens in given] or [[] for _ in job.prompts]
