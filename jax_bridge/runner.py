"""The model and its cache on a mesh: runs a step of the scheduler, samples, and says what ran fused.

Two programs, compiled once for each batch shape: a pass with its sampling (prefill, or one decode step), and a loop of
greedy decode steps. The loop runs ahead of the scheduler: its tokens are kept and handed out step by step, so a
request gets the tokens and the counts that single steps would have given it.
"""

from __future__ import annotations

import functools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax.sharding import PartitionSpec as P

from core_torch.kernels.choice import choose_kernels, describe
from core_torch.kernels.pair_allreduce import pair_answer
from jax_bridge.batch import MIN_PAGES, Batch, build_batch
from jax_bridge.cache import LayerCache, cache_bytes, cache_specs, make_cache
from jax_bridge.dispatch import dispatch_lock, ends_within
from jax_bridge.kernels.compiled import JaxKernelOptions, open_kernels
from jax_bridge.models.qwen3_next import Qwen3Next
from jax_bridge.parallel import COMPILER_OPTIONS, GPU_COMPILER_OPTIONS, Parallel
from jax_bridge.programs import logprobs, run_loop, run_pass
from jax_bridge.report import explain
from jax_bridge.sampler import choice_of
from jax_bridge.weights import Weights, materialize
from shared_config import Qwen3NextConfig
from shared_config.generation import StepResult
from shared_config.results import Reductions
from shared_config.scheduler import Chunk, Sequence, Step
from shared_config.settings import EngineSettings

# (model, cache, inputs) -> (outputs, cache), on one device inside shard_map; outputs are alike on all.
Local = Callable[[Qwen3Next, list[LayerCache], Any], tuple[Any, list[LayerCache]]]
Program = Any  # jitted: (parameters, cache, inputs) -> (outputs, cache)
Job = tuple[Program, Any]  # and its inputs
FIRST_RUN_TIMEOUT_S = 600.0  # with its compilation; as long as torch.distributed waits for a peer
# float32 is float32, also on GPUs
MATMUL_PRECISION = functools.partial(jax.default_matmul_precision, "highest")


@dataclass
class _Ahead:
    """Tokens that a loop chose for a sequence and the scheduler has not asked for yet."""

    sequence: Sequence
    tokens: deque[int]
    reductions: Reductions  # of each step


