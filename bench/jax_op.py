"""The reduction in JAX, every way to run it: one process, one device for each rank, a chain of calls in one program.

As in `torch_op.py` each call reduces what the call before it returned, and the residuals rotate. On GPUs the time of a
short chain is taken off the time of a long one, which leaves out what a program costs to start; executions run one
at a time, because XLA records its CUDA graph again for results at new addresses. Shapes: T tokens, D hidden, R ranks.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jax_bridge
from bench.codec import from_plain, to_plain
from bench.rates import cache_bytes
from bench.result import OpPart, OpRow, OpSpec
from bench.stats import summarize
from core_torch.kernels.counts import ReductionCounts
from shared_config import ParallelLayout, probe_flashinfer, probe_hardware, resolve_fusion

EPS = 1e-6
WEIGHT_BIAS = 1.0
TRANSPORTS = {"cuda": ("ffi", "cupy"), "cpu": ("ffi",)}
# Calls in the long chain, by device and whether it is XLA's own way (slower to compile, and to run).
CALLS = {("cuda", False): 512, ("cuda", True): 128, ("cpu", False): 16, ("cpu", True): 16}
SHORT = {"cuda": 8, "cpu": 0}  # on CPU a program's start is lost in the noise
BLOCK = 8  # calls that are traced once
WARMUPS = 3
TOLERANCE = {"bfloat16": 4e-2, "float16": 5e-3, "float32": 2e-5}

# op(partial [T, D], residual [T, D], weight [D]) -> (residual, normed), inside shard_map
Op = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def run(plain: dict[str, Any]) -> dict[str, Any]:
    """The part of `launch.run_part`."""
    spec = from_plain(OpSpec, plain)
    if len(jax.devices()) < spec.tp:
        raise ValueError(f"tp={spec.tp} needs as many JAX devices, there are {jax.devices()}")
    mesh = Mesh(np.array(jax.devices()[: spec.tp]), ("tp",))
    decision = resolve_fusion(
        spec.model_facts(),
        ParallelLayout(tp_size=spec.tp),
        probe_hardware(),
        probe_flashinfer(),
        spec.fusion_request(),
    )
    with ExitStack() as opened:
        ops: dict[str, Op] = {}
        for transport in TRANSPORTS[spec.device]:
            communicator = opened.enter_context(
                jax_bridge.fused_communicator(
                    mesh, "tp", spec.hidden_size, spec.dtype, decision, transport=transport
                )
            )
            decision = communicator.decision
            ops[f"fused_{transport}"] = _fused(communicator)
        ops["psum_norm"] = psum_norm
        rows = []
        for num_tokens in tqdm(spec.tokens, desc="op, jax", unit="size", leave=False):
            rows += measure_size(spec, num_tokens, mesh, ops)
        return to_plain(OpPart(tuple(rows), decision))


def _fused(communicator: jax_bridge.Communicator) -> Op:
    """Not in place, as in PyTorch: the residuals come round again, so XLA would copy each before its call."""
    return functools.partial(
        jax_bridge.allreduce_residual_rmsnorm,
        axis_name="tp",
        eps=EPS,
        weight_bias=WEIGHT_BIAS,
        comm=communicator,
        in_place=False,
    )


def psum_norm(partial: jax.Array, residual: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What one writes without a fused op."""
    residual = residual + jax.lax.psum(partial, "tp")
    wide = residual.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPS)
    return residual, (wide * scale * (WEIGHT_BIAS + weight.astype(jnp.float32))).astype(partial.dtype)


@dataclass(frozen=True)
class Inputs:
    """partial [R * T, D] over the ranks; residuals [T, D] and weight [D] on all of them; float64 of call 0."""

    partial: jax.Array
    residuals: tuple[jax.Array, ...]
    weight: jax.Array
    expected: tuple[np.ndarray, np.ndarray]


def make_inputs(spec: OpSpec, num_tokens: int, mesh: Mesh) -> Inputs:
    random = np.random.default_rng(0)

    def put(shape: tuple[int, ...], where: P, scale: float = 1.0) -> jax.Array:
        values = random.standard_normal(shape, np.float32) * np.float32(scale)
        return jax.device_put(jnp.asarray(values, spec.dtype), NamedSharding(mesh, where))

    shape = (num_tokens, spec.hidden_size)
    partial = put((spec.tp * num_tokens, spec.hidden_size), P("tp"))
    sets = spec.residual_sets(num_tokens, cache_bytes=cache_bytes(spec.device))
    residuals = tuple(put(shape, P()) for _ in range(sets))
    weight = put((spec.hidden_size,), P(), 0.1)
    parts = np.asarray(partial).astype(np.float64).reshape(spec.tp, *shape)
    added = np.asarray(residuals[0]).astype(np.float64) + parts.sum(0)
    scale = 1 / np.sqrt((added * added).mean(-1, keepdims=True) + EPS)
    normed = added * scale * (WEIGHT_BIAS + np.asarray(weight).astype(np.float64))
    return Inputs(partial, residuals, weight, (added, normed))


