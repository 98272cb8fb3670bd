"""The fused op on 2, 4 and 8 GPUs, as far as there are: against float64, in CUDA graphs, across ranks, memory.

Each test is one call on all ranks (NCCL and gloo, one GPU each) that loops inside; data is made and compared on
the device, and what was found comes back once. Shapes: T tokens, D hidden.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from core_torch.kernels import flashinfer_api
from core_torch.kernels.add_norm import add_norm
from core_torch.kernels.allreduce import ReduceGroup, allreduce_residual_rmsnorm
from core_torch.kernels.buffers import FlashInferBuffers
from core_torch.kernels.comm import CommBackend, GlooComm
from core_torch.kernels.contract import add_rmsnorm, sum_in_rank_order
from core_torch.kernels.flashinfer_api import buffer_bytes
from core_torch.kernels.moe_prefill import ChoiceParts
from core_torch.kernels.norm import rms_norm_reference
from core_torch.kernels.pair_allreduce import pair_bytes
from core_torch.kernels.startup import start_fusion
from core_torch.kernels.workspace import Workspace
from shared_config import (
    FlashInferInfo,
    FusionDecision,
    FusionRequest,
    FusionWarning,
    ModelFacts,
    ParallelLayout,
    probe_flashinfer,
    probe_hardware,
    resolve_fusion,
)
from tests.fusion_ranks import ThreadComm, on_threads
from tests.ranks import RankPool

pytestmark = pytest.mark.gpu

WORLDS = (2, 4, 8)
EPS = 1e-6
CHOICES = ((3001, 1), (4097, 12), (2049, 32), (8192, 2))  # tokens, choices of each
HIDDEN = (1024, 2048, 4096, 5120, 7168)
TOKENS = (1, 2, 3, 8, 63, 64, 66, 67, 128, 500, 1000, 2048)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Relative error of a whole output, in the 2-norm, and of its worst element against 1 + |value|.
NORM_TOLERANCE = {torch.float32: 1e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}
WORST_TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
SLACK_BYTES = 2 << 20  # one page of the driver's allocator


@pytest.fixture(scope="module", params=WORLDS)
def world_size(request: pytest.FixtureRequest) -> int:
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} GPUs")
    return request.param


@pytest.fixture(scope="module")
def pool(world_size: int) -> Iterator[RankPool]:
    pool = RankPool(world_size, backend="nccl")
    yield pool
    pool.close()


@functools.cache
def _cpu_comm() -> GlooComm:
    group = dist.new_group(list(range(dist.get_world_size())), backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return GlooComm(group)


_hardware = functools.cache(probe_hardware)
_flashinfer = functools.cache(probe_flashinfer)


def _device() -> torch.device:
    return torch.device("cuda", dist.get_rank())


def _decide(
    hidden_size: int, dtype: torch.dtype, max_tokens: int, world_size: int | None = None, **request: Any
) -> FusionDecision:
    request = {"mode": "on", "max_bytes": max_tokens * hidden_size * dtype.itemsize, **request}
    model = ModelFacts("Qwen3NextForCausalLM", hidden_size, dtype.itemsize)
    layout = ParallelLayout(tp_size=world_size or dist.get_world_size())
    return resolve_fusion(model, layout, _hardware(), _flashinfer(), FusionRequest(**request))


def _open(
    hidden_size: int, dtype: torch.dtype, max_tokens: int, info: FlashInferInfo | None = None, **request: Any
) -> tuple[FusionDecision, Workspace | None]:
    return start_fusion(
        _decide(hidden_size, dtype, max_tokens, **request),
        _cpu_comm(),
        hidden_size=hidden_size,
        dtype=dtype,
        device=_device(),
        flashinfer=info or _flashinfer(),
        device_group=dist.group.WORLD,
    )


def _opened(hidden_size: int, dtype: torch.dtype, max_tokens: int, **options: Any) -> Workspace:
    workspace = _open(hidden_size, dtype, max_tokens, **options)[1]
    assert workspace is not None, "mode='on' gives a workspace or raises"
    return workspace


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(_device()).manual_seed(seed)


def _data(
    num_tokens: int, hidden_size: int, dtype: torch.dtype, seed: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """-> every rank's part [T, D], residual [T, D], weight [D]: the same on all ranks, made on the device."""
    make = functools.partial(torch.randn, generator=_generator(seed), device=_device(), dtype=torch.float32)
    parts = [make(num_tokens, hidden_size).to(dtype) for _ in range(dist.get_world_size())]
    return parts, make(num_tokens, hidden_size).to(dtype), (make(hidden_size) / 10).to(dtype)


