"""Paying a sum with real ranks: the rounding contract bit by bit, the choice per batch, the counts, torch.compile.

Shapes: R ranks, T tokens, D hidden.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from core_torch.kernels import moe_prefill
from core_torch.kernels.allreduce import ReduceGroup, all_reduce, allreduce_residual_rmsnorm, fused, unfused
from core_torch.kernels.comm import GlooComm, SingleComm
from core_torch.kernels.contract import add_rmsnorm, sum_in_rank_order
from core_torch.kernels.counts import ReductionCounts
from core_torch.kernels.moe_prefill import ChoiceParts
from core_torch.kernels.native import Answer
from core_torch.kernels.norm import rms_norm, rms_norm_reference
from core_torch.kernels.workspace import Workspace, open_workspace
from shared_config import FlashInferInfo, FusionDecision
from tests.fusion_ranks import HIDDEN, decide, operands, plain_combine, rank_data, reduce_group
from tests.ranks import RankPool

Pools = Callable[[int], RankPool]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOKENS = (1, 3, 63, 67)
LIMIT = 67
EPS = 1e-6
# Largest |difference from float64| / (1 + |value|): two roundings of the residual, one of the norm.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def open_reference(decision: FusionDecision, dtype: torch.dtype, max_tokens: int = LIMIT) -> Workspace:
    return open_workspace(
        decision,
        GlooComm(),
        hidden_size=HIDDEN,
        dtype=dtype,
        device=torch.device("cpu"),
        max_tokens=max_tokens,
        flashinfer=FlashInferInfo(),
        device_group=dist.group.WORLD,
    )


def expected(
    num_tokens: int, world_size: int, dtype: torch.dtype, weight_bias: float
) -> tuple[Tensor, Tensor]:
    """The contract, written out: float32 sum in rank order, rounded; residual added in the dtype; norm in float32."""
    total = torch.zeros(num_tokens, HIDDEN)
    for rank in range(world_size):
        total = total + operands(num_tokens, rank, dtype)[0].float()
    _, residual, weight = operands(num_tokens, 0, dtype)
    residual = (total.to(dtype).double() + residual.double()).to(dtype)
    x = residual.float()
    normed = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * (weight_bias + weight.float())
    return residual, normed.to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float(((got.double() - want.double()).abs() / (1 + want.double().abs())).max())


def pay_every_size(world_size: int) -> dict[str, Any]:
    """Every dtype, batch and bias, fused, deterministic and unfused; -> what differs from the contract."""
    rank, wrong, worst, outputs = dist.get_rank(), [], {}, []
    for dtype in DTYPES:
        decision = decide(world_size, max_tokens=LIMIT, itemsize=dtype.itemsize)
        with open_reference(decision, dtype) as workspace:
            groups = {
                "fused": reduce_group(decision, workspace),
                "deterministic": reduce_group(decide(world_size, deterministic=True)),
                "unfused": reduce_group(decide(world_size, mode="off")),
            }
            for num_tokens in TOKENS:
                for weight_bias in (0.0, 1.0):
                    want = expected(num_tokens, world_size, dtype, weight_bias)
                    for name, group in groups.items():
                        partial, residual, weight = operands(num_tokens, rank, dtype)
                        got = allreduce_residual_rmsnorm(
                            partial, residual, weight, group=group, eps=EPS, weight_bias=weight_bias
                        )
                        case = (name, dtype, num_tokens, weight_bias)
                        outputs.append(got[1].clone())
                        if name != "unfused" and not all(
                            torch.equal(*pair) for pair in zip(got, want, strict=True)
                        ):
                            wrong.append(case)
                        worst[case] = max(error(*pair) for pair in zip(got, want, strict=True))
            cases = len(TOKENS) * 2
            counts = {name: (group.counts.fused, group.counts.unfused) for name, group in groups.items()}
            assert counts == {"fused": (cases, 0), "deterministic": (0, cases), "unfused": (0, cases)}, counts
    return {"wrong": wrong, "worst": worst, "outputs": outputs}


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_way_to_pay_keeps_the_contract(ranks: Pools, world_size: int):
    results = ranks(world_size).run(pay_every_size, world_size)
    for result in results:
        assert result["wrong"] == []
        for case, worst in result["worst"].items():
            assert worst <= TOLERANCE[case[1]], case
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0]["outputs"], other["outputs"], strict=True))


def in_pieces(part: Tensor) -> ChoiceParts:
    """Three choices of each token, one of them without an expert: it counts nothing."""
    experts = torch.zeros(len(part), 3).int()
    experts[::2, 1], experts[1::2, 2] = 1, -1
    return ChoiceParts(torch.stack((part / 4, part, part / 2), dim=1).flatten(0, 1), experts, 1)


def pay_choices(mode: str) -> list[bool]:
    """Parts of two choices a token where no kernel adds them, with a plain `combine` in the compiled one's place."""
    rank, equal = dist.get_rank(), []
    decision = decide(2, max_tokens=LIMIT, itemsize=2, mode=mode)

    with mock.patch.object(moe_prefill, "combine", plain_combine), ExitStack() as stack:
        workspace = stack.enter_context(open_reference(decision, torch.bfloat16)) if mode == "on" else None
        group = reduce_group(decision, workspace)
        pay = partial(allreduce_residual_rmsnorm, group=group, eps=EPS, weight_bias=1.0)
        for num_tokens in TOKENS:
            part, residual, weight = operands(num_tokens, rank, torch.bfloat16)
            choices = in_pieces(part)
            for stream in (residual, None):
                want, got = pay(choices.sum(), stream, weight), pay(choices, stream, weight)
                equal += [torch.equal(*pair) for pair in zip(got, want, strict=True)]
        part, residual, weight = operands(3, rank, torch.bfloat16)
        choices = ChoiceParts(part, torch.zeros(3, 1).int(), 1)
        alone = replace(group, ranks=(rank,), rank=0, workspace=None, counts=ReductionCounts())
        equal.append(torch.equal(pay(choices, residual, weight, group=alone)[0], residual + part))
        with pytest.raises(ValueError, match=r"residual must have shape \(3, 64\) .* got \(2, 64\)"):
            pay(choices, residual[:2], weight)
        wrong = {
            r"a row for each of experts \(3, 2\), got shape \(3, 64\)": {"experts": torch.zeros(3, 2).int()},
            r"experts must be .* got shape \(3,\)": {"experts": torch.zeros(3).int()},
            r"experts must be .* got shape \(3, 0\)": {"experts": torch.zeros(3, 0).int()},
            "parts and experts must be contiguous": {"parts": part.repeat(1, 2)[:, ::2]},
        }
        for message, changed in wrong.items():
            with pytest.raises(ValueError, match=message):
                pay(replace(choices, **changed), residual, weight)
        payments = 4 * len(TOKENS)
        counts = (payments, 0) if mode == "on" else (0, payments)
        assert (group.counts.fused, group.counts.unfused) == counts
    return equal


