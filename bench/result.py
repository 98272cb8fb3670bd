"""What a run writes: `result.json` is a `Result`, and its dataclasses are the schema."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.codec import from_plain, to_plain
from bench.machine import Machine
from bench.stats import Timing
from shared_config import FusionDecision, FusionRequest, ModelFacts, Qwen3NextConfig
from shared_config.model import DTYPE_BYTES
from shared_config.settings import EngineSettings

SCHEMA_VERSION = 1
WARM_UPS = 2  # XLA captures its graphs at a program's second run


@dataclass(frozen=True)
class OpRow:
    """One way to run the reduction at one size.

    `method`: see METHODS. `wire_bytes` is what each rank has to send at least, 2 (N - 1) / N of the message;
    `floor_us` that over the measured link rate (None without links). `max_error` is the largest
    |got - float64| / (1 + |float64|) over both outputs. `fused` and `unfused` count the reductions that ran.
    """

    framework: str
    method: str
    num_tokens: int
    timing: Timing
    wire_bytes: int
    floor_us: float | None
    max_error: float
    fused: int
    unfused: int

    @property
    def key(self) -> str:
        return f"op {self.framework} {self.method}, {self.num_tokens} tokens"


# In the order of columns: what each is called in tables, and what it is.
METHODS = {
    "fused": ("fused", "the engine's op, one kernel: FlashInfer's, or for long messages the project's own"),
    "fused_oneshot": ("one-shot", "FlashInfer's kernel, one-shot forced"),
    "fused_twoshot": ("two-shot", "FlashInfer's kernel, two-shot forced"),
    "allreduce_norm": ("all-reduce + norm", "all-reduce, then one kernel for residual add and norm"),
    "unfused": ("engine unfused", "the engine's own path without the fused op"),
    "allreduce": ("all-reduce alone", "the sum alone (one after another, NCCL's may wait longer)"),
    "fused_ffi": ("fused, C++", "the fused op through the C++ custom call"),
    "fused_cupy": ("fused, CuPy", "the fused op through CuPy and buffer_callback"),
    "psum_norm": ("psum + norm", "psum, add and norm as XLA compiles them"),
}


@dataclass(frozen=True)
class OpSpec:
    """What `op` measures. `calls` are timed as one sample (one CUDA graph on GPUs), `repeats` samples are taken."""

    frameworks: tuple[str, ...]
    tp: int
    tokens: tuple[int, ...]
    hidden_size: int
    dtype: str
    device: str
    calls: int
    repeats: int

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]

    def wire_bytes(self, num_tokens: int) -> int:
        """What each rank must send for one all-reduce, and receive: 2 (N - 1) / N of the message."""
        return 2 * (self.tp - 1) * num_tokens * self.hidden_size * self.itemsize // self.tp

    def residual_sets(self, num_tokens: int, *, cache_bytes: int) -> int:
        """How many residuals rotate: together twice the cache, or two where the calls are too few to leave it."""
        sets = -(-2 * cache_bytes // (num_tokens * self.hidden_size * self.itemsize))
        return max(2, sets) if sets <= self.calls else 2

    def model_facts(self) -> ModelFacts:
        return ModelFacts("Qwen3NextForCausalLM", self.hidden_size, self.itemsize)

    def fusion_request(self) -> FusionRequest:
        """Fusion demanded, so that a column that cannot fuse is an error with the rule that says no; and for every
        size, because the limit is what is measured."""
        return FusionRequest(
            mode="on",
            backend="trtllm" if self.device == "cuda" else "reference",
            max_bytes=max(self.tokens) * self.hidden_size * self.itemsize,
        )


@dataclass(frozen=True)
class OpPart:
    """What one framework's part of `op` returns."""

    rows: tuple[OpRow, ...]
    decision: FusionDecision


@dataclass(frozen=True)
class Shapes:
    """A model and the sizes that are measured. `name` is the preset or the checkpoint folder's name, `hf_config` its
    config; `lengths` are of the prompts, and of the context in decode."""

    tp: int
    name: str
    hf_config: dict[str, Any]
    dtype: str
    device: str
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    repeats: int
    max_step_tokens: int
    page_size: int

    @property
    def config(self) -> Qwen3NextConfig:
        return replace(Qwen3NextConfig.from_hf(self.hf_config), dtype=self.dtype)