class Chain:
    """Chains of one op, compiled in two lengths, checked before they are timed."""

    def __init__(self, name: str, op: Op, spec: OpSpec, inputs: Inputs, mesh: Mesh, pool: Executor) -> None:
        self._name, self._op, self._spec, self._inputs, self._mesh = name, op, spec, inputs, mesh
        self.calls, self._short = CALLS[spec.device, name == "psum_norm"], SHORT[spec.device]
        self._compiled = {count: pool.submit(self._compile, count) for count in (self.calls, self._short)}

    def _program(self, count: int) -> Any:
        """A function of the inputs: `count` calls -> (the last outputs, those of call 0)."""

        @jax.jit  # traced once for all blocks
        def block(partial: jax.Array, residuals: tuple[jax.Array, ...], weight: jax.Array) -> Any:
            outputs = [self._op(partial, residuals[0], weight)]
            for residual in residuals[1:]:
                outputs.append(self._op(outputs[-1][1], residual, weight))
            return outputs[-1], outputs[0]

        def chain(partial: jax.Array, residuals: tuple[jax.Array, ...], weight: jax.Array) -> Any:
            last, first = None, None
            for start in range(0, count, BLOCK):
                mine = [
                    residuals[number % len(residuals)] for number in range(start, min(start + BLOCK, count))
                ]
                last, opening = block(partial if last is None else last[1], tuple(mine), weight)
                first = opening if first is None else first
            return last, first

        spread = P("tp")
        return jax.shard_map(
            chain,
            mesh=self._mesh,
            in_specs=(spread, P(), P()),
            out_specs=((spread, spread), (spread, spread)),
            check_vma=False,
        )

    @property
    def _operands(self) -> tuple[Any, ...]:
        return self._inputs.partial, self._inputs.residuals, self._inputs.weight

    def _compile(self, count: int) -> Any:
        return jax.jit(self._program(count)).lower(*self._operands).compile() if count else None

    def prepare(self) -> float:
        """Compiles, checks and warms up -> the largest error of call 0. RuntimeError where it must not be timed."""
        self.counts = ReductionCounts(unfused=self.calls)
        if self._name != "psum_norm":
            report = jax_bridge.explain(self._program(self.calls), *self._operands)
            self.counts = report.counts
            if self.counts.fused != self.calls:
                raise RuntimeError(f"the column {self._name} is not fused:\n{report}")
        error = _check(self._name, self._run(self.calls)[1], self._inputs.expected, self._spec)
        for count in (self.calls, self._short) * WARMUPS:
            self._run(count)
        self._start_us = statistics.median(self._time_us(self._short) for _ in range(self._spec.repeats))
        return error

    def _run(self, count: int) -> Any:
        program = self._compiled[count].result()
        return jax.block_until_ready(program(*self._operands)) if program else None

    def _time_us(self, count: int) -> float:
        start = time.perf_counter()
        self._run(count)
        return (time.perf_counter() - start) * 1e6

    def sample_us(self) -> float:
        """Microseconds a call."""
        return (self._time_us(self.calls) - (self._start_us if self._short else 0)) / (
            self.calls - self._short
        )


def measure_size(spec: OpSpec, num_tokens: int, mesh: Mesh, ops: dict[str, Op]) -> list[OpRow]:
    """All ops at one size, in turn, so that a drift of the clock meets all of them alike."""
    inputs = make_inputs(spec, num_tokens, mesh)
    with ThreadPoolExecutor() as pool:
        chains = {name: Chain(name, op, spec, inputs, mesh, pool) for name, op in ops.items()}
    errors = {name: chain.prepare() for name, chain in chains.items()}
    samples: dict[str, list[float]] = {name: [] for name in chains}
    for _ in range(spec.repeats):
        for name, chain in chains.items():
            samples[name].append(chain.sample_us())
    return [
        OpRow(
            framework="jax",
            method=name,
            num_tokens=num_tokens,
            timing=summarize(samples[name]),
            wire_bytes=spec.wire_bytes(num_tokens),
            floor_us=None,
            max_error=errors[name],
            fused=chain.counts.fused * spec.repeats,
            unfused=chain.counts.unfused * spec.repeats,
        )
        for name, chain in chains.items()
    ]


def _check(
    name: str, got: tuple[jax.Array, jax.Array], expected: tuple[np.ndarray, np.ndarray], spec: OpSpec
) -> float:
    """The largest |got - float64| / (1 + |float64|) on any rank. RuntimeError above what roundings explain."""
    worst = 0.0
    for value, want in zip(got, expected, strict=True):
        by_rank = np.asarray(value).astype(np.float64).reshape(spec.tp, *want.shape)
        error = np.abs(by_rank - want) / (1 + np.abs(want))
        worst = max(worst, float(np.nan_to_num(error, nan=np.inf).max()))
    if worst > TOLERANCE[spec.dtype]:
        raise RuntimeError(f"{name} is wrong by {worst:.2g} (allowed {TOLERANCE[spec.dtype]:.2g}): not timed")
    return worst