class _Findings:
    """What was wrong, kept on the device until `report`, so that no comparison waits for the host."""

    def __init__(self) -> None:
        self.allowed: dict[str, float] = {}
        self.numbers: list[Tensor] = []

    def compare(self, name: str, got: tuple[Tensor, Tensor], data: Any, weight_bias: float) -> None:
        parts, residual, weight = data
        dtype = residual.dtype
        total = sum(part.double() for part in parts) + residual.double()
        expected = (total, rms_norm_reference(total, weight, eps=EPS, weight_bias=weight_bias))
        contract = add_rmsnorm(sum_in_rank_order(torch.stack(parts)), residual, weight, EPS, weight_bias)
        # The residual is three roundings in a fixed order, so its bits are known; the norm's sum has no fixed order.
        self._add(f"{name}: residual differs from the contract", (got[0] != contract[0]).sum(), 0)
        for output, value, want in zip(("residual", "norm"), got, expected, strict=True):
            error = (value.double() - want).abs()
            self._add(f"{name}: {output} 2-norm", error.norm() / want.norm(), NORM_TOLERANCE[dtype])
            self._add(f"{name}: {output} worst", (error / (1 + want.abs())).max(), WORST_TOLERANCE[dtype])

    def _add(self, name: str, number: Tensor, allowed: float) -> None:
        self.allowed[name] = allowed
        self.numbers.append(number.double())

    def report(self) -> dict[str, float]:
        """What is above its allowance, or not a number, by name."""
        found = zip(self.allowed.items(), torch.stack(self.numbers).tolist(), strict=True)
        return {name: number for (name, allowed), number in found if not number <= allowed}


def _fingerprint(outputs: tuple[Tensor, Tensor]) -> Tensor:
    """A number that differs when any bit of the outputs does, in all likelihood."""
    words = torch.cat([output.reshape(-1) for output in outputs])
    words = words.view(torch.int32 if words.itemsize == 4 else torch.int16).long()
    places = torch.arange(words.numel(), device=words.device)
    return ((words + 40503) * (places * 2654435761 + 12345)).sum()


