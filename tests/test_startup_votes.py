"""Votes, and collective library code that fails on one rank only. Ranks are threads, without torch.distributed."""

from __future__ import annotations

from typing import Any

import pytest

from core_torch.kernels.comm import CommBackend, CommError, SingleComm
from core_torch.kernels.votes import FatalStepError, attempt, attempt_together, vote
from tests.fusion_ranks import ThreadComm, on_threads


def test_a_vote_passes_only_when_all_ranks_say_ok():
    assert all(outcome.passed for outcome in on_threads(3, lambda comm: vote(comm, True, "a step")))

    def one_says_no(comm: ThreadComm) -> Any:
        return vote(comm, comm.rank != 1, "a step", "no memory" if comm.rank == 1 else "")

    outcomes = on_threads(3, one_says_no)
    assert len(set(outcomes)) == 1
    assert not outcomes[0].passed
    assert outcomes[0].reason == "a step failed on rank 1 (no memory)"


def test_ranks_at_different_steps_do_not_vote():
    outcomes = on_threads(2, lambda comm: vote(comm, True, f"step {comm.rank}"))
    assert all(isinstance(outcome, CommError) for outcome in outcomes)
    assert "step 0" in str(outcomes[0])
    assert "step 1" in str(outcomes[0])


def test_a_rank_that_cannot_go_on_is_known_to_all():
    def stuck() -> None:
        raise FatalStepError("the GPU waits")

    def main(comm: ThreadComm) -> Any:
        mine = attempt(stuck) if comm.rank == 1 else attempt(lambda: 1)
        return vote(comm, mine.ok, "a step", mine.reason, mine.fatal)

    assert [outcome.fatal for outcome in on_threads(2, main)] == [True, True]


def test_an_attempt_keeps_the_reason_and_lets_a_broken_group_through():
    failed = attempt(lambda: 1 // 0)
    assert not failed.ok
    assert "ZeroDivisionError" in failed.reason

    def broken() -> None:
        raise CommError("rank 1 has ended")

    with pytest.raises(CommError):
        attempt(broken)


def handshake(comm: CommBackend, fails: dict[int, int]) -> tuple[Any, ...]:
    """Library code: three collectives. `fails[rank]` is the one before which that rank raises."""
    rank = comm.Get_rank()
    seen = []
    for step, call in enumerate((lambda: comm.allgather(rank), lambda: comm.bcast(rank, 1), comm.barrier)):
        if fails.get(rank) == step:
            raise MemoryError(f"before collective {step}")
        seen.append(call())
    if fails.get(rank) == 3:
        raise MemoryError("after the last")
    return tuple(seen)


def test_a_step_that_talks_inside_gives_its_value_on_every_rank():
    outcomes = on_threads(3, lambda comm: attempt_together(comm, lambda inner: handshake(inner, {})))
    assert [outcome.value for outcome in outcomes] == [((0, 1, 2), 1, None)] * 3


@pytest.mark.parametrize("step", [0, 1, 2, 3])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_fails_in_the_middle_of_a_step_stops_all(rank: int, step: int):
    def main(comm: ThreadComm) -> Any:
        mine = attempt_together(comm, lambda inner: handshake(inner, {rank: step}))
        # The next message must not be taken for one of the step's.
        return mine.ok, vote(comm, mine.ok, "the step", mine.reason), comm.allgather("next")

    for ok, outcome, following in on_threads(3, main):
        assert not ok
        assert outcome.reason.startswith(f"the step failed on rank {rank} (MemoryError: ")
        assert following == ("next",) * 3


def test_two_ranks_that_fail_at_once_are_both_named():
    def main(comm: ThreadComm) -> Any:
        mine = attempt_together(comm, lambda inner: handshake(inner, {0: 1, 1: 1}))
        return vote(comm, mine.ok, "the step", mine.reason).reason

    (reason,) = set(on_threads(3, main))
    assert "rank 0 (MemoryError" in reason
    assert "rank 1 (MemoryError" in reason
    assert "rank 2" not in reason


def test_ranks_that_make_a_different_number_of_calls_are_found():
    def main(comm: ThreadComm) -> Any:
        def uneven(inner: CommBackend) -> None:
            for _ in range(1 + inner.Get_rank()):
                inner.barrier()

        mine = attempt_together(comm, uneven)
        return vote(comm, mine.ok, "the step", mine.reason)

    (outcome,) = set(on_threads(2, main))
    assert not outcome.passed
    assert "different points" in outcome.reason


def test_a_library_that_hides_the_interruption_does_not_hang():
    """The step is over for all: a rank that swallows that and goes on gets an error, not a wait."""

    def stubborn(inner: CommBackend) -> str:
        if inner.Get_rank() == 0:
            raise MemoryError("at the start")
        try:
            inner.barrier()
        except RuntimeError:
            inner.barrier()
        return "unreachable"

    outcomes = on_threads(2, lambda comm: attempt_together(comm, stubborn))
    assert [outcome.ok for outcome in outcomes] == [False, False]


def test_a_rank_that_ends_is_an_error_for_its_peers():
    def main(comm: ThreadComm) -> Any:
        if comm.rank == 1:
            return "gone"
        return attempt_together(comm, lambda inner: inner.allgather(1))

    outcomes = on_threads(2, main, timeout=0.5)
    assert isinstance(outcomes[0], CommError)


def test_a_group_of_one():
    comm = SingleComm()
    assert (comm.Get_rank(), comm.Get_size(), comm.allgather("x"), comm.bcast("x", 0)) == (0, 1, ("x",), "x")
    assert vote(comm, True, "a step").passed
    assert comm.Split(3, 0).Get_size() == 1
    with pytest.raises(ValueError, match="no rank 1"):
        comm.bcast("x", 1)
