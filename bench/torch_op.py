"""The reduction in PyTorch, every way to run it, on one rank of the group that runs them together.

Shapes: T tokens, D hidden, R ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from bench.clock import Call, make_clock
from bench.codec import from_plain, to_plain
from bench.result import OpPart, OpRow, OpSpec
from bench.stats import slowest, summarize
from core_torch.kernels.allreduce import ReduceGroup, allreduce_residual_rmsnorm, unfused
from core_torch.kernels.norm import rms_norm_reference
from core_torch.kernels.selftest import TOLERANCE
from core_torch.parallel import open_parallel, rank_device
from shared_config import (
    FusionRequest,
    ModelFacts,
    ParallelLayout,
    probe_flashinfer,
    probe_hardware,
    resolve_fusion,
)

EPS = 1e-6
WEIGHT_BIAS = 1.0
FUSED_METHODS = ("fused", "fused_oneshot", "fused_twoshot")


def run(plain: dict[str, Any]) -> dict[str, Any]:
    """The part of `launch.run_part`: one rank's whole life."""
    spec = from_plain(OpSpec, plain)
    device = rank_device(int(os.environ["LOCAL_RANK"]), spec.device, spec.tp)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    flashinfer, layout = probe_flashinfer(), ParallelLayout(tp_size=spec.tp)
    request = FusionRequest(
        mode="on",  # a fused column that cannot fuse is an error, with the rule that says no
        backend="trtllm" if spec.device == "cuda" else "reference",
        # The limit is what this measures, so it must not stop the measurement.
        max_bytes=max(spec.tokens) * spec.hidden_size * dtype.itemsize,
    )
    facts = ModelFacts("Qwen3NextForCausalLM", spec.hidden_size, dtype.itemsize)
    decision = resolve_fusion(facts, layout, probe_hardware(), flashinfer, request)
    with open_parallel(decision, layout, flashinfer, device=device, dtype=dtype) as parallel:
        rows = []
        sizes = tqdm(spec.tokens, desc="op, torch", unit="size", disable=parallel.rank != 0, leave=False)
        with torch.inference_mode():
            for num_tokens in sizes:
                rows += measure_size(spec, num_tokens, parallel.attention, device, dtype)
        return to_plain(OpPart(tuple(rows), parallel.decision.to_json()))