def _capture(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph


def _poison(outputs: Iterable[Tensor]) -> None:
    for output in outputs:
        output.fill_(torch.nan)


def grid(dtype: torch.dtype, hidden_size: int) -> dict[str, Any]:
    """Every batch with and without weight_bias: eager, and as a graph replayed on other data than captured."""
    rank, findings, prints = dist.get_rank(), _Findings(), []
    with _opened(hidden_size, dtype, max(TOKENS)) as workspace:
        for index, num_tokens in enumerate(TOKENS):
            for weight_bias in (0.0, 1.0):
                case = f"D={hidden_size} {dtype} T={num_tokens} bias={weight_bias}"
                seed = 1000 * index + int(weight_bias)
                data = _data(num_tokens, hidden_size, dtype, seed)
                parts, residual, weight = data
                outputs = (torch.empty_like(residual), torch.empty_like(residual))
                _poison(outputs)
                partial = parts[rank].clone()
                arguments = (partial, residual, weight, EPS, weight_bias, *outputs)
                workspace.run(*arguments)
                findings.compare(f"{case} eager", outputs, data, weight_bias)
                prints.append(_fingerprint(outputs))

                graph = _capture(functools.partial(workspace.run, *arguments))
                other = _data(num_tokens, hidden_size, dtype, seed + 500)
                for static, fresh in zip(
                    (partial, residual, weight), (other[0][rank], *other[1:]), strict=True
                ):
                    static.copy_(fresh)
                _poison(outputs)
                graph.replay()
                findings.compare(f"{case} graph", outputs, other, weight_bias)
                prints.append(_fingerprint(outputs))
        report = findings.report()
        return {"wrong": report, "prints": torch.stack(prints).tolist(), "cases": len(prints)}


@pytest.mark.parametrize("hidden_size", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_the_op_agrees_with_float64_in_and_out_of_graphs(
    pool: RankPool, dtype: torch.dtype, hidden_size: int
):
    results = pool.run(grid, dtype, hidden_size, timeout=120)
    for result in results:
        assert result["wrong"] == {}
        assert result["cases"] == 4 * len(TOKENS)
        assert result["prints"] == results[0]["prints"], "ranks differ in their bits"


def two_shot(hidden_size: int) -> dict[str, Any]:
    """FlashInfer takes two-shot for larger groups only; here it is asked for."""
    findings, prints = _Findings(), []
    with (
        _opened(hidden_size, torch.bfloat16, 2048, own_kernels=False) as workspace,
        mock.patch.object(flashinfer_api, "use_oneshot", return_value=False),
    ):
        for num_tokens in (3, 67, 500, 2048):
            data = _data(num_tokens, hidden_size, torch.bfloat16, num_tokens)
            outputs = workspace.run(data[0][dist.get_rank()], data[1], data[2], EPS, 1.0)
            findings.compare(f"two-shot T={num_tokens}", outputs, data, 1.0)
            prints.append(_fingerprint(outputs))
        return {"wrong": findings.report(), "prints": torch.stack(prints).tolist()}


def test_two_shot_agrees_too(pool: RankPool):
    results = pool.run(two_shot, 2048)
    for result in results:
        assert result == {"wrong": {}, "prints": results[0]["prints"]}


def long_calls(hidden_size: int) -> dict[str, Any]:
    """The kernel for long messages of two ranks beside FlashInfer's: eager and in graphs, in place, in turns.

    Its bits are those of NCCL's sum with `add_norm` after it.
    """
    rank, findings, prints, equal = dist.get_rank(), _Findings(), [], []
    decision, workspace = _open(hidden_size, torch.bfloat16, 8192)
    assert workspace is not None
    assert decision.pair.max_bytes, decision.pair.source
    first = decision.max_backend_tokens(2) + 1
    with workspace:
        for num_tokens in (first, 1, 3001, first + 1, first + 2, 8191, first - 1, 8192, 4097):
            data = _data(num_tokens, hidden_size, torch.bfloat16, num_tokens)
            parts, residual, weight = data
            outputs = workspace.run(parts[rank], residual, weight, EPS, 1.0)
            findings.compare(f"long T={num_tokens} eager", outputs, data, 1.0)
            prints.append(_fingerprint(outputs))
            if num_tokens >= first:
                total = parts[rank].clone()
                dist.all_reduce(total)
                want = add_norm(total, residual, weight, EPS, 1.0)
                equal += [torch.equal(one, other) for one, other in zip(outputs, want, strict=True)]

            stream, normed = residual.clone(), torch.empty_like(residual)
            graph = _capture(
                functools.partial(workspace.run, parts[rank], stream, weight, EPS, 1.0, stream, normed)
            )
            stream.copy_(residual)
            graph.replay()
            findings.compare(f"long T={num_tokens} graph, in place", (stream, normed), data, 1.0)
            prints.append(_fingerprint((stream, normed)))
        return {"wrong": findings.report(), "prints": torch.stack(prints).tolist(), "equal": equal}


@pytest.mark.parametrize("hidden_size", [2048, 264, 1000, 5120, 8192])
def test_long_calls_of_two_ranks(pool: RankPool, world_size: int, hidden_size: int):
    if world_size != 2:
        pytest.skip("pair_allreduce is for two ranks")
    results = pool.run(long_calls, hidden_size, timeout=120)
    for result in results:
        assert result["wrong"] == {}
        assert result["prints"] == results[0]["prints"], "ranks differ in their bits"
        assert all(result["equal"])


def _choices(part: Tensor, K: int, seed: int) -> ChoiceParts:
    """`part` [T, D] in K pieces a token, of which some have no expert: those are NaN, as nobody may read them."""
    generator = _generator(seed)
    experts = torch.randint(-1, 9, (len(part), K), generator=generator, device=_device(), dtype=torch.int32)
    scales = torch.rand(len(part), K, 1, generator=generator, device=_device()) + 0.5
    pieces = (part[:, None] * scales).to(part.dtype)
    pieces[(experts < 0) | (experts > 7)] = torch.nan
    return ChoiceParts(pieces.flatten(0, 1), experts, 8)


def _sum_of(choices: ChoiceParts) -> Tensor:
    kept = (choices.experts >= 0) & (choices.experts < choices.num_experts)
    pieces = choices.parts.unflatten(0, kept.shape).double()
    return torch.where(kept[..., None], pieces, 0).sum(1).to(choices.parts.dtype)


def _keep(outputs: list[Tensor], pay: Callable[..., tuple[Tensor, Tensor]], *operands: Any) -> None:
    outputs += pay(*operands)


def of_choices(hidden_size: int) -> dict[str, Any]:
    """Parts of a token's choices: added in the kernel for long messages, or before FlashInfer's; equal bits."""
    rank, findings, equal, added = dist.get_rank(), _Findings(), [], []
    decision, workspace = _open(hidden_size, torch.bfloat16, 8192)
    assert workspace is not None
    group, first = _group(decision, workspace), decision.max_backend_tokens(2) + 1
    pay = functools.partial(allreduce_residual_rmsnorm, group=group, eps=EPS, weight_bias=1.0)
    with workspace:
        for num_tokens, K in (*CHOICES, (first + 1, 4), (first - 1, 11), (first, 11)):
            rows, residual, weight = _data(num_tokens, hidden_size, torch.bfloat16, num_tokens)
            choices = [_choices(part, K, seed) for seed, part in enumerate(rows)]
            sums, mine = [_sum_of(one) for one in choices], choices[rank]
            added.append(workspace.adds_choices(mine) == (num_tokens >= first))
            outputs = pay(mine, residual, weight)
            findings.compare(f"choices T={num_tokens} K={K}", outputs, (sums, residual, weight), 1.0)
            want = workspace.run(mine.sum(), residual, weight, EPS, 1.0)
            equal += [torch.equal(one, other) for one, other in zip(outputs, want, strict=True)]
            again: list[Tensor] = []
            graph = _capture(functools.partial(_keep, again, pay, mine, residual, weight))
            _poison(again)
            graph.replay()
            equal += [torch.equal(one, other) for one, other in zip(again, want, strict=True)]
        (part, *_), residual, weight = _data(first, hidden_size, torch.bfloat16, 0)
        mine = _choices(part, 3, 0)
        try:
            of_int64 = dataclasses.replace(mine, experts=mine.experts.long())
            workspace.run_choices(of_int64, residual, weight, EPS, 1.0)
            error = ""
        except ValueError as caught:
            error = str(caught)
        counts = group.counts.fused, group.counts.unfused
    return {"wrong": findings.report(), "equal": equal, "added": added, "counts": counts, "error": error}


@pytest.mark.parametrize("hidden_size", [2048, 264, 5120])
def test_choices_are_added_in_the_same_kernel(pool: RankPool, world_size: int, hidden_size: int):
    if world_size != 2:
        pytest.skip("pair_allreduce is for two ranks")
    for result in pool.run(of_choices, hidden_size, timeout=120):
        assert result["wrong"] == {}
        assert all(result["added"])
        assert all(result["equal"])
        assert "does not add choices" in result["error"]
        assert result["counts"] == (2 * (len(CHOICES) + 3), 0)  # eager and captured


def raw_sum() -> list[bool]:
    """What JAX's plain all-reduce calls: one function for both kernels, by the number of tokens."""
    rank, equal = dist.get_rank(), []
    with _opened(2048, torch.bfloat16, 2048) as workspace:
        kernel = workspace.raw()
        for num_tokens in (5, 512, 513, 2048, 7):
            parts, _, _ = _data(num_tokens, 2048, torch.bfloat16, num_tokens)
            total = torch.empty_like(parts[rank])
            kernel.function(
                parts[rank],
                kernel.world_size,
                kernel.rank,
                num_tokens,
                2048,
                kernel.workspace_ptrs,
                True,  # launch_with_pdl
                True,  # use_oneshot
                True,  # trigger_completion_at_end
                True,  # fp32_acc
                0,  # kAllReduce
                total,
                *[None] * 11,
            )
            equal.append(torch.equal(total, sum_in_rank_order(torch.stack(parts))))
    return equal


def test_plain_sums_of_any_length(pool: RankPool):
    for equal in pool.run(raw_sum):
        assert equal == [True] * 5


def replay(replays: int, calls: int) -> dict[str, int]:
    """Graphs of a chain of calls, replayed: elements that ever differ from the first replay's."""
    rank, different = dist.get_rank(), {}
    with _opened(2048, torch.bfloat16, 2048) as workspace:
        for num_tokens in (1, 8, 67, 512, 1000):
            parts, residual, weight = _data(num_tokens, 2048, torch.bfloat16, num_tokens)
            outputs = (torch.empty_like(residual), torch.empty_like(residual))

            def chain(
                part: Tensor = parts[rank],
                residual: Tensor = residual,
                weight: Tensor = weight,
                outputs: tuple[Tensor, Tensor] = outputs,
            ) -> None:
                stream = residual
                for _ in range(calls):
                    stream, _ = workspace.run(part, stream, weight, EPS, 1.0, *outputs)

            chain()
            graph = _capture(chain)
            graph.replay()
            first = [output.clone() for output in outputs]
            count = torch.zeros((), dtype=torch.int64, device=_device())
            for _ in range(replays):
                _poison(outputs)
                graph.replay()
                count += sum((one != other).sum() for one, other in zip(first, outputs, strict=True))
            different[f"T={num_tokens}"] = int(count)
    return different


def test_a_thousand_replays_do_not_drift(pool: RankPool):
    for different in pool.run(replay, 1000, 8, timeout=120):
        assert different == {"T=1": 0, "T=8": 0, "T=67": 0, "T=512": 0, "T=1000": 0}


def _free_bytes() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def memory(cycles: int, own_kernels: bool) -> dict[str, Any]:
    """Free bytes of the device before a workspace, with it, and after it is closed, `cycles` times."""
    world_size, size = dist.get_world_size(), (7168, torch.bfloat16, 2048)
    decision, needed = _decide(*size, own_kernels=own_kernels), 0
    if decision.pair.max_bytes:
        needed = pair_bytes(2048, 7168)
    most = decision.max_backend_tokens(2)
    needed += sum(buffer_bytes(world_size, most, 7168, torch.bfloat16))
    seen = []
    for cycle in range(cycles + 1):  # the first loads kernels, which stay
        dist.barrier()
        before = _free_bytes()
        dist.barrier()
        workspace = _opened(*size, own_kernels=own_kernels)
        parts, residual, weight = _data(2048, 7168, torch.bfloat16, cycle)
        workspace.run(parts[dist.get_rank()], residual, weight, EPS, 1.0)
        del parts, residual, weight
        dist.barrier()
        during = _free_bytes()
        dist.barrier()
        workspace.close()
        dist.barrier()
        seen.append((before, during, _free_bytes()))
    return {"seen": seen[1:], "needed": needed}


@pytest.mark.parametrize("own_kernels", [True, False])
def test_closing_gives_the_memory_back(pool: RankPool, own_kernels: bool):
    for result in pool.run(memory, 4, own_kernels):
        for before, during, after in result["seen"]:
            assert before - during >= result["needed"]
            assert abs(before - after) <= SLACK_BYTES
        assert abs(result["seen"][0][0] - result["seen"][-1][2]) <= SLACK_BYTES, "leaks a little each time"


def start_and_fail(fault: str) -> dict[str, Any]:
    """Rank 1 has no memory, or fails after creation; -> what each rank was left with."""
    hog = None
    patch: Any = mock.patch.object(FlashInferBuffers, "create", FlashInferBuffers.create)
    dist.barrier()
    before = _free_bytes()
    if dist.get_rank() == 1 and fault == "memory":
        hog = torch.empty(before - (256 << 20), dtype=torch.uint8, device=_device())
    if dist.get_rank() == 1 and fault == "creation":
        original = FlashInferBuffers.create

        def failing(self: FlashInferBuffers, max_tokens: int, comm: CommBackend) -> None:
            original(self, max_tokens, comm)
            raise RuntimeError("injected")

        patch = mock.patch.object(FlashInferBuffers, "create", failing)
    with patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decision, workspace = _open(7168, torch.float32, 2048, mode="auto")
    del hog
    dist.barrier()
    return {
        "workspace": workspace is not None,
        "reason": decision.reason,
        "warnings": len([warning for warning in caught if warning.category is FusionWarning]),
        "lost": before - _free_bytes(),
    }


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("memory", "trying the allocation failed on rank 1 (MemoryError: allocating "),
        ("creation", "creating the workspace failed on rank 1 (RuntimeError: injected)"),
    ],
)
def test_a_rank_that_cannot_turns_fusion_off_on_all_and_keeps_no_memory(
    pool: RankPool, fault: str, reason: str
):
    pool.run(memory, 0, True)  # kernels are loaded, so only a workspace could be missing afterwards
    results = pool.run(start_and_fail, fault)
    for rank, result in enumerate(results):
        assert not result["workspace"]
        assert result["reason"].startswith(reason)
        assert result["warnings"] == (rank == 0)
        assert result["lost"] <= SLACK_BYTES


