"""What the JAX engine computes for a parity job, layer by layer: the mirror of `core_torch.trace`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from core_torch.kernels.choice import describe
from jax_bridge.batch import Batch
from jax_bridge.cache import LayerCache
from jax_bridge.layers.norm import WEIGHT_BIAS
from jax_bridge.models.qwen3_next import Qwen3Next
from jax_bridge.op import allreduce_residual_rmsnorm
from jax_bridge.parallel import COMPILER_OPTIONS
from jax_bridge.runner import ModelRunner, Program
from jax_bridge.session import Session
from shared_config.generation import Request
from shared_config.scheduler import Step
from shared_config.trace import (
    LOGITS,
    OP_EPS,
    Greedy,
    Record,
    TraceJob,
    continuations_of,
    feed,
    op_operands,
    point_names,
)


def make_record(session: Session, job: TraceJob, engine: str = "jax") -> Record:
    """The answer to `job`."""
    runner, decision, dtype = session.runner, session.decision, session.spec.dtype
    record = Record(
        engine=engine,
        dtype=dtype.name,
        fused=decision.enabled,
        why=decision.reason,
        versions={
            "jax": jax.__version__,
            "device": runner.parallel.mesh.devices.flat[0].device_kind,
            "kernels": describe(runner.kernels),
        },
    )
    for num_tokens in job.op_tokens:
        residual, normed = _run_op(runner, num_tokens, dtype, job.seed)
        record.op |= {f"{num_tokens}/residual": residual, f"{num_tokens}/normed": normed}
    if job.max_tokens:
        requests = [Request(i, None, ids, job.greedy_params(), 0) for i, ids in enumerate(job.prompts)]
        final = {o.index: o for outputs in session.generate(requests) for o in outputs}
        record.greedy = [Greedy.of(final[i]) for i in range(len(requests))]
    run = functools.partial(_run_step, runner, runner.program(_recorded_pass))
    record.rows, record.points = feed(run, session.scheduler, job.prompts, continuations_of(job, record))
    return record


def _run_step(runner: ModelRunner, program: Program, step: Step) -> dict[str, np.ndarray]:
    points, _ = runner.execute(program, runner.batch(step, all_logits=True))
    return {
        name: np.asarray(values.astype(jnp.float32))[: step.num_tokens] for name, values in points.items()
    }


def _recorded_pass(
    model: Qwen3Next, cache: list[LayerCache], batch: Batch
) -> tuple[dict[str, jax.Array], list[LayerCache]]:
    points = record_points(model)
    logits, cache = model(batch, cache)
    return points | {LOGITS: logits}, cache


def record_points(model: Qwen3Next) -> dict[str, jax.Array]:
    """Where the next pass of `model`, once it is traced, leaves the residual stream at every point.

    `model` is the one that `nnx.merge` made for this trace, so nothing has to be undone.
    """
    points: dict[str, jax.Array] = {}
    names = point_names(len(model.layers))
    norms = [
        norm for layer in model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]

    def paying(name: str, pay: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., Any]:
        def recorded(*args: Any) -> tuple[jax.Array, jax.Array]:
            points[name], normed = pay(*args)
            return points[name], normed

        return recorded

    def embedding(embed: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        def recorded(token_ids: jax.Array) -> jax.Array:
            points[names[0]] = embed(token_ids)
            return points[names[0]]

        return recorded

    model.embed_tokens = embedding(model.embed_tokens)  # type: ignore[assignment]
    for name, norm in zip(
        names[1:], [*norms[1:], model.norm], strict=True
    ):  # the first norm has nothing to pay
        norm.pay = paying(name, norm.pay)
    return points


def _run_op(
    runner: ModelRunner, num_tokens: int, dtype: jnp.dtype, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    axis, mesh = runner.parallel.mlp, runner.parallel.mesh
    partial, residual, weight = op_operands(num_tokens, runner.config.hidden_size, axis.size, seed)

    def op(partial: jax.Array, residual: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        return allreduce_residual_rmsnorm(
            partial[0],
            residual,
            weight,
            axis_name=axis.name,
            eps=OP_EPS,
            weight_bias=WEIGHT_BIAS,
            comm=axis.comm,
            side=axis.side,
        )

    sharded = jax.shard_map(op, mesh=mesh, in_specs=(P(axis.name), P(), P()), out_specs=P())
    operands = (jnp.asarray(x, dtype) for x in (partial, residual, weight))
    new_residual, normed = jax.jit(sharded, compiler_options=COMPILER_OPTIONS)(*operands)
    return np.asarray(new_residual, np.float32), np.asarray(normed, np.float32)