@pytest.mark.parametrize("mode", ["on", "off"])
def test_choices_are_added_first_where_no_kernel_does(ranks: Pools, mode: str):
    for equal in ranks(2).run(pay_choices, mode):
        assert all(equal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_the_contract_is_close_to_float64(dtype: torch.dtype, num_tokens: int):
    parts = torch.stack([operands(num_tokens, rank, dtype)[0] for rank in range(4)])
    _, residual, weight = operands(num_tokens, 0, dtype)
    got = add_rmsnorm(sum_in_rank_order(parts), residual, weight, EPS, 1.0)
    total = parts.double().sum(0) + residual.double()
    assert error(got[0], total) <= TOLERANCE[dtype]
    assert error(got[1], rms_norm_reference(total, weight, eps=EPS, weight_bias=1.0)) <= TOLERANCE[dtype]


def choose_per_batch(world_size: int) -> dict[str, Any]:
    decision = decide(world_size, max_tokens=8)
    with open_reference(decision, torch.bfloat16, max_tokens=8) as workspace:
        group = reduce_group(decision, workspace)
        counts = []
        for num_tokens in (8, 9, 1, 0):
            partial, residual, weight = operands(num_tokens, group.rank, torch.bfloat16)
            before = group.counts.snapshot()
            allreduce_residual_rmsnorm(partial, residual, weight, group=group, eps=EPS, weight_bias=1.0)
            after = group.counts.difference(before)
            counts.append((after.fused, after.unfused))
        x = all_reduce(torch.ones(2, HIDDEN), group=group)
        return {
            "counts": counts,
            "plain": (group.counts.plain, float(x.mean())),
            "reason": group.fuses(9, 2).reason,
            "other dtype": workspace.takes(torch.ones(1, HIDDEN)),
        }


def test_a_batch_above_the_limit_is_paid_unfused_and_both_kinds_are_counted(ranks: Pools):
    for result in ranks(2).run(choose_per_batch, 2):
        assert result["counts"] == [(1, 0), (0, 1), (1, 0), (0, 0)]
        assert result["plain"] == (1, 2.0)
        assert "above the limit of 8" in result["reason"]
        assert not result["other dtype"]


def without_residual(world_size: int) -> list[bool]:
    decision = decide(world_size)
    equal = []
    with open_reference(decision, torch.bfloat16) as workspace:
        for group in (
            reduce_group(decision, workspace),
            reduce_group(decide(world_size, deterministic=True)),
        ):
            partial, _, weight = operands(3, group.rank, torch.bfloat16)
            got = allreduce_residual_rmsnorm(partial, None, weight, group=group, eps=EPS, weight_bias=1.0)
            total = sum_in_rank_order(
                torch.stack([operands(3, r, torch.bfloat16)[0] for r in range(world_size)])
            )
            want = add_rmsnorm(total, None, weight, EPS, 1.0)
            partial.fill_(torch.nan)  # the consumed partial is nobody's output
            equal += [torch.equal(*pair) for pair in zip(got, want, strict=True)]
    return equal


def test_the_first_sum_becomes_the_residual(ranks: Pools):
    assert all(all(equal) for equal in ranks(2).run(without_residual, 2))


def chain(world_size: int, layers: int) -> dict[str, Any]:
    """A stack of layers whose parts depend on the norm before: both sides of each layer, by turns."""
    decision = decide(world_size)
    rank = dist.get_rank()

    def part(normed: Tensor, layer: int, rank: int) -> Tensor:
        return (normed.float() * rank_data(1, rank, torch.float32, seed=layer)).to(torch.bfloat16)

    with open_reference(decision, torch.bfloat16) as workspace:
        attention = reduce_group(decision, workspace)
        mlp = ReduceGroup(
            "MoE-TP", "mlp", attention.ranks, rank, attention.device_group, attention.comm, decision
        )
        mlp.workspace = workspace
        weight = operands(1, 0, torch.bfloat16)[2]
        residual = expect = operands(3, 0, torch.bfloat16)[1]
        normed = expect_normed = rms_norm(residual, weight, eps=EPS, weight_bias=1.0)
        for layer in range(2 * layers):
            group = attention if layer % 2 == 0 else mlp
            parts = torch.stack([part(expect_normed, layer, r) for r in range(world_size)])
            expect, expect_normed = add_rmsnorm(sum_in_rank_order(parts), expect, weight, EPS, 1.0)
            residual, normed = allreduce_residual_rmsnorm(
                part(normed, layer, rank), residual, weight, group=group, eps=EPS, weight_bias=1.0
            )
        return {
            "equal": torch.equal(residual, expect) and torch.equal(normed, expect_normed),
            "fused": (attention.counts.fused, mlp.counts.fused),
        }


def test_a_chain_of_debts_is_paid_in_order(ranks: Pools):
    for result in ranks(4).run(chain, 4, 5):
        assert result == {"equal": True, "fused": (5, 5)}


def pay_in_sub_group() -> bool:
    """Groups [0, 2] and [1, 3]: a sum is over the members only."""
    groups = [dist.new_group(members, backend="gloo") for members in ([0, 2], [1, 3])]
    rank = dist.get_rank()
    members = (rank % 2, rank % 2 + 2)
    group = reduce_group(decide(2, deterministic=True), ranks=members, group=groups[rank % 2])
    partial, residual, weight = operands(3, rank, torch.bfloat16)
    got = allreduce_residual_rmsnorm(partial, residual, weight, group=group, eps=EPS, weight_bias=1.0)
    parts = torch.stack([operands(3, member, torch.bfloat16)[0] for member in members])
    want = add_rmsnorm(sum_in_rank_order(parts), residual, weight, EPS, 1.0)
    return all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_a_sub_group_sums_its_members_only(ranks: Pools):
    assert ranks(4).run(pay_in_sub_group) == [True] * 4


def rows_alone_and_together(world_size: int) -> list[bool]:
    group = reduce_group(decide(world_size, deterministic=True))
    partial, residual, weight = operands(67, group.rank, torch.bfloat16)
    pay = {"group": group, "eps": EPS, "weight_bias": 1.0}
    together = allreduce_residual_rmsnorm(partial.clone(), residual, weight, **pay)
    equal = []
    for row in (0, 31, 66):
        rows = slice(row, row + 1)
        alone = allreduce_residual_rmsnorm(partial[rows].clone(), residual[rows], weight, **pay)
        equal += [torch.equal(one, many[rows]) for one, many in zip(alone, together, strict=True)]
    return equal


def test_a_deterministic_sum_does_not_depend_on_the_batch(ranks: Pools):
    assert all(all(equal) for equal in ranks(4).run(rows_alone_and_together, 4))


def compiled(world_size: int) -> dict[str, Any]:
    """One compiled function serves fused and unfused batches: the choice is made when it runs."""
    decision = decide(world_size, max_tokens=8)
    with open_reference(decision, torch.bfloat16, max_tokens=8) as workspace:
        group = reduce_group(decision, workspace)

        def layer(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            partial = x * 2
            residual, normed = allreduce_residual_rmsnorm(
                partial, residual, weight, group=group, eps=EPS, weight_bias=1.0
            )
            return residual, all_reduce(normed + 1, group=group)

        traced = []

        def backend(graph: Any, inputs: Any) -> Any:
            traced.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        fast = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
        equal = []
        with torch.no_grad():
            for num_tokens in (3, 8, 9, 67):
                batch = operands(num_tokens, group.rank, torch.bfloat16)
                before = group.counts.snapshot()
                got = fast(*batch)
                counts = group.counts.difference(before)
                assert (counts.fused, counts.unfused, counts.plain) == (num_tokens <= 8, num_tokens > 8, 1)
                equal += [torch.equal(*pair) for pair in zip(got, layer(*batch), strict=True)]
        return {"equal": equal, "graphs": len(traced)}


def compiled_choices(world_size: int) -> dict[str, Any]:
    """The same of a part that comes as choices."""
    decision, traced, equal = decide(world_size, max_tokens=8), [], []
    with (
        mock.patch.object(moe_prefill, "combine", plain_combine),
        open_reference(decision, torch.bfloat16, 8) as space,
    ):
        group = reduce_group(decision, space)

        def layer(parts: Tensor, experts: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            choices = ChoiceParts(parts * 2, experts, 1)
            return allreduce_residual_rmsnorm(
                choices, residual, weight, group=group, eps=EPS, weight_bias=1.0
            )

        def backend(graph: Any, inputs: Any) -> Any:
            traced.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        fast = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
        with torch.no_grad():
            for num_tokens in (3, 8, 9, 67):
                part, *rest = operands(num_tokens, group.rank, torch.bfloat16)
                pieces, before = in_pieces(part), group.counts.snapshot()
                got = fast(pieces.parts, pieces.experts, *rest)
                counts = group.counts.difference(before)
                assert (counts.fused, counts.unfused) == (num_tokens <= 8, num_tokens > 8)
                want = layer(pieces.parts, pieces.experts, *rest)
                equal += [torch.equal(*pair) for pair in zip(got, want, strict=True)]
    return {"equal": equal, "graphs": len(traced)}


@pytest.mark.parametrize("function", [compiled, compiled_choices])
def test_torch_compile_sees_one_op_that_counts_and_chooses(ranks: Pools, function: Callable[[int], Any]):
    for result in ranks(2).run(function, 2, timeout=120):
        assert all(result["equal"])
        assert result["graphs"] <= 2, "a batch of another kind must not compile anew"


def check_registration(world_size: int) -> None:
    group = reduce_group(decide(world_size, deterministic=True))
    partial, residual, weight = operands(3, group.rank, torch.bfloat16)
    checks = ("test_schema", "test_faketensor")
    with torch.no_grad():
        for maybe in (residual, None):
            arguments = (partial.clone(), maybe, weight, group.handle, EPS, 1.0)
            torch.library.opcheck(
                torch.ops.crossfuse.allreduce_residual_rmsnorm.default, arguments, test_utils=checks
            )
        with mock.patch.object(moe_prefill, "combine", plain_combine):
            pieces = in_pieces(partial)
            torch.library.opcheck(
                torch.ops.crossfuse.allreduce_residual_rmsnorm_of_choices.default,
                (pieces.parts, pieces.experts, 1, residual, weight, group.handle, EPS, 1.0),
                test_utils=checks,
            )
        torch.library.opcheck(
            torch.ops.crossfuse.all_reduce.default, (partial, group.handle), test_utils=checks
        )


def test_the_ops_do_what_their_schemas_and_fakes_say(ranks: Pools):
    ranks(2).run(check_registration, 2)


def agree(usable_on: int) -> list[Answer]:
    group = reduce_group(decide(2))
    mine = Answer(group.rank == usable_on or usable_on == 2, "no triton")
    return [group.agree("moe_prefill", answer) for answer in (mine, Answer(True))]


def test_a_kernel_that_one_rank_lacks_is_nobodys(ranks: Pools):
    assert all(answer.usable for answers in ranks(2).run(agree, 2) for answer in answers)
    lacking = "choosing moe_prefill failed on rank 1 (no triton)"
    here, there = ranks(2).run(agree, 0)
    assert here == [Answer(False, lacking)] * 2
    assert there == [Answer(False, "no triton"), Answer(False, lacking)]


# A group of one, and what is refused.


def lone_group(**changes: Any) -> ReduceGroup:
    values: dict[str, Any] = {
        "name": "one rank", "side": "attention", "ranks": (0,), "rank": 0, "device_group": None,
        "comm": SingleComm(), "decision": decide(1),
    }  # fmt: skip
    return ReduceGroup(**{**values, **changes})


def test_a_group_of_one_launches_and_counts_nothing():
    group = lone_group()
    partial, residual, weight = operands(3, 0, torch.bfloat16)
    got = allreduce_residual_rmsnorm(partial, residual, weight, group=group, eps=EPS, weight_bias=1.0)
    want = add_rmsnorm(partial, residual, weight, EPS, 1.0)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    assert torch.equal(all_reduce(partial, group=group), partial)
    assert (group.counts.fused, group.counts.unfused, group.counts.plain) == (0, 0, 0)


GOOD = {"partial": torch.ones(3, 8), "residual": torch.ones(3, 8), "weight": torch.ones(8)}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"partial": torch.ones(8)},
            ValueError,
            r"partial must be \[num_tokens, hidden_size\], got shape \(8,\)",
        ),
        ({"partial": torch.ones(3, 8, dtype=torch.int32)}, TypeError, "got torch.int32"),
        ({"residual": torch.ones(2, 8)}, ValueError, r"residual must have shape \(3, 8\).*got \(2, 8\)"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must have shape \(8,\).*got \(7,\)"),
        (
            {"weight": torch.ones(8).half()},
            TypeError,
            "weight must have partial's dtype torch.float32, got torch.float16",
        ),
        ({"residual": torch.ones(8, 3).t()}, ValueError, "residual must be contiguous"),
        (
            {"residual": torch.ones(3, 8, device="meta")},
            ValueError,
            "residual must be on partial's device cpu, got meta",
        ),
    ],
)
def test_operands_that_do_not_fit_are_refused_by_name(changes: dict[str, Tensor], kind: type, message: str):
    with pytest.raises(kind, match=message):
        allreduce_residual_rmsnorm(**{**GOOD, **changes}, group=lone_group(), eps=EPS, weight_bias=1.0)


