"""The reduction in PyTorch, every way to run it, on one rank of the group that runs them together.

As in a model, each call reduces what the call before it returned, so the partial sums come from the cache; the
residuals rotate over more memory than a cache holds, where the sizes allow it, because in a model the weights have
pushed them out. Shapes: T tokens, D hidden, R ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from bench.clock import make_clock
from bench.codec import from_plain, to_plain
from bench.rates import cache_bytes
from bench.result import OpPart, OpRow, OpSpec
from bench.stats import slowest, summarize
from core_torch.kernels.allreduce import ReduceGroup, allreduce_residual_rmsnorm, unfused
from core_torch.kernels.choice import KernelOptions, choose_kernels
from core_torch.kernels.flashinfer_api import RawKernel
from core_torch.kernels.norm import rms_norm_reference
from core_torch.kernels.selftest import TOLERANCE
from core_torch.kernels.startup import start_fusion
from core_torch.parallel import open_parallel, rank_device
from shared_config import ParallelLayout, probe_flashinfer, probe_hardware, resolve_fusion

EPS = 1e-6
WEIGHT_BIAS = 1.0

# call(number, partial [T, D]) -> (residual, normed), or (sum,). The last one is the next call's partial.
Call = Callable[[int, Tensor], tuple[Tensor, ...]]


def run(plain: dict[str, Any]) -> dict[str, Any]:
    """The part of `launch.run_part`: one rank's whole life."""
    spec = from_plain(OpSpec, plain)
    device = rank_device(int(os.environ["LOCAL_RANK"]), spec.device, spec.tp)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    flashinfer, layout = probe_flashinfer(), ParallelLayout(tp_size=spec.tp)
    decision = resolve_fusion(spec.model_facts(), layout, probe_hardware(), flashinfer, spec.fusion_request())
    most = max(spec.tokens)
    with ExitStack() as stack:
        parallel = stack.enter_context(
            open_parallel(decision, layout, flashinfer, device=device, dtype=dtype, max_tokens=most)
        )
        group = parallel.attention
        choose_kernels([group], KernelOptions(dtype, device, max_num_seqs=most))
        kernel = None
        if device.type == "cuda":
            _, workspace = start_fusion(
                decision.without_pair("FlashInfer's kernel is measured alone"),
                group.comm,
                hidden_size=spec.hidden_size,
                dtype=dtype,
                device=device,
                flashinfer=flashinfer,
                device_group=group.device_group,
                max_tokens=most,
            )
            assert workspace is not None  # fusion is demanded
            kernel = stack.enter_context(workspace).raw()
        rows = []
        sizes = tqdm(spec.tokens, desc="op, torch", unit="size", disable=parallel.rank != 0, leave=False)
        with torch.inference_mode():
            for num_tokens in sizes:
                rows += measure_size(spec, num_tokens, group, kernel, device, dtype)
        return to_plain(OpPart(tuple(rows), parallel.decision))


