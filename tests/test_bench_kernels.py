"""The benchmark of single kernels on CPU: what it counts as a kernel's least work, and that it times no wrong one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bench import torch_pair
from bench.clock import samples_us
from bench.kernel_cases import Case, cases
from bench.kernel_operands import MAX_SETS, MIN_SETS, Rank
from bench.result import KernelRow, KernelSpec
from bench.torch_kernels import distance, measure
from core_torch.kernels import moe_prefill
from core_torch.kernels.comm import GlooComm
from core_torch.kernels.native import Answer
from core_torch.kernels.workspace import open_workspace
from shared_config import FlashInferInfo
from shared_config.presets import with_layers
from tests.bench_cases import kernel_spec
from tests.fusion_ranks import HIDDEN, decide, plain_combine, reduce_group
from tests.ranks import RankError, RankPool

CPU = torch.device("cpu")


def small_spec(**changes: int) -> KernelSpec:
    """Of a small model with the 80B model's proportions."""
    config = {
        **with_layers(kernel_spec().hf_config, 4),
        "hidden_size": HIDDEN,
        "vocab_size": 101,
        "num_experts": 16,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        **changes,
    }
    return kernel_spec(
        hf_config=config, batches=(1, 3), lengths=(20,), max_step_tokens=67, device="cpu", dtype="float32"
    )


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str, int], Case]:
    """Every case by kernel, phase and tokens."""
    torch.manual_seed(0)
    return {(case.kernel, case.phase, case.num_tokens): case for case in cases(Rank(small_spec(), CPU, 0))}


def test_every_kernel_has_a_case_for_each_size(found: dict[tuple[str, str, int], Case]) -> None:
    both = {"add_norm", "norm_rope", "vocabulary: rows"}
    decode = {name for name, phase, _ in found if phase == "decode"}
    assert decode == both | {
        "few_rows: q, k, v, z, b, a", "few_rows: q, gate, k, v", "few_rows: out", "few_rows: router", "few_rows: head",
        "gdn_decode", "moe_decode: experts", "moe_decode: routing", "paged_decode", "vocabulary: argmax",
    }  # fmt: skip
    prefill = {name for name, phase, _ in found if phase == "prefill"}
    assert prefill == both | {"flash_prefill", "gdn_prefill", "moe_prefill: experts", "moe_prefill: routing"}
    assert {(phase, tokens) for _, phase, tokens in found} == {
        ("decode", 1), ("decode", 3), ("prefill", 20), ("prefill", 60),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "num_tokens", "num_bytes", "flops"),
    [
        # 6176 rows of weights with 64 inputs, the tokens, and the results
        ("few_rows: q, k, v, z, b, a", 3, 4 * (6176 * 64 + 3 * 64 + 3 * 6176), 2 * 3 * 6176 * 64),
        ("add_norm", 3, 4 * (4 * 3 * 64 + 64), 0),
        ("vocabulary: argmax", 3, 4 * 3 * 51 + 3 * 8, 0),
        # states of 16 heads read and written, three inputs of 4096 channels too; one projection, one result
        (
            "gdn_decode",
            3,
            4 * 3 * (2 * (16 * 128 * 128 + 4096 * 3) + 6176 + 2048),
            3 * (6 * 16 * 128 * 128 + 8 * 4096),
        ),
        ("moe_decode: routing", 3, 4 * 3 * 17 + 3 * 4 * (4 + 4), 0),
        ("norm_rope", 3, 2 * 4 * 3 * 10 * 256 + 2 * 3 * 8, 0),
        # keys and values of 20 tokens, queries, results; two products of 8 heads with each token
        ("paged_decode", 3, 4 * (3 * 20 * 2 * 256 + 2 * 3 * 8 * 256), 4 * 3 * 20 * 8 * 256),
    ],
)
def test_the_least_work_is_every_operand_once(
    found: dict[tuple[str, str, int], Case], kernel: str, num_tokens: int, num_bytes: int, flops: int
) -> None:
    case = found[kernel, "decode", num_tokens]
    assert case.memory_bytes == num_bytes
    assert case.flops == flops


def test_experts_count_where_they_are_touched(found: dict[tuple[str, str, int], Case]) -> None:
    one, expert = found["moe_decode: experts", "decode", 1], 3 * 16 * 64 * 4
    assert one.memory_bytes == 4 * expert + 2 * 64 * 4  # three of a token's own, and the shared one
    assert one.flops == 2 * 4 * 3 * 16 * 64
    many = found["moe_prefill: experts", "prefill", 60]
    assert many.memory_bytes == 17 * expert + 2 * 60 * 64 * 4
    assert many.flops == 60 * one.flops


def test_sets_of_operands_exceed_the_cache_within_bounds() -> None:
    rank = Rank(kernel_spec(), CPU, 50 << 20)
    assert rank.sets(10 << 20) == 10
    assert rank.sets(1 << 30) == MIN_SETS
    assert rank.sets(16) == MAX_SETS


