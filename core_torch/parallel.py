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
from core_torch.kernels.comm import GlooComm, SingleComm
from core_torch.kernels.startup import start_fusion
from shared_config import FlashInferInfo, FusionDecision, ParallelLayout

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass
class Parallel:
    """What a rank knows of the others. `decision` is the one in force after start-up."""

    rank: int
    world_size: int
    device: torch.device
    decision: FusionDecision
    attention: ReduceGroup
    mlp: ReduceGroup

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
    Every group of the layout is made on every rank in the same order (torch.distributed requires it). All
    workspaces exist when this yields, so before any CUDA graph is captured.
    """
    world_size = layout.tp_size
    if world_size == 1:
        lone = _single_group(decision)
        yield Parallel(0, 1, device, decision, lone("attention"), lone("mlp"))
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
    workspace = None
    try:
        ranks = tuple(range(world_size))
        cpu_group = dist.group.WORLD if device.type == "cpu" else dist.new_group(list(ranks), backend="gloo")
        assert isinstance(cpu_group, dist.ProcessGroup)
        comm = GlooComm(cpu_group)
        decision, workspace = start_fusion(
            decision,
            comm,
            hidden_size=decision.hidden_size,
            dtype=dtype,
            device=device,
            flashinfer=flashinfer,
            device_group=dist.group.WORLD,
            max_tokens=max_tokens,
        )
        groups = [
            ReduceGroup(
                name=name,
                side=side,
                ranks=ranks,
                rank=rank,
                device_group=dist.group.WORLD,
                comm=comm,
                decision=decision,
                workspace=workspace,
            )
            for name, side in (("attention-TP", "attention"), ("MoE-TP", "mlp"))
        ]
        yield Parallel(rank, world_size, device, decision, *groups)
    finally:
        if workspace is not None:
            workspace.close()
        if owns_group:
            dist.destroy_process_group()


def _single_group(decision: FusionDecision):
    def make(side: str) -> ReduceGroup:
        return ReduceGroup(
            name=f"{side} (one rank)",
            side=side,
            ranks=(0,),
            rank=0,
            device_group=None,
            comm=SingleComm(),
            decision=decision,
            workspace=None,
        )

    return make
