"""Worker ranks: processes that each hold an open session, and the parent's end of them.

The parent waits on every worker's pipe and on its process at once. A rank that raises sends its error, a rank that
dies closes its pipe; either way the parent ends the others and raises `RankFailure`, so nothing waits for a peer
that never comes.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from core_torch.kernels.choice import Answers
from shared_config import FusionDecision
from shared_config.generation import Request
from shared_config.results import RequestOutput

START_TIMEOUT_S = 1800.0  # loading 160 GB from a slow disk takes its time


class RankFailure(RuntimeError):  # noqa: N818 (it names what happened)
    """A rank raised or died. The message has the rank and its reason; the run is over."""


class RankSession(Protocol):
    """What a worker holds: `core_torch.session.Session`, or less for a worker that generates nothing."""

    @property
    def decision(self) -> FusionDecision: ...

    @property
    def kernels(self) -> Answers: ...

    def generate(self, requests: list[Request]) -> Iterator[list[RequestOutput]]: ...


Opener = Callable[[int], AbstractContextManager[RankSession]]  # from the local rank; picklable


def _serve(rank: int, world_size: int, port: int, opener: Opener, pipe: Any) -> None:
    """A worker's life: start, then one list of requests after another until the parent says None or goes away."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        with opener(rank) as session:
            pipe.send(("ready", (session.decision, session.kernels)))
            while (requests := pipe.recv()) is not None:
                for outputs in session.generate(requests):
                    if rank == 0:
                        pipe.send(("outputs", outputs))
                pipe.send(("done", None))
    except EOFError:
        return  # the parent is gone
    except BaseException as error:
        pipe.send(("error", (_picklable(error), traceback.format_exc())))
        raise SystemExit(1) from None


def _picklable(error: BaseException) -> BaseException:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class WorkerGroup:
    """`world_size` worker processes on this machine."""

    def __init__(self, opener: Opener, world_size: int, start_timeout_s: float = START_TIMEOUT_S) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, port, opener, theirs), name=f"rank {rank}", daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        ready = self._collect("ready", start_timeout_s)
        self.decision: FusionDecision
        self.kernels: Answers
        self.decision, self.kernels = ready[0]

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def generate(self, requests: list[Request]) -> Iterator[list[RequestOutput]]:
        for pipe in self._pipes:
            self._send(pipe, requests)
        done: set[int] = set()
        try:
            while len(done) < len(self._pipes):
                for rank, (kind, value) in self._messages():
                    if kind == "outputs":
                        yield value
                    else:
                        done.add(rank)
        finally:  # a caller that stops listening leaves the ranks running: let them end the batch
            while self._processes and len(done) < len(self._pipes):
                done.update(rank for rank, (kind, _) in self._messages() if kind == "done")

    def _send(self, pipe: Any, message: Any) -> None:
        try:
            pipe.send(message)
        except OSError:
            self._fail(self._pipes.index(pipe), None)

    def _collect(self, kind: str, timeout_s: float) -> list[Any]:
        """One message of `kind` from every rank."""
        deadline = time.monotonic() + timeout_s
        values: dict[int, Any] = {}
        while len(values) < len(self._pipes):
            if time.monotonic() > deadline:
                late = sorted(set(range(len(self._pipes))) - set(values))
                self.kill()
                raise RankFailure(f"ranks {late} were not {kind} within {timeout_s:g} s")
            values.update({rank: value for rank, (got, value) in self._messages(1.0) if got == kind})
        return [values[rank] for rank in range(len(self._pipes))]

    def _messages(self, timeout_s: float | None = None) -> list[tuple[int, tuple[str, Any]]]:
        """What the ranks say next. Raises when one of them failed."""
        ready = multiprocessing.connection.wait(self._pipes, timeout_s)
        messages: list[tuple[int, tuple[str, Any]]] = []
        failures: dict[int, Any] = {}
        for rank, pipe in enumerate(self._pipes):
            if pipe in ready:
                try:
                    message = pipe.recv()
                except (EOFError, ConnectionResetError):
                    message = ("error", None)
                if message[0] == "error":
                    failures[rank] = message[1]
                else:
                    messages.append((rank, message))
        if failures:
            # Peers of a rank that died fail too, with less to say: a process that is gone names the cause.
            dead = [rank for rank in failures if failures[rank] is None]
            rank = dead[0] if dead else min(failures)
            self._fail(rank, failures[rank])
        return messages

    def _fail(self, rank: int, report: tuple[BaseException, str] | None) -> None:
        process = self._processes[rank]
        if report is None:
            process.join(5)
            code = process.exitcode
            how = (
                f"was killed by signal {-code}"
                if code is not None and code < 0
                else f"exited with code {code}"
            )
            self.kill()
            raise RankFailure(
                f"rank {rank} (pid {process.pid}) {how} without an answer; the other ranks were ended"
            )
        error, trace = report
        if "CommError" in trace or "Connection closed" in trace or "Connection reset" in trace:
            # A lost connection is a symptom: give the rank that caused it a moment to be found dead.
            for other, candidate in enumerate(self._processes):
                candidate.join(1.0)
                if other != rank and candidate.exitcode not in (None, 0, 1):
                    self._fail(other, None)
        self.kill()
        if isinstance(error, ValueError | OSError | MemoryError):
            error.add_note(f"(raised on rank {rank})")
            raise error
        raise RankFailure(f"rank {rank} failed: {type(error).__name__}: {error}\n{trace}") from error

    def kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []

    def close(self, timeout_s: float = 30.0) -> None:
        """Let the ranks clean up and end; kill those that do not."""
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue  # that rank has ended already
        deadline = time.monotonic() + timeout_s
        for process in self._processes:
            process.join(max(0.1, deadline - time.monotonic()))
        self.kill()