def growth_in_capture() -> list[str]:
    """Growing is refused during capture, works outside, and leaves a graph of the smaller buffers valid."""
    rank, found = dist.get_rank(), []
    parts, residual, weight = _data(8, 2048, torch.bfloat16, 1)
    outputs = (torch.empty_like(residual), torch.empty_like(residual))
    with _opened(2048, torch.bfloat16, 8) as workspace:
        graph = _capture(lambda: workspace.run(parts[rank], residual, weight, EPS, 1.0, *outputs))

        def grow() -> None:
            torch.zeros(1, device=_device())  # an empty graph is a warning
            with pytest.raises(RuntimeError, match="while a CUDA graph is being captured"):
                workspace.ensure(64)

        _capture(grow)
        workspace.ensure(64)
        findings = _Findings()
        large = _data(64, 2048, torch.bfloat16, 2)
        findings.compare("grown", workspace.run(large[0][rank], large[1], large[2], EPS, 1.0), large, 1.0)
        _poison(outputs)
        graph.replay()
        findings.compare("graph from before", outputs, (parts, residual, weight), 1.0)
        found += list(findings.report())
        del graph
    return found


def test_a_workspace_grows_outside_of_capture_only(pool: RankPool):
    assert not any(pool.run(growth_in_capture))


def folded() -> dict[str, float]:
    """The real kernel as a FlashInfer without `weight_bias` would be called: `1 + w` folded at first use."""
    info = dataclasses.replace(_flashinfer(), op_params=_flashinfer().op_params - {"weight_bias"})
    findings = _Findings()
    with _opened(2048, torch.float32, 67, info=info) as workspace:
        for num_tokens in (1, 67):
            data = _data(num_tokens, 2048, torch.float32, 5)
            outputs = workspace.run(data[0][dist.get_rank()], data[1], data[2], EPS, 1.0)
            findings.compare(f"folded T={num_tokens}", outputs, data, 1.0)
    return findings.report()


