"""All ranks go, or none: votes, and a way to run collective library code that may fail on one rank only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

from core_torch.kernels.comm import CommBackend, CommError

T = TypeVar("T")


@dataclass(frozen=True)
class Vote:
    """The same on every rank. `reason` names the ranks that said no, and why.

    `fatal` says that a rank cannot go on at all, not even without what was voted on.
    """

    passed: bool
    reason: str = ""
    fatal: bool = False


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """What became of a step on this rank: its `value`, or the `reason` why there is none."""

    ok: bool
    reason: str = ""
    value: T | None = None
    fatal: bool = False


class FatalStepError(RuntimeError):
    """Raised by a step after which this rank cannot go on, whatever the others say."""


def vote(comm: CommBackend, ok: bool, what: str, reason: str = "", fatal: bool = False) -> Vote:
    """Collective: passes when every rank says ok. `what` names the step, alike on all ranks."""
    ballots = comm.allgather((what, ok, reason, fatal))
    steps = {ballot[0] for ballot in ballots}
    if steps != {what}:
        raise CommError(f"the ranks are at different steps, and cannot vote: {sorted(map(str, steps))}")
    against = [(rank, ballot) for rank, ballot in enumerate(ballots) if not ballot[1]]
    if not against:
        return Vote(True)
    reasons = "; ".join(f"rank {rank}: {ballot[2] or 'no reason given'}" for rank, ballot in against)
    return Vote(False, f"{what} failed on {reasons}", any(ballot[3] for _, ballot in against))


def attempt(action: Callable[[], T]) -> Attempt[T]:
    """Runs a step that talks to nobody. What it raises becomes the reason to vote no with.

    `CommError` goes through: without a working group there is nobody to vote with.
    """
    try:
        return Attempt(True, value=action())
    except CommError:
        raise
    except Exception as error:
        return Attempt(False, f"{type(error).__name__}: {error}", fatal=isinstance(error, FatalStepError))


def attempt_together(comm: CommBackend, action: Callable[[CommBackend], T]) -> Attempt[T]:
    """Runs a step that talks over `comm` inside (FlashInfer exchanging handles), on all ranks of `comm`.

    A rank that raises in the middle would leave its peers in a collective, and its next vote would be taken
    for a handle. So `action` gets a communicator whose every call is one all-gather of (kind, data), and a
    rank that fails says so in the all-gather that its peers are in. All ranks leave in the same round. `ok`
    is the same on all of them.
    """
    section = _Section(comm)
    mine = attempt(lambda: action(section))
    if section.failure is None:
        section.leave(mine)
    if section.failure is not None:
        return Attempt(False, section.failure, fatal=mine.fatal)
    return mine


class _SectionOverError(RuntimeError):
    """A peer has failed, so this rank's part is over too."""


class _Section:
    """`CommBackend` for `attempt_together`."""

    def __init__(self, comm: CommBackend) -> None:
        self._comm = comm
        self.failure: str | None = None

    def Get_rank(self) -> int:  # noqa: N802
        return self._comm.Get_rank()

    def Get_size(self) -> int:  # noqa: N802
        return self._comm.Get_size()

    def allgather(self, data: Any) -> tuple[Any, ...]:
        return self._round("data", data)

    def bcast(self, data: Any, root: int) -> Any:
        return self._round("data", data if self.Get_rank() == root else None)[root]

    def barrier(self) -> None:
        self._round("data", None)

    def Split(self, color: int, key: int) -> NoReturn:  # noqa: N802
        raise NotImplementedError(
            f"Split(color={color}, key={key}): a step voted on by one group cannot split it"
        )

    def leave(self, mine: Attempt[Any]) -> None:
        try:
            self._round("done" if mine.ok else "failed", mine.reason)
        except _SectionOverError:
            return  # `failure` has the reasons

    def _round(self, kind: str, data: Any) -> tuple[Any, ...]:
        if self.failure is not None:
            raise _SectionOverError(self.failure)
        messages = self._comm.allgather((kind, data))
        kinds = [message[0] for message in messages]
        if all(other == kind for other in kinds) and kind != "failed":
            return tuple(message[1] for message in messages)
        failed = [
            f"rank {rank}: {message[1]}" for rank, message in enumerate(messages) if message[0] == "failed"
        ]
        self.failure = "; ".join(failed) or f"the ranks finished at different points: {kinds}"
        raise _SectionOverError(self.failure)