class Inputs:
    """One rank's operands. `start` is the partial [T, D] of call 0, which a call may overwrite."""

    def __init__(
        self, spec: OpSpec, num_tokens: int, rank: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        own = torch.Generator(device).manual_seed(1 + rank)
        common = torch.Generator(device).manual_seed(0)

        def random(generator: torch.Generator, *shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        sets = spec.residual_sets(num_tokens, cache_bytes=cache_bytes(spec.device))
        self._original = random(own, num_tokens, spec.hidden_size)
        self.start = self._original.clone()
        self._residuals = random(common, sets, num_tokens, spec.hidden_size)
        self.weight = random(common, spec.hidden_size) / 10

    def residual(self, number: int) -> Tensor:
        return self._residuals[number % len(self._residuals)]

    def restore(self) -> None:
        self.start.copy_(self._original)


def measure_size(
    spec: OpSpec,
    num_tokens: int,
    group: ReduceGroup,
    kernel: RawKernel | None,
    device: torch.device,
    dtype: torch.dtype,
) -> list[OpRow]:
    """All methods at one size, in turn, so that a drift of the clock meets all of them alike. `kernel`: FlashInfer's,
    on GPUs."""
    inputs = Inputs(spec, num_tokens, group.rank, device, dtype)
    expected = expectation(inputs, group)
    errors, clocks = {}, {}
    for name, call in methods(inputs, num_tokens, group, kernel).items():
        inputs.restore()
        errors[name] = check(f"{name} at {num_tokens} tokens", call(0, inputs.start), expected, dtype)
        clocks[name] = checked_clock(name, call, spec.calls, inputs, group, dtype)
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    ran = {}
    for _ in range(spec.repeats):
        for name, clock in clocks.items():
            group.counts.reset()
            samples[name].append(clock.sample_us())
            ran[name] = group.counts.snapshot()
    if ran["fused"].fused != spec.calls:
        reason = group.decision.fuses(num_tokens, side=group.side, itemsize=dtype.itemsize).reason
        raise RuntimeError(
            f"the fused column ran {ran['fused'].fused} of {spec.calls} reductions fused: {reason}"
        )
    by_rank = group.comm.allgather(samples)
    return [
        OpRow(
            framework="torch",
            method=name,
            num_tokens=num_tokens,
            timing=summarize(slowest([of_rank[name] for of_rank in by_rank])),
            wire_bytes=spec.wire_bytes(num_tokens),
            floor_us=None,
            max_error=max(group.comm.allgather(errors[name])),
            fused=ran[name].fused * spec.repeats,
            unfused=ran[name].unfused * spec.repeats,
        )
        for name in clocks
    ]


def checked_clock(
    name: str, call: Call, calls: int, inputs: Inputs, group: ReduceGroup, dtype: torch.dtype
) -> Any:
    """A clock for a chain of calls, once it gives what the same chain gives outside a CUDA graph."""

    def chain() -> tuple[Tensor, ...]:
        outputs = call(0, inputs.start)
        for number in range(1, calls):
            outputs = call(number, outputs[-1])
        return outputs

    inputs.restore()
    plain = chain()
    clock = make_clock(chain, calls, restore=inputs.restore, counts=group.counts, device=inputs.start.device)
    clock.sample_us()
    if name != "allreduce":  # whose sums of sums leave the dtype's range
        check(f"{name} in the timed chain", clock.last, tuple(value.double() for value in plain), dtype)
    return clock


def methods(inputs: Inputs, num_tokens: int, group: ReduceGroup, kernel: RawKernel | None) -> dict[str, Call]:
    """Every way to run the reduction on this device at this size, by its name in `result.METHODS`."""

    def engine(pay: Callable[..., tuple[Tensor, Tensor]]) -> Call:
        return lambda number, partial: pay(
            partial, inputs.residual(number), inputs.weight, group=group, eps=EPS, weight_bias=WEIGHT_BIAS
        )

    def allreduce(number: int, partial: Tensor) -> tuple[Tensor]:
        del number
        dist.all_reduce(partial, group=group.device_group)
        return (partial,)

    calls: dict[str, Call] = {"fused": engine(allreduce_residual_rmsnorm)}
    if kernel is not None:
        from bench.add_norm import add_norm

        def allreduce_norm(number: int, partial: Tensor) -> tuple[Tensor, Tensor]:
            dist.all_reduce(partial, group=group.device_group)
            residual = inputs.residual(number)
            return add_norm(partial, residual, inputs.weight, eps=EPS, weight_bias=WEIGHT_BIAS)

        calls["fused_oneshot"] = forced(kernel, inputs, group, oneshot=True)
        if num_tokens > group.size:  # the kernel splits tokens over ranks
            calls["fused_twoshot"] = forced(kernel, inputs, group, oneshot=False)
        calls["allreduce_norm"] = allreduce_norm
    return calls | {"unfused": engine(unfused), "allreduce": allreduce}


def forced(kernel: RawKernel, inputs: Inputs, group: ReduceGroup, *, oneshot: bool) -> Call:
    """FlashInfer's kernel itself, on a workspace of its own, with the algorithm that the engine leaves to a rule."""

    def call(number: int, partial: Tensor) -> tuple[Tensor, Tensor]:
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
            inputs.residual(number),
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
        group.counts.add(fused=1)
        return out_residual, out_normed

    return call


def expectation(inputs: Inputs, group: ReduceGroup) -> tuple[Tensor, ...]:
    """float64 of call 0: (residual + sum, its norm, the sum), each [T, D]."""
    parts = [torch.empty_like(inputs.start) for _ in range(group.size)]
    dist.all_gather(parts, inputs.start, group=group.device_group)
    total = torch.stack([part.double() for part in parts]).sum(0)
    added = inputs.residual(0).double() + total
    return added, rms_norm_reference(added, inputs.weight, eps=EPS, weight_bias=WEIGHT_BIAS), total


def check(what: str, got: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> float:
    """The largest |got - expected| / (1 + |expected|). RuntimeError above what roundings explain."""
    wanted = expected[-1:] if len(got) == 1 else expected  # a sum alone
    worst = 0.0
    for value, want in zip(got, wanted, strict=False):
        error = ((value.double() - want).abs() / (1 + want.abs())).nan_to_num(nan=torch.inf)
        worst = max(worst, float(error.max()))
    if worst > TOLERANCE[dtype]:
        raise RuntimeError(f"{what} is wrong by {worst:.2g} (allowed {TOLERANCE[dtype]:.2g}): not timed")
    return worst