@dataclass(frozen=True)
class ModelSpec(Shapes):
    """What `model` measures.

    A cell of the grid is a batch of prompts of one length: prefilled `repeats` times, then decoded `repeats` times
    for `decode_steps` steps, with fusion and without in turn; as many more are counted and profiled.
    """

    frameworks: tuple[str, ...]
    load_format: str
    decode_steps: int

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def steps_per_cell(self) -> int:
        """Decode steps that a sequence of one cell may see: in two modes warm-ups, the repeats and a profile, once a
        count of experts."""
        return 1 + (2 * (WARM_UPS + self.repeats + 1) + 1) * self.decode_steps

    @property
    def pages_per_sequence(self) -> int:
        """Of the longest cell."""
        return -(-(max(self.lengths) + self.steps_per_cell) // self.page_size)

    def check_pages(self, num_pages: int) -> None:
        """Raises ValueError where the largest cell does not fit into a cache of `num_pages` pages."""
        needed = max(self.batches) * self.pages_per_sequence
        if num_pages < needed:
            raise ValueError(
                f"a batch of {max(self.batches)} with prompts of {max(self.lengths)} tokens needs {needed} KV pages, "
                f"and memory is left for {num_pages}; lower --batches or --lengths, or use more ranks"
            )

    def settings(self, folder: str) -> EngineSettings:
        return EngineSettings(
            folder,
            dtype=self.dtype,
            max_num_seqs=max(self.batches),
            max_model_len=max(self.lengths) + self.steps_per_cell,
            max_step_tokens=self.max_step_tokens,
            page_size=self.page_size,
            load_format=self.load_format,
        )

    def fusion_request(self) -> FusionRequest:
        """Fusion demanded, with the limit that a user gets: a run that cannot fuse is an error, not a number."""
        if self.tp == 1:
            return FusionRequest(mode="off")
        return FusionRequest(mode="on", backend="trtllm" if self.device == "cuda" else "reference")


@dataclass(frozen=True)
class ModelRow:
    """One phase of one cell. `timing` is a whole prefill until every sequence's first token ("prefill"), or one step
    ("decode"); `length` is of the prompts.

    `fusion`: "on", "off", or "none" where one rank has nothing to reduce. `distinct_experts`: mean over MoE layers
    of how many were touched, by a decode step or by the whole prefill. `fused` and `unfused`: norm reductions of one
    prefill, or of one round of decode steps. `communication_share`: see `trace.py`.
    """

    framework: str
    phase: str
    fusion: str
    batch: int
    length: int
    timing: Timing
    tokens_per_s: float
    distinct_experts: float
    floor_us: float | None
    communication_share: float | None
    fused: int
    unfused: int

    @property
    def key(self) -> str:
        return (
            f"{self.phase} {self.framework}, fusion {self.fusion}, batch {self.batch}, "
            f"{self.length} prompt tokens"
        )


@dataclass(frozen=True)
class ModelPart:
    """What one framework's part of `model` returns; `decision` is None where there was nothing to decide. `notes`: what
    the numbers are of, beyond that."""

    rows: tuple[ModelRow, ...]
    decision: FusionDecision | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class KernelSpec(Shapes):
    """What `kernels` measures: the project's own kernels with the shapes of one of `tp` ranks, on one device, and those
    that two ranks run together on two.

    Decode steps are of `batches` sequences, passes of prefill of one prompt and of as many as fit into
    `max_step_tokens`.
    """

    @property
    def passes(self) -> tuple[tuple[int, int], ...]:
        """(number of prompts, their length) of each pass of prefill."""
        found = []
        for length in self.lengths:
            length = min(length, self.max_step_tokens)
            found += [(1, length), (self.max_step_tokens // length, length)]
        return tuple(dict.fromkeys(found))

    def fusion_request(self) -> FusionRequest:
        """What a user gets, so that a kernel that does not run here is a line that says why."""
        return FusionRequest(backend="trtllm" if self.device == "cuda" else "reference")


@dataclass(frozen=True)
class KernelRow:
    """One kernel in one phase. `length`: of the context or the prompts, None where nothing depends on it.

    `timing` is None where the kernel does not run on this device; `plain` is the same in plain torch. `memory_bytes`:
    every operand read once (of weights and caches what is touched) and every result written once; `wire_bytes`: what a
    rank sends its peer; `floor_us`: the longest of those bytes and `flops` at the measured rates. `apart`: the distance
    of the two results in the 2-norm, relative to the plain one.
    """

    kernel: str
    phase: str
    num_tokens: int
    length: int | None
    timing: Timing | None
    plain: Timing
    memory_bytes: int
    flops: float
    wire_bytes: int
    floor_us: float | None
    apart: float | None

    @property
    def key(self) -> str:
        context = "" if self.length is None else f", length {self.length}"
        return f"kernel {self.kernel}, {self.phase}, {self.num_tokens} tokens{context}"

    @property
    def share(self) -> float | None:
        """Of the floor's rate that the kernel reaches, 0 to 1."""
        if self.timing is None or self.floor_us is None:
            return None
        return self.floor_us / self.timing.median_us


@dataclass(frozen=True)
class KernelPart:
    """What the part of `kernels` returns; `notes`: which kernels run here, and why others do not."""

    rows: tuple[KernelRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """`decisions` by part ("torch op"); `created` is UTC; `notes` say what is missing, and what ran."""

    schema_version: int
    created: str
    revision: str
    machine: Machine
    decisions: dict[str, FusionDecision]
    notes: tuple[str, ...]
    op_spec: OpSpec | None
    op: tuple[OpRow, ...]
    model_spec: ModelSpec | None
    model: tuple[ModelRow, ...]
    kernel_spec: KernelSpec | None
    kernels: tuple[KernelRow, ...]

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(to_plain(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> Result:
        """Raises ValueError naming the file and the place where it is not a result of this version."""
        try:
            plain = json.loads(file.read_text())
            version = plain.get("schema_version") if isinstance(plain, dict) else None
            if version != SCHEMA_VERSION:
                raise ValueError(f"schema_version must be {SCHEMA_VERSION}, got {version!r}")
            return from_plain(cls, _as_of_today(plain))
        except ValueError as error:
            raise ValueError(f"{file} is not a result of this benchmark: {error}") from error


def _as_of_today(plain: dict[str, Any]) -> dict[str, Any]:
    """With what files of this version lack that were written before there was such a thing."""
    no_pair = {"above": 0, "max_bytes": 0, "source": "there was no pair_allreduce"}
    decisions = plain.get("decisions")
    if isinstance(decisions, dict):
        decisions = {
            name: {"pair": no_pair, **decision} if isinstance(decision, dict) else decision
            for name, decision in decisions.items()
        }
    kernels = plain.get("kernels", [])
    if isinstance(kernels, list):
        kernels = [{"wire_bytes": 0, **row} if isinstance(row, dict) else row for row in kernels]
    return {"kernel_spec": None, **plain, "kernels": kernels, "decisions": decisions}
