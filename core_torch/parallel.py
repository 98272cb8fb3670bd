"""The ranks of one run: the process group, the layout's groups, and the fusion that they agreed on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from core_torch.kernels.allreduce import ReduceGroup
from core_torch.kernels.comm import CommBackend, GlooComm, SingleComm
from core_torch.kernels.startup import start_fusion
from core_torch.kernels.workspace import Workspace
from core_torch.pieces import Peers, Pieces
from shared_config import FlashInferInfo, FusionDecision, ParallelLayout
from shared_config.layout import RankPlace

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
REDUCE_GROUPS = ("attn_tp", "moe_reduce")  # what owes sums, in the order in which their workspaces are made
PEER_GROUPS = ("attn_cp", "prefill_gather", "decode_gather", "pieces")
Ranks = tuple[int, ...]


@dataclass
class Parallel:
    """What a rank knows of the others. `decision` is the one in force after start-up; `comm` reaches all ranks."""

    rank: int
    layout: ParallelLayout
    device: torch.device
    decision: FusionDecision
    comm: CommBackend
    attention: ReduceGroup
    mlp: ReduceGroup
    pieces: Pieces

    @property
    def world_size(self) -> int:
        return self.layout.tp_size

    @property
    def place(self) -> RankPlace:
        return self.layout.place(self.rank)

    def broadcast_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rank 0's sampled tokens on every rank, in place."""
        if self.world_size > 1:
            dist.broadcast(tokens, src=0)
        return tokens


def rank_device(local_rank: int, device: str, ranks: int) -> torch.device:
    """This rank's device. On CUDA it becomes the process's current one; on CPU the ranks share the cores."""
    if device == "cpu":
        if ranks > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def open_parallel(
    decision: FusionDecision,
    layout: ParallelLayout,
    flashinfer: FlashInferInfo,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int | None = None,
) -> Iterator[Parallel]:
    """Join the process group named by RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, start fusion, and leave at the end.

    `max_tokens` is the largest batch that can come, where that is below the decision's limit (smaller workspaces).
    Every group of the layout is made on every rank in the same order (torch.distributed requires it), and each group of
    several ranks that owes sums gets one workspace. All exist when this yields, so before any CUDA graph is captured.
    """
    world_size = layout.tp_size
    if world_size == 1:
        yield _assemble(0, layout, device, decision, SingleComm(), {}, {})
        return
    rank = int(os.environ["RANK"])
    owns_group = not dist.is_initialized()
    if owns_group:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
    elif dist.get_world_size() != world_size:
        raise ValueError(
            f"tensor_parallel_size={world_size}, but torch.distributed runs {dist.get_world_size()} ranks; "
            "make them equal"
        )
    groups = _ProcessGroups(rank, world_size)
    workspaces: dict[Ranks, Workspace] = {}
    try:
        comm = GlooComm(groups.make((tuple(range(world_size)),), "gloo"))
        for name in REDUCE_GROUPS + PEER_GROUPS:
            groups.make(layout.all_groups(name), "nccl" if device.type == "cuda" else "gloo")
        comms: dict[Ranks, CommBackend] = {}
        for name in REDUCE_GROUPS:
            cpu_group = groups.make(layout.all_groups(name), "gloo")
            comms[layout.group(name, rank)] = SingleComm() if cpu_group is None else GlooComm(cpu_group)
        for ranks, group_comm in comms.items():
            decision, workspace = start_fusion(
                decision,
                group_comm,
                hidden_size=decision.hidden_size,
                dtype=dtype,
                device=device,
                flashinfer=flashinfer,
                device_group=groups.device_group(ranks),
                all_ranks=comm,
                max_tokens=max_tokens,
            )
            if workspace is not None:
                workspaces[ranks] = workspace
            if not decision.enabled:
                break
        if not decision.enabled:  # a later group's failure stops the groups that have started, too
            _close(workspaces)
        yield _assemble(rank, layout, device, decision, comm, comms, workspaces, groups)
    finally:
        _close(workspaces)
        if owns_group:
            dist.destroy_process_group()
        else:
            groups.destroy()


class _ProcessGroups:
    """torch's groups, each distinct one made once; every rank makes all of them alike, and keeps its own."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world = rank, tuple(range(world_size))
        self._made: dict[tuple[Ranks, str], dist.ProcessGroup] = {}
        self._known: set[tuple[Ranks, str]] = set()

    def make(self, all_groups: tuple[Ranks, ...], backend: str) -> dist.ProcessGroup | None:
        """This rank's one of `all_groups`; None when that has one rank."""
        own = next(ranks for ranks in all_groups if self._rank in ranks)
        for ranks in all_groups:
            if len(ranks) == 1 or (ranks, backend) in self._known:
                continue
            self._known.add((ranks, backend))
            if ranks == self._world and backend == dist.get_backend():
                group = dist.group.WORLD
            else:
                group = dist.new_group(list(ranks), backend=backend, timeout=COLLECTIVE_TIMEOUT)
            if ranks == own:
                assert isinstance(group, dist.ProcessGroup)
                self._made[ranks, backend] = group
        return self._made.get((own, backend))

    def device_group(self, ranks: Ranks) -> dist.ProcessGroup | None:
        return self._made.get((ranks, dist.get_backend()))

    def destroy(self) -> None:
        """Those that were made here, so not WORLD."""
        for group in self._made.values():
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        self._made.clear()


def _close(workspaces: dict[Ranks, Workspace]) -> None:
    for workspace in workspaces.values():
        workspace.close()
    workspaces.clear()


def _assemble(
    rank: int,
    layout: ParallelLayout,
    device: torch.device,
    decision: FusionDecision,
    comm: CommBackend,
    comms: dict[Ranks, CommBackend],
    workspaces: dict[Ranks, Workspace],
    groups: _ProcessGroups | None = None,
) -> Parallel:
    def reducing(name: str, side: str, ranks: Ranks) -> ReduceGroup:
        return ReduceGroup(
            name=name if len(ranks) > 1 else f"{side} (one rank)",
            side=side,
            ranks=ranks,
            rank=ranks.index(rank),
            device_group=groups.device_group(ranks) if groups else None,
            comm=comms.get(ranks, SingleComm()),
            decision=decision,
            workspace=workspaces.get(ranks),
        )

    def peers(name: str) -> Peers:
        ranks = layout.group(name, rank)
        return Peers(ranks, ranks.index(rank), groups.device_group(ranks) if groups else None)

    pieces = Pieces(layout, *map(peers, PEER_GROUPS), paid=reducing("MoE-TP", "mlp", (rank,)))
    return Parallel(
        rank=rank,
        layout=layout,
        device=device,
        decision=decision,
        comm=comm,
        attention=reducing("attention-TP", "attention", layout.group("attn_tp", rank)),
        mlp=reducing("MoE-TP", "mlp", layout.group("moe_reduce", rank)),
        pieces=pieces,
    )
