"""How the ranks of a mesh exchange small control messages: one thread per local device, in one or more processes.

The same protocol as FlashInfer's (`core_torch.kernels.comm.CommBackend`), so workspaces, votes and self-tests of
the PyTorch core run here unchanged. Threads of a process meet in a `ThreadHub`; processes meet in the key-value
store of `jax.distributed`.
"""

from __future__ import annotations

import itertools
import pickle
import threading
from dataclasses import dataclass, field
from typing import Any

from core_torch.kernels.comm import CommError
from jax_bridge.coordination import KeyValueStore


@dataclass(eq=False)
class _Meeting:
    """One all-gather of a hub."""

    slots: dict[int, Any] = field(default_factory=dict)
    result: tuple[Any, ...] | None = None


class ThreadHub:
    """Where `size` threads of a process meet.

    A thread that is late, or that calls `abort`, ends the hub for all of them, with the first reason.
    """

    def __init__(self, size: int, timeout_s: float = 60.0) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self._changed = threading.Condition()
        self._meeting = _Meeting()
        self._broken = ""

    def exchange(self, seat: int, data: Any, extra_s: float = 0.0) -> tuple[Any, ...]:
        """Every thread's `data`, by seat (0 to size - 1). Raises CommError.

        `extra_s` is how much longer than usual another thread may take.
        """
        timeout_s = self.timeout_s + extra_s
        with self._changed:
            if self._broken:
                raise CommError(self._broken)
            meeting = self._meeting
            meeting.slots[seat] = data
            if len(meeting.slots) == self.size:
                meeting.result = tuple(meeting.slots[other] for other in range(self.size))
                self._meeting = _Meeting()
                self._changed.notify_all()
            elif not self._changed.wait_for(lambda: meeting.result is not None or self._broken, timeout_s):
                missing = sorted(set(range(self.size)) - set(meeting.slots))
                self._abort(f"threads {missing} of {self.size} did not come within {timeout_s:g} s")
            if meeting.result is None:
                raise CommError(self._broken)
            return meeting.result

    def abort(self, reason: str) -> None:
        with self._changed:
            self._abort(reason)

    def _abort(self, reason: str) -> None:
        self._broken = self._broken or reason
        self._changed.notify_all()


class ProcessExchange:
    """All-gather among processes over a key-value store. `processes` are their indices, `me` this one's.

    `prefix` must be new in the store and alike in all of them.
    """

    def __init__(
        self, store: KeyValueStore, prefix: str, processes: tuple[int, ...], me: int, timeout_s: float = 60.0
    ) -> None:
        if me not in processes:
            raise ValueError(f"process {me} is not one of {processes}")
        self.processes = processes
        self.me = me
        self.timeout_s = timeout_s
        self._store = store
        self._prefix = prefix
        self._rounds = itertools.count()
        self._last_key = ""

    def allgather(self, data: Any) -> dict[int, Any]:
        """Every process's `data` (picklable), by process index. Raises CommError when one gives none in time."""
        name = f"{self._prefix}/{next(self._rounds)}"
        key = f"{name}/{self.me}"
        self._store.put(key, pickle.dumps(data))
        gathered = {}
        for process in self.processes:
            try:
                gathered[process] = pickle.loads(self._store.get(f"{name}/{process}", self.timeout_s))
            except TimeoutError as error:
                raise CommError(
                    f"process {process} gave no answer within {self.timeout_s:g} s: {error}"
                ) from error
        # Everybody is in this round, so everybody has read the round before it.
        if self._last_key:
            self._store.delete(self._last_key)
        self._last_key = key
        return gathered

    def subset(self, name: str, processes: tuple[int, ...]) -> ProcessExchange:
        return ProcessExchange(self._store, f"{self._prefix}/{name}", processes, self.me, self.timeout_s)


class MeshComm:
    """`CommBackend` of one rank: a thread of this process, in a group of threads of one or more processes.

    `seat` is the thread's place in `hub`; `exchange` is None when the group lies in one process. The thread in
    seat 0 speaks for its process.
    """

    def __init__(
        self, rank: int, size: int, hub: ThreadHub, seat: int, exchange: ProcessExchange | None = None
    ) -> None:
        self._rank = rank
        self._size = size
        self._hub = hub
        self._seat = seat
        self._exchange = exchange
        self._splits = 0

    def abort(self, reason: str) -> None:
        """This process's threads stop waiting for each other; other processes find out by their timeout."""
        self._hub.abort(reason)

    def Get_rank(self) -> int:  # noqa: N802 (FlashInfer's names)
        return self._rank

    def Get_size(self) -> int:  # noqa: N802
        return self._size

    def allgather(self, data: Any) -> tuple[Any, ...]:
        by_rank = dict(self._hub.exchange(self._seat, (self._rank, data)))
        if self._exchange is not None:
            everyone = None
            if self._seat == 0:
                try:
                    everyone = self._exchange.allgather(by_rank)
                except CommError as error:
                    self._hub.abort(str(error))
                    raise
            # Seat 0 waits for other processes first.
            everyone = self._hub.exchange(self._seat, everyone, extra_s=self._exchange.timeout_s)[0]
            by_rank = {rank: value for part in everyone.values() for rank, value in part.items()}
        return tuple(by_rank[rank] for rank in range(self._size))

    def bcast(self, data: Any, root: int) -> Any:
        return self.allgather(data if self._rank == root else None)[root]

    def barrier(self) -> None:
        self.allgather(None)

    def Split(self, color: int, key: int) -> MeshComm:  # noqa: N802
        self._splits += 1
        process = 0 if self._exchange is None else self._exchange.me
        entries = self.allgather((color, key, process))
        members = sorted(
            (entry[1], rank, entry[2]) for rank, entry in enumerate(entries) if entry[0] == color
        )
        ranks = [rank for _, rank, _ in members]
        processes = tuple(sorted({member[2] for member in members}))
        here = [rank for _, rank, member_process in members if member_process == process]
        # Each thread offers a hub; those of one color take the one of their first.
        offers = dict(self._hub.exchange(self._seat, (self._rank, ThreadHub(len(here), self._hub.timeout_s))))
        exchange = None
        if self._exchange is not None and len(processes) > 1:
            exchange = self._exchange.subset(f"split{self._splits}.{color}", processes)
        return MeshComm(
            ranks.index(self._rank), len(ranks), offers[here[0]], here.index(self._rank), exchange
        )