class Inputs:
    """Several sets of operands, more than a cache holds where the sizes allow it, to be used in turn.

    An all-reduce in place changes its operand; `restore` brings all of them back.
    """

    def __init__(
        self, spec: OpSpec, num_tokens: int, rank: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (num_tokens, spec.hidden_size)
        self.count = _sets_beyond_cache(
            3 * num_tokens * spec.hidden_size * dtype.itemsize, spec.calls, device
        )
        own = torch.Generator(device).manual_seed(1 + rank)
        common = torch.Generator(device).manual_seed(0)

        def random(count: int, generator: torch.Generator) -> Tensor:
            return torch.randn(count, *shape, generator=generator, device=device).to(dtype)

        self._originals = random(self.count, own)
        self._partials = self._originals.clone()
        self._residuals = random(self.count, common)
        weight = torch.randn(spec.hidden_size, generator=common, device=device) / 10
        self.weight = weight.to(dtype)

    def __getitem__(self, call: int) -> tuple[Tensor, Tensor]:
        """partial and residual [T, D] of the call with this number."""
        return self._partials[call % self.count], self._residuals[call % self.count]

    def restore(self) -> None:
        self._partials.copy_(self._originals)


def _sets_beyond_cache(set_bytes: int, calls: int, device: torch.device) -> int:
    """Sets that together are twice the GPU's L2; at most one for each call, at least two."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(calls, -(-2 * cache // set_bytes)))


def measure_size(
    spec: OpSpec, num_tokens: int, group: ReduceGroup, device: torch.device, dtype: torch.dtype
) -> list[OpRow]:
    """All methods at one size, in turn, so that a drift of the clock meets all of them alike."""
    inputs = Inputs(spec, num_tokens, group.rank, device, dtype)
    expected = expectation(inputs, group)
    errors, clocks = {}, {}
    for name, call in methods(inputs, num_tokens, group, device).items():
        inputs.restore()
        errors[name] = check(name, num_tokens, call(0), expected, dtype)
        clock = make_clock(call, spec.calls, restore=inputs.restore, counts=group.counts, device=device)
        clock.sample_us()
        if name != "allreduce":  # which is in place, so that its first sum is gone by the last call
            errors[name] = max(errors[name], check(name, num_tokens, clock.first, expected, dtype))
        clocks[name] = clock
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    ran = {}
    for _ in range(spec.repeats):
        for name, clock in clocks.items():
            group.counts.reset()
            samples[name].append(clock.sample_us())
            ran[name] = group.counts.snapshot()
    by_rank = group.comm.allgather(samples)
    rows = []
    for name in clocks:
        fused_calls = _fused_calls(name, num_tokens, spec, ran[name].fused, group)
        message = num_tokens * spec.hidden_size * dtype.itemsize
        rows.append(
            OpRow(
                framework="torch",
                method=name,
                num_tokens=num_tokens,
                timing=summarize(slowest([samples_of[name] for samples_of in by_rank])),
                wire_bytes=2 * (group.size - 1) * message // group.size,
                floor_us=None,
                max_error=max(group.comm.allgather(errors[name])),
                fused=fused_calls * spec.repeats,
                unfused=ran[name].unfused * spec.repeats,
            )
        )
    return rows


def _fused_calls(name: str, num_tokens: int, spec: OpSpec, counted: int, group: ReduceGroup) -> int:
    """Fused reductions of one sample. Forced variants call the kernel itself, which has no other way to run."""
    if name != "fused":
        return spec.calls if name in FUSED_METHODS else 0
    if counted != spec.calls:
        raise RuntimeError(
            f"the fused column at {num_tokens} tokens ran {counted} of {spec.calls} reductions fused: "
            f"{group.decision.fuses(num_tokens, side=group.side).reason}"
        )
    return counted


def methods(inputs: Inputs, num_tokens: int, group: ReduceGroup, device: torch.device) -> dict[str, Call]:
    """Name -> call(number) -> (residual, normed), or the sum alone for "allreduce"."""

    def engine(pay: Callable[..., tuple[Tensor, Tensor]]) -> Call:
        def call(number: int) -> tuple[Tensor, Tensor]:
            partial, residual = inputs[number]
            return pay(partial, residual, inputs.weight, group=group, eps=EPS, weight_bias=WEIGHT_BIAS)

        return call

    def allreduce(number: int) -> Tensor:
        partial, _ = inputs[number]
        dist.all_reduce(partial, group=group.device_group)
        return partial

    calls: dict[str, Call] = {"fused": engine(allreduce_residual_rmsnorm)}
    if device.type == "cuda":
        from bench.add_norm import add_norm

        def allreduce_norm(number: int) -> tuple[Tensor, Tensor]:
            _, residual = inputs[number]
            return add_norm(allreduce(number), residual, inputs.weight, eps=EPS, weight_bias=WEIGHT_BIAS)

        calls["fused_oneshot"] = _forced(inputs, group, oneshot=True)
        if num_tokens > group.size:  # the kernel splits tokens over ranks
            calls["fused_twoshot"] = _forced(inputs, group, oneshot=False)
        calls["allreduce_norm"] = allreduce_norm
    return calls | {"unfused": engine(unfused), "allreduce": allreduce}


def _forced(inputs: Inputs, group: ReduceGroup, *, oneshot: bool) -> Call:
    """FlashInfer's kernel itself, on the engine's workspace, with the algorithm that the engine leaves to a rule."""
    assert group.workspace is not None
    kernel = group.workspace.raw()

    def call(number: int) -> tuple[Tensor, Tensor]:
        partial, residual = inputs[number]
        out_residual, out_normed = torch.empty_like(partial), torch.empty_like(partial)
        kernel.function(
            partial,
            kernel.world_size,
            kernel.rank,
            *partial.shape,
            kernel.workspace_ptrs,
            True,  # launch_with_pdl
            oneshot,
            True,  # trigger_completion_at_end
            partial.dtype != torch.float32,  # fp32_acc
            1,  # kARResidualRMSNorm
            None,  # allreduce_out
            residual,
            out_residual,
            out_normed,
            None,  # quant_out
            None,  # scale_out
            inputs.weight,
            EPS,
            None,  # scale_factor
            None,  # layout_code
            None,  # block_quant_group_size
            WEIGHT_BIAS,
        )
        return out_residual, out_normed

    return call


def expectation(inputs: Inputs, group: ReduceGroup) -> tuple[Tensor, Tensor, Tensor]:
    """float64 of call 0: (sum, residual + sum, norm), each [T, D]."""
    inputs.restore()
    partial, residual = inputs[0]
    parts = [torch.empty_like(partial) for _ in range(group.size)]
    dist.all_gather(parts, partial, group=group.device_group)
    total = torch.stack([part.double() for part in parts]).sum(0)
    added = residual.double() + total
    return total, added, rms_norm_reference(added, inputs.weight, eps=EPS, weight_bias=WEIGHT_BIAS)


def check(
    name: str,
    num_tokens: int,
    got: Tensor | tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
) -> float:
    """The largest |got - expected| / (1 + |expected|). RuntimeError above what roundings explain."""
    pairs = [(got, expected[0])] if isinstance(got, Tensor) else zip(got, expected[1:], strict=True)
    worst = 0.0
    for value, want in pairs:
        error = ((value.double() - want).abs() / (1 + want.abs())).nan_to_num(nan=torch.inf)
        worst = max(worst, float(error.max()))
    if worst > TOLERANCE[dtype]:
        raise RuntimeError(
            f"{name} at {num_tokens} tokens is wrong by {worst:.2g} (allowed {TOLERANCE[dtype]:.2g}): not timed"
        )
    return worst