def test_a_plain_sum_of_strided_memory_is_refused():
    with pytest.raises(ValueError, match="x must be contiguous"):
        all_reduce(torch.ones(8, 3).t(), group=lone_group())


def test_fusing_without_a_workspace_says_why():
    group = lone_group(decision=decide(2, mode="off"))
    with pytest.raises(ValueError, match=r"no workspace to fuse in: .*switched off by the user"):
        fused(**GOOD, group=group, eps=EPS, weight_bias=1.0)
    assert group.counts.fused == 0


def test_a_group_needs_its_rank_and_its_process_group():
    with pytest.raises(ValueError, match=r"local rank 2 is not one of ranks \(0, 1\)"):
        lone_group(ranks=(0, 1), rank=2)
    with pytest.raises(ValueError, match="need a torch process group"):
        lone_group(ranks=(0, 1), rank=1)


def test_an_op_whose_group_is_gone_says_so():
    handle = lone_group().handle
    gc.collect()
    with pytest.raises(RuntimeError, match=f"reduce group {handle} is gone"):
        torch.ops.crossfuse.all_reduce(torch.ones(3), handle)


def test_both_ways_have_one_signature():
    import inspect

    signatures = {str(inspect.signature(way)) for way in (allreduce_residual_rmsnorm, fused, unfused)}
    assert len(signatures) == 1