class ModelRunner:
    """Loads the weights, sizes the cache, runs steps.

    `weights` gives a model's parameters; `decode_steps` is how many greedy steps one loop may run.
    """

    def __init__(
        self,
        config: Qwen3NextConfig,
        parallel: Parallel,
        settings: EngineSettings,
        dtype: jnp.dtype,
        weights: Weights,
        *,
        decode_steps: int,
    ) -> None:
        self.config, self.parallel, self.settings, self.decode_steps = (
            config,
            parallel,
            settings,
            decode_steps,
        )
        model = Qwen3Next(config, parallel.attention, parallel.mlp, parallel.experts, parallel.pieces)
        materialize(model, weights(model, parallel, dtype))
        self.kernels = choose_kernels(
            [module for _, module in nnx.iter_modules(model)],
            JaxKernelOptions(
                getattr(torch, dtype.name),
                parallel.torch_device,
                settings.max_num_seqs,
                compiled=settings.kernels == "auto",
            ),
        )
        if parallel.layout.tp_size > 1:
            self.kernels["pair_allreduce"] = pair_answer(parallel.decision)
        open_kernels([name for name, answer in self.kernels.items() if answer.usable], parallel.torch_device)
        if parallel.platform == "gpu":
            print(f"crossfuse: kernels {describe(self.kernels)}", file=sys.stderr, flush=True)
        self.graphdef, self.parameters = nnx.split(model)
        self.num_pages = settings.num_pages or self._affordable_pages(dtype)
        self.cache = make_cache(
            config,
            mesh=parallel.mesh,
            heads=parallel.heads,
            data=parallel.pieces.data,
            num_pages=self.num_pages,
            page_size=settings.page_size,
            num_slots=settings.max_num_seqs,
            dtype=dtype,
        )
        loop = functools.partial(
            run_loop, eos=config.eos_token_ids, page_size=settings.page_size, most=decode_steps
        )
        self._pass, self._loop = self.program(run_pass), self.program(loop)
        self._programs: list[Any] = []
        self._counts: dict[Any, Reductions] = {}
        self._ahead: dict[int, _Ahead] = {}  # by slot

    def _affordable_pages(self, dtype: jnp.dtype) -> int:
        """Enough pages for every slot at max_model_len, or what fits into the memory that is left."""
        s = self.settings
        wanted = s.max_num_seqs * -(-s.max_model_len // s.page_size)
        if self.parallel.platform == "cpu":
            return wanted
        shares = self.parallel.layout.head_shares
        page, slot = cache_bytes(self.config, shares=shares, page_size=s.page_size, itemsize=dtype.itemsize)
        stats = [device.memory_stats() for device in self.parallel.mesh.devices.flat]
        left = min(int(d["bytes_limit"] * s.memory_fraction) - d["bytes_in_use"] for d in stats)
        fits = (left - (s.max_num_seqs + 1) * slot) // max(page, 1)
        if fits < 1:
            raise MemoryError(
                f"no memory is left for the KV cache: {left / 2**30:.1f} GiB of JAX's share of the GPU; raise "
                f"memory_fraction={s.memory_fraction} or XLA_PYTHON_CLIENT_MEM_FRACTION, lower max_num_seqs, or use "
                "more ranks"
            )
        return min(wanted, fits)

    def program(self, local: Local) -> Program:
        """`local` on every device of the mesh, compiled; the cache is donated."""
        graphdef, data = self.graphdef, self.parallel.pieces.data

        def own(leaf: Any) -> Any:
            return leaf.own(data) if isinstance(leaf, Batch) else leaf

        def on_device(parameters: nnx.State, cache: list[LayerCache], inputs: Any) -> Any:
            inputs = jax.tree.map(own, inputs, is_leaf=lambda leaf: isinstance(leaf, Batch))
            return local(nnx.merge(graphdef, parameters), cache, inputs)

        on_device.__name__ = getattr(
            local, "func", local
        ).__name__  # XLA's name for the program, in profiles too
        caches = cache_specs(self.config, self.parallel.heads, data)
        sharded = jax.shard_map(
            on_device,
            mesh=self.parallel.mesh,
            in_specs=(nnx.get_partition_spec(self.parameters), caches, P()),
            out_specs=(P(), caches),
        )
        options = COMPILER_OPTIONS | (GPU_COMPILER_OPTIONS if self.parallel.platform == "gpu" else {})
        return jax.jit(sharded, donate_argnums=1, compiler_options=options)

    def job(self, step: Step, *, all_logits: bool = False) -> Job:
        """The program that runs `step` alone, and its inputs."""
        batch = self.batch(step, all_logits)
        return self._pass, (
            batch,
            choice_of([chunk.sequence for chunk in step.chunks], len(batch.sample_rows)),
        )

    def compile(self, jobs: Iterable[Job]) -> None:
        """Compiles what runs these jobs, side by side; a program that was not asked for is compiled when it first runs.

        `execute` finds them in JAX's cache, whose entries live as long as these results.
        """
        started = time.perf_counter()
        with dispatch_lock, MATMUL_PRECISION():
            different = {_key(*job): job for job in jobs}
            lowered = [
                program.lower(self.parameters, self.cache, inputs) for program, inputs in different.values()
            ]
        with ThreadPoolExecutor() as pool:
            self._programs += pool.map(lambda one: one.compile(), lowered)
        if self.parallel.platform == "gpu":
            took_s = time.perf_counter() - started
            print(
                f"crossfuse: compiled {len(lowered)} programs in {took_s:.1f} s", file=sys.stderr, flush=True
            )

    def execute(self, program: Program, inputs: Any) -> tuple[Any, Reductions]:
        """(the program's outputs, the norm reductions in it; a loop's body counts once). Updates the cache."""
        key = _key(program, inputs)
        with dispatch_lock, MATMUL_PRECISION():
            started = time.perf_counter()
            is_new = key not in self._counts
            if is_new:
                counts = explain(program, self.parameters, self.cache, inputs).counts
                self._counts[key] = Reductions(counts.fused, counts.unfused)
            is_first_on_gpus = is_new and self.parallel.platform == "gpu"
            with ends_within(FIRST_RUN_TIMEOUT_S) if is_first_on_gpus else nullcontext():
                outputs, self.cache = program(self.parameters, self.cache, inputs)
                if is_first_on_gpus:
                    jax.block_until_ready(outputs)
            if is_first_on_gpus:
                rows = jax.tree.leaves(inputs)[0].shape[0]
                took_s = time.perf_counter() - started
                print(
                    f"crossfuse: compiled {program.__name__} for {rows} rows in {took_s:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
            if self.parallel.platform == "cpu":
                jax.block_until_ready(self.cache)
        return outputs, self._counts[key]

    def run(self, step: Step) -> StepResult:
        """Run the model over `step`'s tokens and sample where a chunk ends its prompt or decodes."""
        return self._prefill(step) if step.prefill else self._decode(step)

    def _prefill(self, step: Step) -> StepResult:
        wants_logprobs = any(chunk.sequence.params.prompt_logprobs for chunk in step.chunks)
        logits, tokens, reductions = self._run_pass(step, all_logits=wants_logprobs)
        sampling = [i for i, chunk in enumerate(step.chunks) if chunk.samples]
        batch_logits = None
        if any(step.chunks[i].sequence.params.return_logits for i in sampling):
            ends = np.cumsum([chunk.num_tokens for chunk in step.chunks]) - 1
            batch_logits = [np.asarray(logits[ends[i] if wants_logprobs else i]) for i in sampling]
        return StepResult(
            tokens=[int(tokens[i]) for i in sampling],
            reductions=reductions,
            logits=batch_logits,
            prompt_logprobs=_prompt_logprobs(step, logits) if wants_logprobs else [],
        )

    def _decode(self, step: Step) -> StepResult:
        ahead = [self._ahead_of(chunk) for chunk in step.chunks]
        left = Step(False, tuple(c for c, known in zip(step.chunks, ahead, strict=True) if known is None))
        rows: dict[int, np.ndarray] = {}
        if left.chunks:
            steps = self._steps_at_once(left, [len(known.tokens) for known in ahead if known is not None])
            if steps > 1:
                self._run_loop(left, steps)
            else:
                logits, tokens, reductions = self._run_pass(left)
                self._keep(left, tokens[None], reductions)
                if any(chunk.sequence.params.return_logits for chunk in left.chunks):
                    rows = {
                        c.sequence.slot: row for c, row in zip(left.chunks, np.asarray(logits), strict=False)
                    }
        known = [self._ahead[chunk.sequence.slot] for chunk in step.chunks]
        return StepResult(
            tokens=[entry.tokens.popleft() for entry in known],
            reductions=self._ahead[(left.chunks or step.chunks)[0].sequence.slot].reductions,
            logits=[rows.get(chunk.sequence.slot) for chunk in step.chunks] if rows else None,
        )

    def _ahead_of(self, chunk: Chunk) -> _Ahead | None:
        """What is known of a sequence's next token. A slot's entry may be its previous owner's."""
        entry = self._ahead.get(chunk.sequence.slot)
        return entry if entry is not None and entry.sequence is chunk.sequence and entry.tokens else None

    def _steps_at_once(self, step: Step, others: list[int]) -> int:
        """How many steps may run before anybody has to look: no row may pass its max_tokens, and rows that are ahead
        by `others` tokens are caught up with, so that all run together again."""
        params = [chunk.sequence.params for chunk in step.chunks]
        if any(p.temperature > 0 or p.return_logits for p in params):
            return 1
        left = [chunk.sequence.params.max_tokens - len(chunk.sequence.output) for chunk in step.chunks]
        return min([self.decode_steps, *left, *others])

    def _run_pass(self, step: Step, *, all_logits: bool = False) -> tuple[jax.Array, np.ndarray, Reductions]:
        """(logits [L, V], tokens [S], reductions)."""
        (logits, tokens), reductions = self.execute(*self.job(step, all_logits=all_logits))
        return logits, np.asarray(tokens), reductions

    def _run_loop(self, step: Step, steps: int) -> None:
        """`steps` greedy steps, or fewer when every row has ended."""
        batch = self.batch(step)
        ends = np.zeros(batch.sample_rows.shape, bool)
        ends[: len(step.chunks)] = [not chunk.sequence.params.ignore_eos for chunk in step.chunks]
        padding = np.arange(len(ends)) >= len(step.chunks)
        (tokens, count), reductions = self.execute(self._loop, (batch, np.int32(steps), ends, padding))
        self._keep(step, np.asarray(tokens)[: int(count)], reductions)

    def batch(self, step: Step, all_logits: bool = False) -> Batch:
        """`deterministic` pins the shapes of a decode step: always all rows, all pages."""
        s = self.settings
        pinned = s.deterministic and not step.prefill
        return build_batch(
            step,
            page_size=s.page_size,
            layout=self.parallel.layout,
            all_logits=all_logits,
            rows=s.max_num_seqs if pinned else 1,
            pages=-(-s.max_model_len // s.page_size) if pinned else MIN_PAGES,
        )

    def _keep(self, step: Step, tokens: np.ndarray, reductions: Reductions) -> None:
        """tokens [steps, S]."""
        for chunk, column in zip(step.chunks, tokens.T, strict=False):
            self._ahead[chunk.sequence.slot] = _Ahead(chunk.sequence, deque(column.tolist()), reductions)


def _key(program: Program, inputs: Any) -> Any:
    """What a program is compiled for."""
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(inputs))
    return id(program), jax.tree.structure(inputs), shapes


def _prompt_logprobs(step: Step, logits: jax.Array) -> list[list[float]]:
    """For each chunk, the log-probabilities of the prompt tokens that follow its rows. logits [T, V] of all rows."""
    following = [c.sequence.prompt[c.start + 1 : c.start + c.num_tokens + 1] for c in step.chunks]
    targets = np.zeros(logits.shape[0], np.int32)
    firsts = np.cumsum([0, *(chunk.num_tokens for chunk in step.chunks)])
    for first, tokens in zip(firsts, following, strict=False):
        targets[first : first + len(tokens)] = tokens
    values = np.asarray(logprobs(logits, targets)).tolist()
    return [values[first : first + len(tokens)] for first, tokens in zip(firsts, following, strict=False)]
