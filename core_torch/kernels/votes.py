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
    """Collective: passes when every rank says ok. `what` names the step, alike on all ranks.

    A rank may say no without a reason, because of another rank; then only the reasons that were given are
    kept.
    """
    ballots = comm.allgather((what, ok, reason, fatal))
    steps = {ballot[0] for ballot in ballots}
    if steps != {what}:
        raise CommError(f"the ranks are at different steps, and cannot vote: {sorted(map(str, steps))}")
    against = [(rank, ballot[2]) for rank, ballot in enumerate(ballots) if not ballot[1]]
    if not against:
        return Vote(True)
    reasons = [(rank, text) for rank, text in against if text] or against
    named = "; ".join(f"rank {rank} ({text or 'no reason given'})" for rank, text in reasons)
    return Vote(False, f"{what} failed on {named}", any(ballot[3] for ballot in ballots))


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
    rank that fails says so in the all-gather that its peers are in. All ranks leave in the same round with
    the same `ok`; those that failed themselves have a reason.
    """
    section = _Section(comm)
    mine = attempt(lambda: action(section))
    if not section.over:
        section.leave(mine)
    if not section.over or (not mine.ok and not section.interrupted):
        return mine
    return Attempt(False, section.reason)


class _SectionOverError(RuntimeError):
    """A peer has failed, so this rank's part is over too."""


class _Section:
    """`CommBackend` for `attempt_together`."""

    def __init__(self, comm: CommBackend) -> None:
        self._comm = comm
        self.over = False  # some rank has failed
        self.interrupted = False  # ... while this one was still at work
        self.reason = ""

    def Get_rank(self) -> int:  # noqa: N802
        return self._comm.Get_rank()

    def Get_size(self) -> int:  # noqa: N802
        return self._comm.Get_size()

    def allgather(self, data: Any) -> tuple[Any, ...]:
        messages = self._round("data", data)
        if self.over:
            self.interrupted = True
            raise _SectionOverError(self.reason or "another rank failed")
        return tuple(message[1] for message in messages)

    def bcast(self, data: Any, root: int) -> Any:
        return self.allgather(data if self.Get_rank() == root else None)[root]

    def barrier(self) -> None:
        self.allgather(None)

    def Split(self, color: int, key: int) -> NoReturn:  # noqa: N802
        raise NotImplementedError(f"Split(color={color}, key={key}) inside a step that is voted on")

    def leave(self, mine: Attempt[Any]) -> None:
        self._round("done" if mine.ok else "failed", None)

    def _round(self, kind: str, data: Any) -> tuple[Any, ...]:
        if self.over:
            raise _SectionOverError("another rank failed, and this step went on")
        messages = self._comm.allgather((kind, data))
        kinds = {message[0] for message in messages}
        self.over = kinds not in ({"data"}, {"done"})
        if self.over and "failed" not in kinds:
            self.reason = "the ranks came to the end of the step at different points"
        return messages
