"""How ranks talk before anything fuses: threads, processes over a key-value store, both, and the votes on top."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest

import jax_bridge
from core_torch.kernels.comm import CommBackend, CommError
from core_torch.kernels.votes import vote
from jax_bridge.comm import MeshComm, ProcessExchange, ThreadHub
from jax_bridge.devices import AxisGroups, on_threads
from jax_bridge.transports.rendezvous import RendezvousBuffers
from shared_config import FusionError, FusionWarning
from tests.jax_case import assert_close, decide, mesh_of, open_fused, operands, per_rank, reduce_norm

pytestmark = pytest.mark.timeout(60)


class MemoryStore:
    """A key-value store among threads, with the same waiting as the real one. A key is used once."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.ever: set[str] = set()
        self.changed = threading.Condition()

    def put(self, key: str, value: bytes) -> None:
        with self.changed:
            assert key not in self.ever, f"{key} is used twice"
            self.ever.add(key)
            self.values[key] = value
            self.changed.notify_all()

    def get(self, key: str, timeout_s: float) -> bytes:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_s):
                raise TimeoutError(key)
            return self.values[key]

    def delete(self, key: str) -> None:
        with self.changed:
            del self.values[key]


def world(*threads_per_process: int, timeout_s: float = 5.0) -> tuple[list[MeshComm], MemoryStore]:
    """The ranks of processes that have so many threads each: one process over a hub, more over a store too."""
    store, comms, ranks = MemoryStore(), [], itertools.count()
    size, processes = sum(threads_per_process), tuple(range(len(threads_per_process)))
    for process, count in enumerate(threads_per_process):
        hub = ThreadHub(count, timeout_s)
        exchange = (
            ProcessExchange(store, "test", processes, process, timeout_s) if len(processes) > 1 else None
        )
        comms += [MeshComm(next(ranks), size, hub, seat, exchange) for seat in range(count)]
    return comms, store


def on_all(comms: list[MeshComm], action: Callable[[CommBackend], Any]) -> list[Any]:
    def abort(reason: str) -> None:
        for comm in comms:
            comm.abort(reason)

    return on_threads(lambda index: action(comms[index]), len(comms), abort)


WORLDS = pytest.mark.parametrize("shape", [(1,), (4,), (1, 1, 1), (2, 2), (3, 1)])


class TestMeshComm:
    @WORLDS
    def test_the_protocol(self, shape: tuple[int, ...]) -> None:
        def talk(comm: CommBackend) -> list[Any]:
            rank, size = comm.Get_rank(), comm.Get_size()
            heard: list[Any] = [comm.allgather({"rank": rank})]
            heard.append(comm.bcast(f"from {rank}", size - 1))
            comm.barrier()
            heard += [comm.allgather((rank, step)) for step in range(20)]
            return heard

        comms, _ = world(*shape)
        size = sum(shape)
        results = on_all(comms, talk)
        assert all(isinstance(comm, CommBackend) for comm in comms)
        assert results[0][0] == tuple({"rank": rank} for rank in range(size))
        assert results[0][1] == f"from {size - 1}"
        assert results[0][-1] == tuple((rank, 19) for rank in range(size))
        assert all(result == results[0] for result in results)

    @WORLDS
    @pytest.mark.parametrize("colors", ["parity", "halves", "reversed"])
    def test_split(self, shape: tuple[int, ...], colors: str) -> None:
        size = sum(shape)
        color_of = {
            "parity": lambda rank: rank % 2,
            "halves": lambda rank: rank * 2 // size,
            "reversed": lambda _rank: 0,
        }[colors]

        def talk(comm: CommBackend) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
            rank = comm.Get_rank()
            key = -rank if colors == "reversed" else rank
            part = comm.Split(color_of(rank), key)
            gathered = part.allgather(rank)
            assert gathered[part.Get_rank()] == rank
            assert part.Get_size() == len(gathered)
            again = comm.Split(0, rank).Split(color_of(rank), key).allgather(rank)
            return color_of(rank), gathered, again

        for color, gathered, again in on_all(world(*shape)[0], talk):
            members = [rank for rank in range(size) if color_of(rank) == color]
            assert gathered == again == tuple(members[::-1] if colors == "reversed" else members)

    def test_the_store_does_not_fill_up(self) -> None:
        comms, store = world(1, 1, 1)
        on_all(comms, lambda comm: [comm.allgather(b"x" * 100) for _ in range(50)])
        assert len(store.values) <= 2 * len(comms), "keys that everybody has read are deleted"

    def test_a_thread_that_is_late(self) -> None:
        comms, _ = world(3, timeout_s=0.3)
        with pytest.raises(CommError, match=r"threads \[1\] of 3 did not come within 0.3 s"):
            on_all(comms, lambda comm: comm.Get_rank() == 1 or comm.allgather(0))
        with pytest.raises(CommError, match=r"threads \[1\]"):
            comms[1].allgather(0)

    def test_a_process_that_is_late(self) -> None:
        comms, _ = world(2, 1, timeout_s=0.3)
        with pytest.raises(CommError, match="process 1 gave no answer within 0.3 s"):
            on_all(comms, lambda comm: comm.Get_rank() == 2 or comm.allgather(0))

    def test_a_thread_that_raises_ends_the_others_at_once(self) -> None:
        def talk(comm: CommBackend) -> None:
            if comm.Get_rank() == 2:
                raise OSError("no more memory")
            comm.allgather(0)

        comms, _ = world(4, timeout_s=30.0)
        started = time.monotonic()
        with pytest.raises(OSError, match="no more memory"):
            on_all(comms, talk)
        assert time.monotonic() - started < 5

    @WORLDS
    def test_votes(self, shape: tuple[int, ...]) -> None:
        last = sum(shape) - 1

        def ballot(comm: CommBackend) -> tuple[bool, str]:
            mine = comm.Get_rank() != last
            outcome = vote(comm, mine, "the step", "" if mine else "it broke")
            return outcome.passed, outcome.reason

        outcomes = set(on_all(world(*shape)[0], ballot))
        assert len(outcomes) == 1, "all ranks hear the same"
        passed, reason = outcomes.pop()
        assert not passed
        assert f"the step failed on rank {last}" in reason
        assert "it broke" in reason