def test_plain_torch_does_what_the_reference_does(found: dict[tuple[str, str, int], Case]) -> None:
    """Each case's plain path runs, alike after `restore`; a kernel that gives the same is no distance away."""
    for case in found.values():
        same = replace(case, compiled=case.plain)
        assert distance(same) == 0, case.kernel


def test_a_wrong_kernel_is_not_timed(found: dict[tuple[str, str, int], Case]) -> None:
    case = found["add_norm", "decode", 3]

    def wrong(i: int) -> Tensor:
        return case.plain(i) * 1.1

    with pytest.raises(RuntimeError, match=r"add_norm with 3 tokens is 0.1 apart from plain torch"):
        measure(replace(case, answer=Answer(True), compiled=wrong), 2, CPU)
    with pytest.raises(RuntimeError, match=r"nan apart"):
        measure(replace(case, answer=Answer(True), compiled=lambda i: case.plain(i) * torch.nan), 2, CPU)
    row = measure(replace(case, answer=Answer(True), compiled=case.plain), 2, CPU)
    assert row.timing is not None
    assert (row.apart, row.timing.samples, row.plain.samples) == (0, 2, 2)


def test_a_sample_is_the_mean_of_all_calls() -> None:
    called: list[int] = []
    calls = [lambda i=i: called.append(i) for i in range(3)]
    assert len(samples_us(calls, 2, CPU)) == 2
    assert called == [0, 1, 2] * 3  # once to warm up


def two_rank_rows(spec: KernelSpec, usable: bool, wrong_on: int | None) -> list[KernelRow]:
    """The rows of what two ranks run together; where it is said to be `usable`, on the reference workspace."""
    decision, device = decide(2, max_tokens=67, itemsize=4), CPU
    with (
        torch.inference_mode(),
        mock.patch.object(moe_prefill, "combine", plain_combine),
        open_workspace(
            decision, GlooComm(), hidden_size=HIDDEN, dtype=torch.float32, device=device, max_tokens=67,
            flashinfer=FlashInferInfo(), device_group=dist.group.WORLD,
        ) as workspace,
    ):  # fmt: skip
        group, rows = reduce_group(decision, workspace), []
        for case in torch_pair.cases(Rank(spec, device, 0), group):
            assert not case.answer.usable
            factor = 1.1 if group.rank == wrong_on else 1.0

            def scaled(i: int, case: Case = case, factor: float = factor) -> Tensor:
                return case.compiled(i) * factor

            answer = Answer(True) if usable else case.answer
            rows.append(torch_pair.measure(replace(case, answer=answer, compiled=scaled), 2, group, device))
        assert (group.counts.fused > 0) == usable
    return rows


def test_two_ranks_kernels_are_timed_beside_plain_torch(ranks: Callable[[int], RankPool]) -> None:
    rows, others = ranks(2).run(two_rank_rows, small_spec(), True, None)
    assert rows == others, "both tell the slower rank's times"
    message, choices = 4 * 64, 4 * 4 * 64 + 4 * 4  # bytes of a token: its row; its four parts and their ids
    assert [(row.kernel, row.num_tokens, row.memory_bytes, row.wire_bytes) for row in rows] == [
        (kernel, T, T * read + 4 * 64, T * message)
        for T in (20, 60)
        for kernel, read in (
            ("pair_allreduce", 4 * message),
            ("pair_allreduce: choices", choices + 3 * message),
            ("combine + pair_allreduce", choices + 3 * message),
        )
    ]
    for row in rows:
        assert row.timing is not None
        assert (row.timing.samples, row.plain.samples) == (2, 2)
        assert row.apart == pytest.approx(0, abs=1e-6)


def test_where_they_do_not_run_only_plain_torch_is_timed(ranks: Callable[[int], RankPool]) -> None:
    rows, _ = ranks(2).run(two_rank_rows, small_spec(), False, None)
    assert [(row.timing, row.apart) for row in rows] == [(None, None)] * 6


def test_a_kernel_that_is_wrong_on_one_rank_is_timed_on_none(ranks: Callable[[int], RankPool]) -> None:
    with pytest.raises(RankError, match=r"pair_allreduce with 20 tokens is 0.1 apart"):
        ranks(2).run(two_rank_rows, small_spec(), True, 1)


def choices_answer(spec: KernelSpec) -> str:
    decision = decide(2, max_tokens=67, itemsize=4)
    found = torch_pair.cases(Rank(spec, CPU, 0), reduce_group(decision))
    return next(case.answer.reason for case in found if case.kernel == "pair_allreduce: choices")


def test_a_shared_expert_of_its_own_size_leaves_no_choices_to_add(ranks: Callable[[int], RankPool]) -> None:
    apart = ranks(2).run(choices_answer, small_spec(shared_expert_intermediate_size=64))
    assert all(reason.startswith("the shared expert has a size of its own") for reason in apart)
    assert not any("shared expert" in reason for reason in ranks(2).run(choices_answer, small_spec()))