def test_an_older_flashinfer_is_served_with_a_folded_weight(pool: RankPool):
    assert not any(pool.run(folded))


def _group(decision: FusionDecision, workspace: Workspace | None) -> ReduceGroup:
    return ReduceGroup(
        name="attention-TP",
        side="attention",
        ranks=tuple(range(dist.get_world_size())),
        rank=dist.get_rank(),
        device_group=dist.group.WORLD,
        comm=_cpu_comm(),
        decision=decision,
        workspace=workspace,
    )


def dispatch() -> dict[str, Any]:
    """Through the public function: fused up to the limit, unfused above, both close to float64, all counted."""
    rank, findings = dist.get_rank(), _Findings()
    decision, workspace = _open(2048, torch.bfloat16, 64)
    assert workspace is not None
    counts = {}
    with workspace, torch.no_grad():
        eager = functools.partial(
            allreduce_residual_rmsnorm, group=_group(decision, workspace), eps=EPS, weight_bias=1.0
        )
        for name, pay in (
            ("eager", eager),
            ("compiled", torch.compile(eager, fullgraph=True, backend="aot_eager")),
        ):
            group = eager.keywords["group"]
            group.counts.reset()
            for num_tokens in (1, 64, 65, 500):
                data = _data(num_tokens, 2048, torch.bfloat16, num_tokens)
                outputs = pay(data[0][rank].clone(), data[1], data[2])
                findings.compare(f"{name} T={num_tokens}", outputs, data, 1.0)
            counts[name] = (group.counts.fused, group.counts.unfused)
    return {"wrong": findings.report(), "counts": counts}


