"""The JAX engine under `drive.py`: one process, one device for each rank, with the fused op and then without it.

The engine's own runner is driven. Only a decode step's next token differs: the engine's loop takes what the model
chose, and the one here what it is given; both run several steps in one program.
"""

from __future__ import annotations

import functools
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.codec import from_plain, to_plain
from bench.drive import decode_steps, make_sequences, measure, prefill_steps
from bench.result import ModelPart, ModelSpec
from bench.trace import COMMUNICATION, covered
from core_torch.kernels.choice import describe
from jax_bridge.batch import Batch, build_batch
from jax_bridge.cache import LayerCache
from jax_bridge.layers.mlp import Experts
from jax_bridge.models.qwen3_next import Qwen3Next
from jax_bridge.parallel import choose_devices
from jax_bridge.runner import Job, ModelRunner
from jax_bridge.session import SessionSpec, open_session
from jax_bridge.weights import Weights, dummy_weights, load_checkpoint
from shared_config import FusionRequest, ParallelLayout
from shared_config.results import Reductions
from shared_config.scheduler import Sequence, Step


def run(plain: dict[str, Any]) -> dict[str, Any]:
    """The part of `launch.run_part`; plain: spec (ModelSpec), folder (the checkpoint's)."""
    spec = from_plain(ModelSpec, plain["spec"])
    session_spec = SessionSpec(
        config=spec.config,
        layout=ParallelLayout(tp_size=spec.tp),
        request=spec.fusion_request(),
        settings=spec.settings(plain["folder"]),
        dtype=jnp.dtype(spec.dtype),
        devices=tuple(choose_devices(spec.device, spec.tp)),
        decode_steps=1,  # steps on their own must not run ahead of the tokens that they are given
        tokenizer_file=None,
    )
    weights = _loaded_once(spec, plain["folder"])
    if spec.tp == 1:
        with open_session(session_spec, weights) as session:
            rows = measure(JaxEngine(session.runner, "none", spec), spec)
            notes = (f"kernels {describe(session.kernels)}",)
            return to_plain(ModelPart(tuple(rows), session.decision, notes))
    with open_session(session_spec, weights) as session:
        rows, decision = measure(JaxEngine(session.runner, "on", spec), spec), session.decision
        notes = (f"kernels {describe(session.kernels)}",)
    del session  # its cache, before there is another
    with open_session(replace(session_spec, request=FusionRequest(mode="off")), weights) as session:
        rows += measure(JaxEngine(session.runner, "off", spec), spec, like=rows)
    return to_plain(ModelPart(tuple(rows), decision, notes))


def _loaded_once(spec: ModelSpec, folder: str) -> Weights:
    """The second session takes the first one's arrays, which are most of the memory."""
    load: Any = functools.partial(dummy_weights, seed=0)
    if spec.load_format == "safetensors":
        load = functools.partial(load_checkpoint, config=spec.config, folder=Path(folder), progress=False)
    held: dict[str, jax.Array] = {}

    def weights(model: Qwen3Next, parallel: Any, dtype: Any) -> dict[str, jax.Array]:
        if not held:
            held.update(load(model, parallel, dtype))
        return held

    return weights


