"""Times the project's own kernel that two ranks run together, `pair_allreduce`, beside plain torch: the part of
`python -m bench kernels` that one device alone cannot run.

Unlike in `torch_op.py`, where a partial sum is what the call before returned, all operands come out of memory: what is
looked for is the share of the memory's and the link's rates. Shapes: T tokens, D hidden, K choices of experts a token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from bench.clock import make_clock
from bench.codec import from_plain, to_plain
from bench.kernel_cases import Call, Case, moe_shapes
from bench.kernel_operands import Rank
from bench.rates import cache_bytes
from bench.result import KernelPart, KernelRow, KernelSpec
from bench.stats import Timing, slowest, summarize
from bench.torch_kernels import check_distance, distance, kernel_row
from core_torch.kernels.allreduce import ReduceGroup, fused
from core_torch.kernels.choice import KernelOptions, choose_kernels, describe
from core_torch.kernels.contract import add_rmsnorm
from core_torch.kernels.moe_prefill import ChoiceParts, check_moe_prefill
from core_torch.kernels.native import Answer, first_failure
from core_torch.kernels.pair_allreduce import pair_answer
from core_torch.layers.norm import WEIGHT_BIAS
from core_torch.parallel import open_parallel, rank_device
from shared_config import ParallelLayout, probe_flashinfer, probe_hardware, resolve_fusion


def run(plain: dict[str, Any]) -> dict[str, Any]:
    """The part of `launch.run_part`: one of two ranks. RuntimeError for a kernel whose result is not plain torch's."""
    spec = from_plain(KernelSpec, plain)
    device = rank_device(int(os.environ["LOCAL_RANK"]), spec.device, spec.tp)
    flashinfer, layout = probe_flashinfer(), ParallelLayout(tp_size=spec.tp)
    decision = resolve_fusion(spec.config, layout, probe_hardware(), flashinfer, spec.fusion_request())
    dtype: torch.dtype = getattr(torch, spec.dtype)
    most = max(count * length for count, length in spec.passes)
    rows: list[KernelRow] = []
    with (
        torch.inference_mode(),
        open_parallel(decision, layout, flashinfer, device=device, dtype=dtype, max_tokens=most) as parallel,
    ):
        group = parallel.attention
        answers = choose_kernels([group], KernelOptions(dtype, device, max_num_seqs=max(spec.batches)))
        rank = Rank(spec, device, cache_bytes(spec.device))
        quiet = group.rank != 0
        for case in tqdm(
            cases(rank, group), desc="kernels of two ranks", unit="case", disable=quiet, leave=False
        ):
            rows.append(measure(case, spec.repeats, group, device))
    return to_plain(KernelPart(tuple(rows), (f"two ranks: kernels {describe(answers)}",)))


def cases(rank: Rank, group: ReduceGroup) -> Iterator[Case]:
    """All of them, one at a time, on every rank the same."""
    for num_tokens in dict.fromkeys(count * length for count, length in rank.spec.passes):
        yield _pair_allreduce(rank, group, num_tokens)
        yield from _choices(rank, group, num_tokens)


def _streams(rank: Rank, group: ReduceGroup, sets: int, T: int) -> tuple[Tensor, Tensor]:
    """(residuals [sets, T, D], weight [D]), the same on both ranks; what is drawn after them is each rank's own."""
    torch.manual_seed(0)
    residuals, weight = rank.randn(sets, T, rank.config.hidden_size), rank.randn(rank.config.hidden_size) / 10
    torch.manual_seed(1 + group.rank)
    return residuals, weight


def _pair_allreduce(rank: Rank, group: ReduceGroup, T: int) -> Case:
    D, eps = rank.config.hidden_size, rank.config.rms_norm_eps
    moved = T * D * rank.dtype.itemsize
    sets = rank.sets(4 * moved)
    residuals, weight = _streams(rank, group, sets, T)
    originals = rank.randn(sets, T, D)
    partials = originals.clone()

    def plain(i: int) -> Tensor:
        dist.all_reduce(partials[i], group=group.device_group)
        return add_rmsnorm(partials[i], residuals[i], weight, eps, WEIGHT_BIAS)[1]

    return Case(
        kernel="pair_allreduce",
        phase="prefill",
        num_tokens=T,
        length=None,
        answer=_pair_takes(group, T, rank.dtype.itemsize),
        compiled=lambda i: fused(
            partials[i], residuals[i], weight, group=group, eps=eps, weight_bias=WEIGHT_BIAS
        )[1],
        plain=plain,
        num_sets=sets,
        memory_bytes=4 * moved + weight.nbytes,
        wire_bytes=moved,
        restore=lambda: partials.copy_(originals),
    )