def test_batches_are_fused_up_to_the_limit_and_counted(pool: RankPool):
    for result in pool.run(dispatch, timeout=120):
        assert result["wrong"] == {}
        assert result["counts"] == {"eager": (2, 2), "compiled": (2, 2)}


def deterministic() -> list[bool]:
    """Rows alone and inside a batch, with the pinned order."""
    group = _group(_decide(2048, torch.bfloat16, 64, mode="auto", deterministic=True), None)
    parts, residual, weight = _data(500, 2048, torch.bfloat16, 3)
    pay = functools.partial(allreduce_residual_rmsnorm, group=group, eps=EPS, weight_bias=1.0)
    together = pay(parts[group.rank].clone(), residual, weight)
    equal = []
    for rows in (slice(0, 1), slice(3, 11), slice(499, 500)):
        alone = pay(parts[group.rank][rows].clone(), residual[rows], weight)
        equal += [torch.equal(one, many[rows]) for one, many in zip(alone, together, strict=True)]
    assert group.counts.fused == 0
    return equal


def test_a_deterministic_row_has_the_same_bits_in_every_batch(pool: RankPool):
    assert all(all(equal) for equal in pool.run(deterministic))


def invariance() -> dict[str, list[int]]:
    """The batch sizes, around those where the launch changes, in which a first row has other bits than alone."""
    rank, found = dist.get_rank(), {"residual": [], "norm": []}
    most = 2048
    with _opened(2048, torch.bfloat16, most) as workspace:
        parts, residual, weight = _data(most, 2048, torch.bfloat16, 7)
        alone = workspace.run(parts[rank][:1], residual[:1], weight, EPS, 1.0)
        for num_tokens in (2, 8, 32, 33, 34, 35, 63, 64, 65, 66, 67, 68, 127, 128, 129, 256, 512, 1024, most):
            batch = slice(num_tokens)
            outputs = workspace.run(parts[rank][batch], residual[batch], weight, EPS, 1.0)
            for name, one, many in zip(found, alone, outputs, strict=True):
                if not torch.equal(one, many[:1]):
                    found[name].append(num_tokens)
    return found