class JaxEngine:
    """See `drive.Engine`. Fused or not is compiled in, so an engine has one mode."""

    framework = "jax"
    is_first_rank = True

    def __init__(self, runner: ModelRunner, mode: str, spec: ModelSpec) -> None:
        spec.check_pages(runner.num_pages)
        self._runner, self.modes = runner, (mode,)
        self._feed = runner.program(functools.partial(_feed, page_size=runner.settings.page_size))
        self._watch = runner.program(_watch)
        runner.compile(self._jobs(spec, counts_experts=mode != "off"))

    def _jobs(self, spec: ModelSpec, *, counts_experts: bool) -> Iterator[Job]:
        """Everything that the grid runs. Experts are counted by the first engine alone (`measure(like=)`)."""
        for batch, length in itertools.product(spec.batches, spec.lengths):
            sequences = make_sequences(spec, batch, length, random.Random(0))
            for step in prefill_steps(sequences, spec.max_step_tokens):
                yield self._runner.job(step)
                if counts_experts:
                    yield self._watch, self._batch(step)
            for sequence in sequences:
                sequence.output = [0]
            step = next(decode_steps(sequences, [[0] * batch]))
            yield self._feed, self._given(step, [[0] * batch] * spec.decode_steps)
            if counts_experts:
                yield self._watch, self._batch(step)

    def _batch(self, step: Step) -> Batch:
        return build_batch(step, page_size=self._runner.settings.page_size)

    def _given(self, step: Step, tokens: SequenceOf[SequenceOf[int]]) -> tuple[Batch, np.ndarray]:
        """The inputs of `_feed`."""
        batch = self._batch(step)
        given = np.zeros((len(tokens), batch.token_ids.shape[0]), np.int32)
        given[:, : len(step.chunks)] = tokens
        return batch, given

    def run(self, mode: str, steps: Iterable[Step]) -> Reductions:
        del mode
        return sum((self._runner.run(step).reductions for step in steps), Reductions())

    def decode(
        self, mode: str, sequences: list[Sequence], tokens: SequenceOf[SequenceOf[int]]
    ) -> tuple[list[float], Reductions]:
        del mode
        start = time.perf_counter()
        steps = decode_steps(sequences, tokens)
        chosen, reductions = self._runner.execute(self._feed, self._given(next(steps), tokens))
        np.asarray(chosen)  # waits for the steps
        elapsed_us = (time.perf_counter() - start) * 1e6
        for _ in steps:  # moves the sequences on
            continue
        times = len(tokens)
        return [elapsed_us / times], Reductions(reductions.fused * times, reductions.unfused * times)

    def touched_experts(self, steps: Iterable[Step]) -> list[list[set[int]]]:
        passes = []
        for step in steps:
            layers, _ = self._runner.execute(self._watch, self._batch(step))
            passes.append([set(np.asarray(experts)[: step.num_tokens].flat) for experts in layers])
        return passes

    def communication_share(self, mode: str, action: Callable[[], object]) -> float | None:
        """Of the first GPU's busy time. None on CPU, where XLA's trace does not name its operations."""
        if mode == "none" or self._runner.parallel.platform != "gpu":
            return None
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                action()
            (file,) = Path(folder).glob("**/*.xplane.pb")
            recorded = jax.profiler.ProfileData.from_file(str(file))
        gpu = next(plane for plane in recorded.planes if plane.name == "/device:GPU:0")
        streams = [line for line in gpu.lines if line.name.startswith("Stream")]
        events = [event for line in streams for event in line.events]
        spans = [((event.start_ns, event.start_ns + event.duration_ns), event.name) for event in events]
        busy = covered(span for span, _ in spans)
        talking = covered(span for span, name in spans if COMMUNICATION.search(name))
        return talking / busy if busy > 0 else None

    def expected_fused(self, mode: str, num_tokens: int) -> int:
        """Programs are compiled for padded batches, and it is those that are under the limit or not."""
        if mode != "on":
            return 0
        parallel, itemsize = self._runner.parallel, jnp.dtype(self._runner.config.dtype).itemsize
        axes = (parallel.attention, parallel.mlp)
        padded = 1 << (num_tokens - 1).bit_length()
        fuses = [parallel.decision.fuses(padded, side=axis.side, itemsize=itemsize).fuses for axis in axes]
        return self._runner.config.num_hidden_layers * sum(fuses)

    def meet(self) -> None:
        """There is one process."""

    def gather(self, samples: list[float]) -> list[list[float]]:
        return [samples]


def _feed(
    model: Qwen3Next, cache: list[LayerCache], inputs: tuple[Batch, jax.Array], *, page_size: int
) -> tuple[jax.Array, list[LayerCache]]:
    """(what the model chose last [S], cache). Inputs: the first step's batch, and the tokens [steps, S] that follow."""
    first, tokens = inputs

    def goes_on(state: tuple[Any, ...]) -> jax.Array:
        return state[0] < tokens.shape[0]

    def one_step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        count, batch, cache, _ = state
        chosen, cache = model.best_tokens(batch, cache)
        return count + 1, batch.next_token(tokens[count], page_size), cache, chosen

    state = (jnp.int32(0), first, cache, jnp.zeros_like(first.token_ids))
    _, _, cache, chosen = jax.lax.while_loop(goes_on, one_step, state)
    return chosen, cache


def _watch(
    model: Qwen3Next, cache: list[LayerCache], batch: Batch
) -> tuple[list[jax.Array], list[LayerCache]]:
    """(the experts [T, K] that each MoE layer chose, cache)."""
    with _watched_experts() as seen:
        _, cache = model(batch, cache)
    return seen, cache


@contextmanager
def _watched_experts() -> Iterator[list[jax.Array]]:
    """While a program is traced: what its expert layers are called with."""
    seen: list[jax.Array] = []
    original: Callable[..., Any] = Experts.__call__

    def call(
        self: Experts, x: jax.Array, weights: jax.Array, experts: jax.Array, *rest: Any, **how: Any
    ) -> Any:
        seen.append(experts)
        return original(self, x, weights, experts, *rest, **how)

    Experts.__call__ = call
    try:
        yield seen
    finally:
        Experts.__call__ = original
