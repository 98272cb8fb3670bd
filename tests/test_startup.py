"""Start-up: all ranks fuse or none does, whatever goes wrong on one of them, and all know why.

Most ranks here are threads with a stand-in FlashInfer (as a framework with one process for all GPUs has them);
what torch.distributed changes is tested with gloo ranks and the reference backend.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from core_torch.kernels import buffers, native, selftest, startup
from core_torch.kernels.buffers import FlashInferBuffers, ReferenceBuffers
from core_torch.kernels.comm import GlooComm, SingleComm
from core_torch.kernels.contract import add_rmsnorm, sum_in_rank_order
from core_torch.kernels.moe_prefill import ChoiceParts
from core_torch.kernels.startup import start_fusion
from core_torch.kernels.votes import FatalStepError
from shared_config import FlashInferInfo, FusionDecision, FusionError, FusionWarning, probe_flashinfer
from shared_config.limits import PairLimit
from tests.fusion_ranks import HIDDEN, FakeFlashInfer, ThreadComm, decide, on_threads, plain_combine
from tests.ranks import RankError, RankPool

CPU = torch.device("cpu")
Pools = Callable[[int], RankPool]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFlashInfer]:
    fake = FakeFlashInfer()
    monkeypatch.setattr(buffers, "try_allocation", lambda _sizes, _device: None)
    with mock.patch.dict(sys.modules, fake.modules):
        yield fake


def info(fake: FakeFlashInfer) -> FlashInferInfo:
    return probe_flashinfer(fake, "0.7.2")


def start_on_threads(
    fake: FakeFlashInfer,
    world_size: int = 2,
    decision: Callable[[int], FusionDecision] | None = None,
    **request: Any,
) -> list[Any]:
    """start_fusion on every thread: (decision, workspace) or the exception, by rank."""
    flashinfer = info(fake)
    same = decide(world_size, flashinfer=flashinfer, backend="auto", **request)

    def main(comm: ThreadComm) -> Any:
        mine = same if decision is None else decision(comm.rank)
        return start_fusion(
            mine, comm, hidden_size=HIDDEN, dtype=torch.bfloat16, device=CPU, flashinfer=flashinfer
        )

    return on_threads(world_size, main)


def fail_on(
    rank: int, original: Callable[..., Any], error: Exception, *, after: bool = False
) -> Callable[..., Any]:
    """`original`, which raises on one rank's thread, before or after its work."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        failing = threading.current_thread().name == f"rank {rank}"
        if failing and not after:
            raise error
        result = original(*args, **kwargs)
        if failing:
            raise error
        return result

    return wrapped


def corrupt_on(rank: int, original: Callable[..., None]) -> Callable[..., None]:
    """The op, with one wrong element on one rank's thread."""

    def wrapped(*args: Any) -> None:
        original(*args)
        if threading.current_thread().name == f"rank {rank}":
            args[-1][-1, 3] += 1

    return wrapped


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_get_a_workspace(fake: FakeFlashInfer, world_size: int):
    started = start_on_threads(fake, world_size)
    assert all(decision.enabled and decision.backend == "trtllm" for decision, _ in started)
    assert len({decision.digest for decision, _ in started}) == 1
    assert sorted(call["rank"] for call in fake.created) == list(range(world_size))
    for call in fake.created:
        assert call["backend"] == "trtllm", "never 'auto', which prefers multicast"
        assert (call["world_size"], call["max_token_num"], call["hidden_dim"]) == (world_size, 67, HIDDEN)
    for _, workspace in started:
        assert workspace.sufficient(67)
        assert not workspace.sufficient(68)
        workspace.close()
    assert all(made.destroyed for made in fake.workspaces)
    assert len(fake.released) == world_size


def test_the_steps_come_in_order(fake: FakeFlashInfer, monkeypatch: pytest.MonkeyPatch):
    steps: list[str] = []
    for owner, name in (
        (FlashInferBuffers, "probe"),
        (FlashInferBuffers, "create"),
        (selftest, "prepare"),
        (selftest, "run"),
    ):
        original = getattr(owner, name)

        def noted(
            *args: Any, _name: str = name, _original: Callable[..., Any] = original, **kwargs: Any
        ) -> Any:
            if threading.current_thread().name == "rank 0":
                steps.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)
    start_on_threads(fake)
    assert steps == ["probe", "create", "prepare", "run"]