class TestGroups:
    def test_rows_are_the_other_axes_in_row_major_order(self) -> None:
        mesh = mesh_of(2, 2, 2, names=("dp", "tp", "ep"))
        groups = AxisGroups.of(mesh, "tp")
        ids = [[device.id for device in row] for row in groups.devices]
        assert ids == [[0, 2], [1, 3], [4, 6], [5, 7]]
        assert [(rank.group, rank.rank) for rank in groups.local_ranks()][:3] == [(0, 0), (0, 1), (1, 0)]
        assert groups.platform == "cpu"
        assert groups.processes == (0,)


class TestStartUp:
    """The PyTorch core's start-up decides, on all ranks alike; here with one thread per device."""

    def breaks_on_rank_2(self, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        original = getattr(RendezvousBuffers, step)

        def broken(self: RendezvousBuffers, *args: Any) -> None:
            if self._place[1] == 2:
                if step != "run":
                    raise MemoryError("out of memory")
                original(self, *args)
                args[5].add_(1)  # a wrong residual
                return
            original(self, *args)

        monkeypatch.setattr(RendezvousBuffers, step, broken)

    @pytest.mark.parametrize(
        ("step", "reason"),
        [
            ("probe", "trying the allocation failed on rank 2.*out of memory"),
            ("create", "creating the workspace failed on rank 2.*out of memory"),
            (
                "run",
                "the self-test failed on rank 2.*values of the residual are wrong",
            ),
        ],
    )
    def test_one_rank_that_fails_stops_all(
        self, monkeypatch: pytest.MonkeyPatch, step: str, reason: str
    ) -> None:
        self.breaks_on_rank_2(monkeypatch, step)
        mesh, data = mesh_of(4), operands(4)
        decision = decide(4, mode="auto")
        opening = open_fused(mesh, decision=decision)
        with pytest.warns(FusionWarning, match=reason):
            comm = opening.__enter__()
        assert not comm.decision.enabled
        run = per_rank(reduce_norm, mesh)
        assert "failed" in jax_bridge.explain(run, *data).calls[0].reason
        assert_close(run(*data)[1], data.expected()[1])
        opening.__exit__(None, None, None)
        with pytest.raises(FusionError, match=reason), open_fused(mesh):
            pass

    def test_a_failure_in_one_group_stops_all_groups(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = RendezvousBuffers.create

        def broken(self: RendezvousBuffers, max_tokens: int, comm: CommBackend) -> None:
            if self._place.tolist() == [1, 0]:
                raise MemoryError("out of memory")
            original(self, max_tokens, comm)

        monkeypatch.setattr(RendezvousBuffers, "create", broken)
        mesh = mesh_of(2, 2, names=("dp", "tp"))
        opening = open_fused(mesh, decision=decide(2, mode="auto"))
        with pytest.warns(FusionWarning, match="out of memory"):
            comm = opening.__enter__()
        assert (comm.decision.enabled, comm.max_tokens) == (False, 0)
        opening.__exit__(None, None, None)

    def test_after_a_failed_opening_the_next_one_works(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mesh, data = mesh_of(4), operands(4)
        with monkeypatch.context() as patch:
            self.breaks_on_rank_2(patch, "create")
            with pytest.raises(FusionError), open_fused(mesh):
                pass
        with open_fused(mesh, jnp.float32) as comm:
            assert comm.id == 0
            residual, _ = per_rank(reduce_norm, mesh)(*data)
            assert_close(residual, data.expected()[0])
