"""`python -m core_torch trace`: what this engine computes for a parity job, layer by layer, as one file.

Run it under torchrun for more than one rank; rank 0 writes.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core_torch.kernels.allreduce import allreduce_residual_rmsnorm
from core_torch.kernels.choice import describe
from core_torch.layers.norm import WEIGHT_BIAS
from core_torch.llm import LLM
from core_torch.models.qwen3_next import Qwen3Next
from core_torch.runner import ModelRunner
from core_torch.session import Session
from shared_config import cli
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

Points = dict[str, np.ndarray]


def add_trace(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("trace", help="record a parity job (see jax_bridge parity)")
    cli.add_engine_options(parser)
    parser.add_argument("--job", required=True, type=Path, metavar="JSON")
    parser.add_argument("--out", required=True, type=Path, metavar="NPZ")
    parser.add_argument("--max-step-tokens", type=int, default=256, metavar="N", help="prompt tokens a step")
    parser.add_argument("--max-num-seqs", type=int, default=32, metavar="N", help="sequences at a time")
    parser.set_defaults(run=run_trace)


def run_trace(args: argparse.Namespace) -> int:
    limits = {"max_step_tokens": args.max_step_tokens, "max_num_seqs": args.max_num_seqs}
    with LLM(args.model, **limits, **cli.engine_options(args)) as llm:
        if llm._session is None:
            raise ValueError(
                f"--tp {args.tp} needs torchrun: python -m torch.distributed.run -m core_torch trace"
            )
        record = make_record(llm._session, TraceJob.load(args.job))
        if llm._session.runner.parallel.rank == 0:
            record.save(args.out)
    return 0


def make_record(session: Session, job: TraceJob, engine: str = "torch") -> Record:
    """This rank's answer to `job`; every rank calls it alike, and the answers are the same."""
    runner, decision = session.runner, session.decision
    dtype = next(runner.model.parameters()).dtype
    record = Record(
        engine=engine,
        dtype=str(dtype).removeprefix("torch."),
        fused=decision.enabled,
        why=decision.reason,
        versions={
            "torch": torch.__version__,
            "device": _device_name(runner.parallel.device),
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
    graphs, runner.graphs = runner.graphs, None  # a replayed graph calls nothing that could be recorded
    try:
        with recorded(runner.model) as points:
            record.rows, record.points = feed(
                functools.partial(_run_step, runner, points),
                session.scheduler,
                job.prompts,
                continuations_of(job, record),
            )
    finally:
        runner.graphs = graphs
    return record


def _run_step(runner: ModelRunner, points: Points, step: Step) -> Points:
    points.clear()
    runner.run(step)
    return dict(points)


@torch.inference_mode()
def _run_op(
    runner: ModelRunner, num_tokens: int, dtype: torch.dtype, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    group = runner.parallel.mlp
    partial, residual, weight = op_operands(num_tokens, runner.config.hidden_size, group.size, seed)
    device = runner.parallel.device
    operands = (torch.from_numpy(x).to(device, dtype) for x in (partial[group.rank], residual, weight))
    outputs = allreduce_residual_rmsnorm(*operands, group=group, eps=OP_EPS, weight_bias=WEIGHT_BIAS)
    return _to_numpy(outputs[0]), _to_numpy(outputs[1])


@contextmanager
def recorded(model: Qwen3Next) -> Iterator[Points]:
    """While this is open, each pass of `model` leaves the residual stream at every point, and its logits, here."""
    points: Points = {}
    names = point_names(len(model.layers))
    norms = [
        norm for layer in model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]

    def paying(name: str, pay: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., Any]:
        def recorded(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            residual, normed = pay(*args)
            points[name] = _to_numpy(residual)
            return residual, normed

        return recorded

    payers = [*norms[1:], model.norm]  # the first norm has nothing to pay
    for name, norm in zip(names[1:], payers, strict=True):
        norm.pay = paying(name, norm.pay)
    hooks = [
        model.embed_tokens.register_forward_hook(lambda *a: points.update({names[0]: _to_numpy(a[-1])})),
        model.lm_head.register_forward_hook(lambda *a: points.update({LOGITS: _to_numpy(a[-1])})),
    ]
    try:
        yield points
    finally:
        for norm in payers:
            del norm.pay  # the class's own is behind it
        for hook in hooks:
            hook.remove()


def _to_numpy(x: torch.Tensor) -> np.ndarray:
    return x.float().cpu().numpy().copy()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