FAULTS: dict[str, tuple[Any, str, str]] = {
    "allocation": (
        buffers,
        "try_allocation",
        "trying the allocation failed on rank 1 (MemoryError: injected)",
    ),
    "kernel": (FlashInferBuffers, "probe", "trying the allocation failed on rank 1 (MemoryError: injected)"),
    "self-test data": (
        selftest,
        "prepare",
        "preparing the self-test failed on rank 1 (MemoryError: injected)",
    ),
    "self-test": (selftest, "check", "the self-test failed on rank 1 (MemoryError: injected)"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_failure_on_one_rank_turns_fusion_off_on_all(
    fake: FakeFlashInfer, monkeypatch: pytest.MonkeyPatch, fault: str, world_size: int
):
    owner, name, reason = FAULTS[fault]
    monkeypatch.setattr(owner, name, fail_on(1, getattr(owner, name), MemoryError("injected")))
    with pytest.warns(FusionWarning) as caught:
        started = start_on_threads(fake, world_size)
    assert len(caught) == 1, "one warning, on rank 0"
    assert reason in str(caught[0].message)
    for decision, workspace in started:
        assert workspace is None
        assert not decision.enabled
        assert decision.backend == "unfused"
        assert decision.reason == reason
        assert decision.decided_by.startswith("start-up: ")
    assert len({decision.digest for decision, _ in started}) == 1
    assert all(made.destroyed for made in fake.workspaces)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("after", [False, True], ids=["before its first message", "after its last message"])
def test_a_creation_that_fails_on_one_rank_leaves_no_peer_waiting(
    fake: FakeFlashInfer, rank: int, after: bool
):
    fake.create_allreduce_fusion_workspace = fail_on(
        rank, fake.create_allreduce_fusion_workspace, RuntimeError("injected"), after=after
    )
    # A wrapped function has lost its signature, which is probed; the real one's is what counts.
    fake_info = info(FakeFlashInfer())
    decision = decide(2, flashinfer=fake_info, backend="auto")
    with pytest.warns(
        FusionWarning, match=rf"creating the workspace failed on rank {rank} \(RuntimeError: injected\)"
    ):
        started = on_threads(
            2,
            lambda comm: start_fusion(
                decision, comm, hidden_size=HIDDEN, dtype=torch.bfloat16, device=CPU, flashinfer=fake_info
            ),
        )
    assert [workspace for _, workspace in started] == [None, None]
    finished_elsewhere = [made for made in fake.workspaces if made.rank != rank]
    assert all(made.destroyed for made in finished_elsewhere)


def test_one_wrong_element_on_one_rank_is_found(fake: FakeFlashInfer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FlashInferBuffers, "run", corrupt_on(1, FlashInferBuffers.run))
    with pytest.warns(
        FusionWarning, match=r"the self-test failed on rank 1 .*1 of 64 values of the norm are wrong"
    ):
        started = start_on_threads(fake)
    assert all(not decision.enabled for decision, _ in started)


def test_fusion_on_makes_the_same_failure_an_error_on_all_ranks(
    fake: FakeFlashInfer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(FlashInferBuffers, "run", corrupt_on(1, FlashInferBuffers.run))
    for outcome in start_on_threads(fake, mode="on"):
        assert isinstance(outcome, FusionError)
        assert "the self-test failed on rank 1" in str(outcome)
        assert outcome.decision is not None
        assert not outcome.decision.enabled


def test_without_the_kernel_for_long_calls_all_ranks_go_on_alike(
    fake: FakeFlashInfer, monkeypatch: pytest.MonkeyPatch
):
    """Rank 1 cannot have it; then none uses it, all know why, and FlashInfer's kernel takes all that fuses."""

    def check(**_shapes: Any) -> native.Answer:
        return native.Answer(threading.current_thread().name != "rank 1", "no compiler")

    monkeypatch.setattr(startup, "check_pair_allreduce", check)
    for decision, workspace in start_on_threads(fake, mode="on", max_bytes=64 << 20):
        assert decision.enabled
        assert decision.pair.max_bytes == 0
        assert decision.pair.source == "choosing pair_allreduce failed on rank 1 (no compiler)"
        assert workspace.max_tokens == decision.max_tokens(2) == decision.max_backend_tokens(2)


class FakePair:
    """Stands in for PairMemory: takes note, and answers as FlashInfer's stand-in does."""

    def __init__(self, comm: Any, *, max_tokens: int, hidden_size: int, device: torch.device) -> None:
        del hidden_size, device
        self.comm, self.max_tokens, self.closed = comm, max_tokens, False
        self.calls: list[int] = []
        self.choices: list[int] = []
        made_pairs.append(self)

    def run(
        self,
        partial: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        out_residual: torch.Tensor,
        out_normed: torch.Tensor,
    ) -> None:
        self.calls.append(len(partial))
        parts = torch.stack(self.comm.allgather(partial.clone()))
        outputs = add_rmsnorm(sum_in_rank_order(parts), residual, weight, eps, weight_bias)
        out_residual.copy_(outputs[0])
        out_normed.copy_(outputs[1])

    def run_choices(self, choices: ChoiceParts, *operands: Any) -> None:
        self.choices.append(len(choices.experts))
        self.run(plain_combine(choices.parts, choices.experts, num_experts=choices.num_experts), *operands)

    def destroy(self) -> None:
        self.closed = True


made_pairs: list[FakePair] = []


def test_long_calls_run_in_their_own_kernel_which_is_tested_first(
    fake: FakeFlashInfer, monkeypatch: pytest.MonkeyPatch
):
    made_pairs.clear()
    monkeypatch.setattr(startup, "check_pair_allreduce", lambda **_: native.Answer(True))
    monkeypatch.setattr(buffers, "PairMemory", FakePair)
    monkeypatch.setattr(native, "load", lambda *_: None)
    limit = PairLimit(100 * HIDDEN * 2, 150 * HIDDEN * 2, "for a test")
    same = replace(decide(2, flashinfer=info(fake), backend="auto"), pair=limit)

    def use(workspace: Any) -> None:
        for count in (100, 101, 7):
            rows = torch.zeros(count, HIDDEN, dtype=torch.bfloat16)
            workspace.run(rows, rows, rows[0], 1e-6, 1.0)
            experts = torch.tensor([0, 1, 0, -1]).int().repeat(count, 1)
            choices = ChoiceParts(torch.ones(4 * count, HIDDEN).bfloat16(), experts, 1)
            assert workspace.adds_choices(choices) == (count == 101)
            refused = [replace(choices, experts=experts.long())]
            if count == 101:
                summed, _ = workspace.run_choices(choices, rows, rows[0], 1e-6, 1.0)
                assert torch.equal(summed, torch.full_like(rows, 4.0))
                many = torch.zeros(count, 33).int()
                refused.append(ChoiceParts(torch.ones(33 * count, HIDDEN).bfloat16(), many, 1))
                wide = torch.zeros(count, 2 * HIDDEN).bfloat16()
                with pytest.raises(ValueError, match="does not add choices"):
                    workspace.run_choices(
                        ChoiceParts(wide, many[:, :1].contiguous(), 1), wide, wide[0], 1e-6, 1.0
                    )
            else:
                refused.append(choices)
            for other in refused:
                assert not workspace.adds_choices(other)
                with pytest.raises(ValueError, match=r"does not add choices .*: give it their sum\(\)"):
                    workspace.run_choices(other, rows, rows[0], 1e-6, 1.0)

    started = start_on_threads(fake, decision=lambda _: same)
    assert [pair.max_tokens for pair in made_pairs] == [150, 150]
    assert [pair.calls for pair in made_pairs] == [[150, 103], [150, 103]], "the largest batch, then choices"
    assert [pair.choices for pair in made_pairs] == [[103], [103]]
    assert fake.created[-1]["max_token_num"] == 100
    fake.calls.clear()
    results = on_threads(2, lambda comm: use(started[comm.rank][1]))
    assert not any(results), results
    assert [pair.calls for pair in made_pairs] == [[150, 103, 101, 101], [150, 103, 101, 101]]
    assert [pair.choices for pair in made_pairs] == [[103, 101], [103, 101]]
    assert sorted(call["input"].shape[0] for call in fake.calls) == [7, 7, 100, 100]
    for _, workspace in started:
        workspace.close()
    assert all(pair.closed for pair in made_pairs)


def test_a_stuck_gpu_is_an_error_even_when_fusion_is_only_automatic(
    fake: FakeFlashInfer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(selftest, "token_counts", lambda max_tokens, most_tokens: [max_tokens])
    monkeypatch.setattr(selftest, "_wait", fail_on(1, lambda _device: None, FatalStepError("no answer")))
    for outcome in start_on_threads(fake):
        assert isinstance(outcome, FusionError)
        assert "fusion='off'" in str(outcome)
    assert not any(made.destroyed for made in fake.workspaces), "freeing would wait for the stuck kernel"


def test_a_failure_is_remembered_in_the_decision(fake: FakeFlashInfer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selftest, "check", fail_on(1, selftest.check, RuntimeError("injected")))
    with pytest.warns(FusionWarning):
        started = start_on_threads(fake)
    made = len(fake.created)
    again = start_on_threads(fake, decision=lambda rank: started[rank][0])
    assert [decision for decision, _ in again] == [decision for decision, _ in started]
    assert len(fake.created) == made, "nothing is tried a second time"


@pytest.mark.parametrize(
    ("field", "others"),
    [("max_tokens", 40), ("mode", "off")],
    ids=["other sizes", "one rank does not fuse"],
)
def test_ranks_that_decided_differently_find_out_before_anything_is_made(
    fake: FakeFlashInfer, field: str, others: Any
):
    flashinfer = info(fake)

    def decision(rank: int) -> FusionDecision:
        return decide(3, flashinfer=flashinfer, backend="auto", **({field: others} if rank == 2 else {}))

    with pytest.warns(FusionWarning, match="comparing decisions failed on rank 2") as caught:
        started = start_on_threads(fake, 3, decision)
    assert len(caught) == 1
    assert "rank 0 decided" in str(caught[0].message)
    assert len({decision.digest for decision, _ in started}) == 1, "rank 0's decision, switched off"
    assert all(not decision.enabled and workspace is None for decision, workspace in started)
    assert not fake.created


def test_rank_0_that_demands_fusion_makes_disagreement_an_error_on_all(fake: FakeFlashInfer):
    flashinfer = info(fake)
    modes = ("on", "auto")
    outcomes = start_on_threads(
        fake, 2, lambda rank: decide(2, flashinfer=flashinfer, backend="auto", mode=modes[rank])
    )
    assert all(isinstance(outcome, FusionError) for outcome in outcomes)


def test_a_decision_without_fusion_makes_nothing(fake: FakeFlashInfer):
    for decision, workspace in start_on_threads(fake, mode="off"):
        assert workspace is None
        assert decision.decided_by == "fusion"
    assert not fake.created


def test_a_limit_below_one_token_is_a_reason(fake: FakeFlashInfer):
    with pytest.warns(FusionWarning, match="limit of 100 bytes is below one token"):
        started = start_on_threads(fake, max_bytes=100)
    assert all(not decision.enabled for decision, _ in started)


def test_a_group_of_one_starts_nothing():
    decision = decide(2)
    assert start_fusion(
        decision,
        SingleComm(),
        hidden_size=HIDDEN,
        dtype=torch.bfloat16,
        device=CPU,
        flashinfer=FlashInferInfo(),
    ) == (decision, None)


def test_starting_during_capture_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is being captured"):
        start_fusion(
            decide(2),
            SingleComm(),
            hidden_size=HIDDEN,
            dtype=torch.bfloat16,
            device=CPU,
            flashinfer=FlashInferInfo(),
        )


# With gloo ranks and the reference backend.


def start_gloo(decision: FusionDecision, group: Any = None, **options: Any) -> Any:
    group = group or dist.group.WORLD
    return start_fusion(
        decision,
        GlooComm(group),
        hidden_size=HIDDEN,
        dtype=torch.bfloat16,
        device=CPU,
        flashinfer=FlashInferInfo(),
        device_group=group,
        **options,
    )


def _outcome(start: Callable[[], Any]) -> dict[str, Any]:
    """What a rank reports: plain values that can be sent back."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            decision, workspace = start()
        except FusionError as error:
            return {"error": str(error)}
    fused = workspace is not None
    if fused:
        workspace.close()
    texts = [str(warning.message) for warning in caught if warning.category is FusionWarning]
    return {"fused": fused, "reason": decision.reason, "digest": decision.digest, "warnings": texts}


def start_with_fault(decision: FusionDecision, rank: int, step: str) -> dict[str, Any]:
    """`step` ("probe", "create" or "run") raises on global rank `rank`."""
    if dist.get_rank() != rank:
        return _outcome(lambda: start_gloo(decision))
    if step == "run":  # after its collectives, or the peers would wait in them
        original = selftest.run

        def failing(*args: Any) -> None:
            original(*args)
            raise RuntimeError("injected")

        patch = mock.patch.object(selftest, "run", failing)
    else:
        patch = mock.patch.object(ReferenceBuffers, step, side_effect=RuntimeError("injected"))
    with patch:
        return _outcome(lambda: start_gloo(decision))


@pytest.mark.parametrize("world_size", [2, 4])
def test_gloo_ranks_start_or_refuse_together(ranks: Pools, world_size: int):
    pool, decision = ranks(world_size), decide(world_size)
    outcomes = pool.run(start_with_fault, decision, -1, "")
    assert all(outcome["fused"] for outcome in outcomes)
    steps = {
        "probe": "trying the allocation",
        "create": "creating the workspace",
        "run": "the self-test",
    }
    for step, name in steps.items():
        outcomes = pool.run(start_with_fault, decision, world_size - 1, step)
        reason = f"{name} failed on rank {world_size - 1} (RuntimeError: injected)"
        assert [outcome["fused"] for outcome in outcomes] == [False] * world_size
        assert {outcome["reason"] for outcome in outcomes} == {reason}
        assert len({outcome["digest"] for outcome in outcomes}) == 1
        assert [len(outcome["warnings"]) for outcome in outcomes] == [1] + [0] * (world_size - 1)
    demanded = pool.run(start_with_fault, decide(world_size, mode="on"), 1, "create")
    assert all("creating the workspace failed on rank 1" in outcome["error"] for outcome in demanded)


def start_sub_groups(decision: FusionDecision, failing: int) -> dict[str, Any]:
    """Groups [0, 2] and [1, 3]; all four ranks act alike."""
    groups = [dist.new_group(members, backend="gloo") for members in ([0, 2], [1, 3])]
    mine = groups[dist.get_rank() % 2]
    assert isinstance(mine, dist.ProcessGroup)
    comm = GlooComm(mine)
    everybody = GlooComm()
    messages = {
        "place": (comm.Get_rank(), comm.Get_size()),
        "bcast": [comm.bcast(f"from global rank {dist.get_rank()}", root) for root in (0, 1)],
        "allgather": comm.allgather(dist.get_rank()),
        "split": GlooComm().Split(dist.get_rank() // 2, dist.get_rank()).allgather(dist.get_rank()),
    }
    patch = mock.patch.object(ReferenceBuffers, "create", side_effect=RuntimeError("injected"))
    if dist.get_rank() == failing:
        patch.start()
    outcome = _outcome(lambda: start_gloo(decision, mine, all_ranks=everybody))
    mock.patch.stopall()
    return {**messages, **outcome}


def test_sub_groups_translate_ranks_and_stop_together(ranks: Pools):
    decision = decide(2)
    outcomes = ranks(4).run(start_sub_groups, decision, -1)
    for rank, outcome in enumerate(outcomes):
        members = [rank % 2, rank % 2 + 2]
        assert outcome["place"] == (rank // 2, 2)
        assert outcome["bcast"] == [f"from global rank {member}" for member in members]
        assert outcome["allgather"] == tuple(members)
        assert outcome["split"] == tuple(range(rank // 2 * 2, rank // 2 * 2 + 2))
        assert outcome["fused"]
    outcomes = ranks(4).run(start_sub_groups, decision, 3)
    assert [outcome["fused"] for outcome in outcomes] == [False] * 4
    assert {outcome["reason"] for outcome in outcomes} == {
        "creating the workspace failed on rank 3 (RuntimeError: injected)"
    }


def start_and_die(decision: FusionDecision) -> None:
    if dist.get_rank() == 1:
        with mock.patch.object(ReferenceBuffers, "create", side_effect=lambda *_: os._exit(1)):
            start_gloo(decision)
    start_gloo(decision)


def test_a_rank_that_dies_is_a_clear_error_within_seconds(fresh_ranks: Pools):
    pool = fresh_ranks(2)
    pool.run(start_with_fault, decide(2), -1, "")
    begun = time.monotonic()
    with pytest.raises(RankError, match=r"CommError: allgather among ranks .* a rank has ended") as caught:
        pool.run(start_and_die, decide(2))
    assert time.monotonic() - begun < 15
    assert "rank 1: the process died" in str(caught.value)