def test_a_rows_sum_has_the_same_bits_in_every_batch(pool: RankPool, world_size: int):
    """The residual's bits follow from the contract. The norm's may differ with the launch: reported (`-s`), and the
    same on all ranks; who needs them asks for `deterministic`."""
    results = pool.run(invariance)
    print(f"{world_size} ranks: the norm of one row has other bits in batches of {results[0]['norm']}")
    for result in results:
        assert result == results[0]
        assert result["residual"] == []


@pytest.mark.filterwarnings("ignore:use the unified API:DeprecationWarning")
def test_ranks_may_be_threads_of_one_process(world_size: int):
    """One thread per GPU, a thread barrier instead of gloo: how another framework opens workspaces."""
    decision = _decide(2048, torch.bfloat16, 1000, world_size)

    def main(comm: ThreadComm) -> list[list[Tensor]]:
        device = torch.device("cuda", comm.rank)
        torch.cuda.set_device(device)
        in_force, workspace = start_fusion(
            decision, comm, hidden_size=2048, dtype=torch.bfloat16, device=device, flashinfer=_flashinfer()
        )
        assert in_force.enabled
        assert workspace is not None
        outputs = []
        with workspace:
            for num_tokens in (1, 1000, 67, 3):
                generator = torch.Generator().manual_seed(num_tokens)
                *parts, shared = torch.randn(world_size + 1, num_tokens, 2048, generator=generator).bfloat16()
                weight = torch.zeros(2048, dtype=torch.bfloat16, device=device)
                got = workspace.run(parts[comm.rank].to(device), shared.to(device), weight, EPS, 1.0)
                want = add_rmsnorm(sum_in_rank_order(torch.stack(parts)), shared, weight.cpu(), EPS, 1.0)
                outputs.append([value.cpu() for value in (*got, *want)])
        return outputs

    results = on_threads(world_size, main, timeout=60)
    for result in results:
        assert not isinstance(result, Exception), result
        for residual, normed, want_residual, want_normed in result:
            assert torch.equal(residual, want_residual)
            torch.testing.assert_close(normed, want_normed, rtol=2e-2, atol=1e-3)
    for result in results:
        for one, other in zip(result, results[0], strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