def _choices(rank: Rank, group: ReduceGroup, T: int) -> Iterator[Case]:
    """A token's choices added on the way, and before it in a kernel of their own: the same work, so the same least."""
    D, eps, shapes = rank.config.hidden_size, rank.config.rms_norm_eps, moe_shapes(rank)
    N, K = shapes["num_experts"], shapes["top_k"]
    moved = T * D * rank.dtype.itemsize
    sets = rank.sets(K * moved)
    residuals, weight = _streams(rank, group, sets, T)
    parts = rank.randn(sets, T * K, D)
    experts = torch.randint(0, N, (sets, T, K), dtype=torch.int32, device=rank.device)
    choices = [ChoiceParts(parts[i], experts[i], N) for i in range(sets)]
    pay = partial(fused, weight=weight, group=group, eps=eps, weight_bias=WEIGHT_BIAS)

    def plain(i: int) -> Tensor:
        summed = parts[i].unflatten(0, (T, K)).float().sum(1).to(rank.dtype)
        dist.all_reduce(summed, group=group.device_group)
        return add_rmsnorm(summed, residuals[i], weight, eps, WEIGHT_BIAS)[1]

    def case(kernel: str, answer: Answer, compiled: Call) -> Case:
        return Case(
            kernel=kernel,
            phase="prefill",
            num_tokens=T,
            length=None,
            answer=answer,
            compiled=compiled,
            plain=plain,
            num_sets=sets,
            memory_bytes=K * moved + experts[0].nbytes + 3 * moved + weight.nbytes,
            wire_bytes=moved,
        )

    makes_parts = rank.options.ask("moe_prefill", check_moe_prefill, **shapes)
    pair = _pair_takes(group, T, rank.dtype.itemsize)
    both = first_failure((makes_parts.usable, makes_parts.reason), (pair.usable, pair.reason))
    apart = "the shared expert has a size of its own, so a rank owes more than a token's choices"
    adds = group.workspace is not None and group.workspace.adds_choices(choices[0])
    yield case(
        "pair_allreduce: choices",
        first_failure(
            (bool(rank.shared), apart),
            (both.usable, both.reason),
            (adds, "the workspace adds no choices of this kind, so they would be added before"),
        ),
        lambda i: pay(choices[i], residuals[i])[1],
    )
    yield case("combine + pair_allreduce", both, lambda i: pay(choices[i].sum(), residuals[i])[1])


def _pair_takes(group: ReduceGroup, T: int, itemsize: int) -> Answer:
    """Whether the engine would run the pair's kernel for this size."""
    usable, fits = pair_answer(group.decision), group.fuses(T, itemsize)
    others = group.decision.max_backend_tokens(itemsize)
    return first_failure(
        (usable.usable, usable.reason),
        (fits.fuses, fits.reason),
        (others < T, f"calls of up to {others} tokens run in the backend's kernel"),
    )


def measure(case: Case, repeats: int, group: ReduceGroup, device: torch.device) -> KernelRow:
    """Collective. All ranks raise alike where one has a wrong result."""
    apart = timing = None
    if case.answer.usable:
        distances = group.comm.allgather(distance(case))
        check_distance(case, *distances)
        apart = max(distances)
        timing = sample(case, case.compiled, repeats, group, device)
    return kernel_row(case, timing, sample(case, case.plain, repeats, group, device), apart)


def sample(case: Case, call: Call, repeats: int, group: ReduceGroup, device: torch.device) -> Timing:
    """Of every set of operands in turn, at the pace of the slower rank."""

    def chain() -> None:
        for i in range(case.num_sets):
            call(i)

    clock = make_clock(chain, case.num_sets, restore=case.restore, counts=group.counts, device=device)
    samples = [clock.sample_us() for _ in range(repeats)]
    return summarize(slowest(group.comm.allgather(samples)))
