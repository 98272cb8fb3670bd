"""Real ranks for tests: N processes with torch.distributed, started once, that run functions on request.

`pool.run(fn, *args)` runs `fn(*args)` on every rank and returns the results by rank. A rank that raises fails
the call with that rank's traceback; a rank that dies or is late ends the pool, and the call says which rank.
`fn` must be a module-level function (it is pickled by name).
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from core_torch.worker import free_port

PRELOADED = ["core_torch.session", "torch._inductor.config"]


class RankError(RuntimeError):
    """A rank raised, died or was late."""


def _serve(
    rank: int, world_size: int, port: int, backend: str, pipe: multiprocessing.connection.Connection
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        OMP_NUM_THREADS="1",
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = None
    if backend == "gloo":
        torch.use_deterministic_algorithms(True)  # torch.empty is NaN-filled
    if backend == "nccl":
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)
    dist.init_process_group(
        backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=60), device_id=device
    )
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            break
        if job is None:
            break
        fn, args = job
        try:
            pipe.send((True, fn(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class RankPool:
    """`world_size` ranks over gloo (or NCCL, one GPU each)."""

    def __init__(self, world_size: int, backend: str = "gloo") -> None:
        # A forked rank has imported torch already; CUDA does not survive a fork.
        context: Any = multiprocessing.get_context("forkserver" if backend == "gloo" else "spawn")
        context.set_forkserver_preload(PRELOADED)
        self.world_size = world_size
        self._pipes: list[Any] = []
        self.processes: list[Any] = []
        port = free_port()
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, port, backend, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """`[fn(*args) on rank 0, fn(*args) on rank 1, ...]`, or RankError within `timeout` seconds."""
        if not self.alive:
            raise RankError("the pool's ranks have ended; start a new pool")
        for pipe in self._pipes:
            pipe.send((fn, args))
        deadline = time.monotonic() + timeout
        results: list[Any] = [None] * self.world_size
        failures: dict[int, str] = {}
        waiting = dict(enumerate(self._pipes))
        while waiting:
            ready = multiprocessing.connection.wait(
                list(waiting.values()), max(0.0, deadline - time.monotonic())
            )
            if not ready:
                self.close()
                raise RankError(f"ranks {sorted(waiting)} gave no answer in {timeout:g} s: {failures or fn}")
            for rank, pipe in list(waiting.items()):
                if pipe not in ready:
                    continue
                del waiting[rank]
                try:
                    ok, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    ok, value = False, "the process died"
                if ok:
                    results[rank] = value
                else:
                    failures[rank] = value
            if failures and waiting:  # peers may be stuck in a collective with the failed rank
                deadline = min(deadline, time.monotonic() + 20)
        if failures:
            if any(not process.is_alive() for process in self.processes):
                self.close()
            raise RankError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        return results

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue  # that rank is gone already
        for process in self.processes:
            process.join(3)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
