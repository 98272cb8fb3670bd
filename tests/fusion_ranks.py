"""What the tests of reductions and start-up share: decisions, groups, ranks as threads, and a stand-in FlashInfer.

Shapes: R ranks, T tokens, D hidden.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core_torch.kernels.allreduce import ReduceGroup
from core_torch.kernels.comm import CommError, GlooComm
from core_torch.kernels.contract import add_rmsnorm, sum_in_rank_order
from shared_config import (
    FlashInferInfo,
    FusionDecision,
    FusionRequest,
    HardwareInfo,
    ModelFacts,
    ParallelLayout,
    resolve_fusion,
)

HIDDEN = 64
HOPPER = HardwareInfo(device="cuda", gpu_name="NVIDIA H200", sm=90, num_gpus=8, p2p=True, multicast=False)


def decide(
    tp_size: int,
    *,
    max_tokens: int = 67,
    itemsize: int = 2,
    flashinfer: FlashInferInfo | None = None,
    **request: Any,
) -> FusionDecision:
    """The decision for a small model whose limit is `max_tokens`; the reference backend unless `request` says else."""
    request = {"backend": "reference", "max_bytes": max_tokens * HIDDEN * itemsize, **request}
    return resolve_fusion(
        ModelFacts("Qwen3NextForCausalLM", HIDDEN, itemsize),
        ParallelLayout(tp_size=tp_size),
        HOPPER,
        flashinfer or FlashInferInfo(),
        FusionRequest(**request),
    )


def rank_data(num_tokens: int, rank: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """One rank's part [T, D]; any rank can make any other's."""
    generator = torch.Generator().manual_seed(1000 * seed + 10 * num_tokens + rank)
    return torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)


def operands(num_tokens: int, rank: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """-> partial [T, D] of `rank`, residual [T, D] and weight [D] of all ranks."""
    weight = rank_data(1, 99, dtype, seed)[0] / 10
    return rank_data(num_tokens, rank, dtype, seed), rank_data(num_tokens, 98, dtype, seed), weight


def plain_combine(parts: Tensor, experts: Tensor, *, num_experts: int) -> Tensor:
    """`moe_prefill.combine` where no kernel runs."""
    kept = (experts >= 0) & (experts < num_experts)
    return torch.where(kept[..., None], parts.unflatten(0, experts.shape).float(), 0).sum(1).to(parts.dtype)


def reduce_group(
    decision: FusionDecision, workspace: Any = None, ranks: tuple[int, ...] | None = None, group: Any = None
) -> ReduceGroup:
    """The group of this process's gloo ranks (all of them unless given)."""
    group = group or dist.group.WORLD
    return ReduceGroup(
        name="attention-TP",
        side="attention",
        ranks=ranks or tuple(range(dist.get_world_size())),
        rank=dist.get_rank(group),
        device_group=group,
        comm=GlooComm(group),
        decision=decision,
        workspace=workspace,
    )


class ThreadComm:
    """`CommBackend` between threads of one process, one per rank: how one process drives all GPUs."""

    def __init__(self, rank: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.rank, self.gate, self.board = rank, barrier, board

    def Get_rank(self) -> int:  # noqa: N802
        return self.rank

    def Get_size(self) -> int:  # noqa: N802
        return len(self.board)

    def allgather(self, data: Any) -> tuple[Any, ...]:
        try:
            self.board[self.rank] = data
            self.gate.wait()
            everything = tuple(self.board)
            self.gate.wait()
        except threading.BrokenBarrierError:
            raise CommError("a rank's thread has ended or gave no answer in time") from None
        return everything

    def bcast(self, data: Any, root: int) -> Any:
        return self.allgather(data)[root]

    def barrier(self) -> None:
        self.allgather(None)

    def Split(self, color: int, key: int) -> ThreadComm:  # noqa: N802
        raise NotImplementedError


def on_threads(world_size: int, rank_main: Callable[[ThreadComm], Any], timeout: float = 20) -> list[Any]:
    """`rank_main(comm)` on one thread per rank; each one's result or the exception that it raised, by rank."""
    gate, board = threading.Barrier(world_size, timeout=timeout), [None] * world_size
    results: list[Any] = [None] * world_size

    def main(rank: int) -> None:
        try:
            results[rank] = rank_main(ThreadComm(rank, gate, board))
        except Exception as error:
            results[rank] = error

    threads = [
        threading.Thread(target=main, args=(rank,), name=f"rank {rank}", daemon=True)
        for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * timeout)
        assert not thread.is_alive(), "a rank hangs"
    return results


class FakeWorkspace:
    """What a FlashInfer workspace looks like from outside; sums travel over the communicator it was made with."""

    def __init__(self, comm: Any, max_tokens: int) -> None:
        self.comm, self.max_tokens = comm, max_tokens
        self.world_size, self.rank = comm.Get_size(), comm.Get_rank()
        self.workspace_tensor = torch.arange(3 * self.world_size + 1)
        self.ipc_handles = [[0]]
        self._internal_workspace: Any = (self.ipc_handles,)
        self.metadata: dict[str, Any] = {}
        self.destroyed = False

    def is_buffer_size_sufficient(
        self, tp_size: int, num_tokens: int, hidden_dim: int, dtype: torch.dtype
    ) -> bool:
        del hidden_dim, dtype
        return tp_size == self.world_size and num_tokens <= self.max_tokens

    def destroy(self) -> None:
        self.destroyed = True


class FakeFlashInfer(SimpleNamespace):
    """A `flashinfer.comm` without a GPU: the kernel's contract, and a record of the arguments that were passed.

    `old=True` is an API from before `weight_bias` and the others that came late.
    """

    def __init__(self, *, old: bool = False) -> None:
        super().__init__()
        self.created: list[dict[str, Any]] = []
        self.calls: list[dict[str, Any]] = []
        self.released: list[Any] = []
        self.workspaces: list[FakeWorkspace] = []
        self.AllReduceFusionPattern = SimpleNamespace(kARResidualRMSNorm=1)
        self.TRTLLMAllReduceFusionWorkspace = FakeWorkspace
        self.trtllm_destroy_ipc_workspace_for_all_reduce_fusion = self.released.append

        def create(
            backend, world_size, rank, max_token_num, hidden_dim, dtype, comm_backend=None, group=None
        ):
            self.created.append(locals())
            assert comm_backend is not None
            handles = comm_backend.allgather(f"handle of rank {rank}")
            assert handles == tuple(f"handle of rank {r}" for r in range(world_size))
            comm_backend.barrier()
            self.workspaces.append(FakeWorkspace(comm_backend, max_token_num))
            return self.workspaces[-1]

        def new_op(
            input, workspace, pattern, launch_with_pdl=False, trigger_completion_at_end=False,  # noqa: A002
            output=None, residual_in=None, residual_out=None, norm_out=None, rms_gamma=None, rms_eps=1e-6,
            use_oneshot=None, fp32_acc=False, weight_bias=0.0,
        ):  # fmt: skip
            self._reduce(locals(), weight_bias)

        def old_op(
            input, workspace, pattern, launch_with_pdl=False, residual_in=None, residual_out=None,  # noqa: A002
            norm_out=None, rms_gamma=None, rms_eps=1e-6,
        ):  # fmt: skip
            self._reduce(locals(), 0.0)

        self.create_allreduce_fusion_workspace = create
        self.allreduce_fusion = old_op if old else new_op

    def _reduce(self, call: dict[str, Any], weight_bias: float) -> None:
        self.calls.append(call)
        parts = torch.stack(list(call["workspace"].comm.allgather(call["input"])))
        outputs = add_rmsnorm(
            sum_in_rank_order(parts), call["residual_in"], call["rms_gamma"], call["rms_eps"], weight_bias
        )
        call["residual_out"].copy_(outputs[0])
        call["norm_out"].copy_(outputs[1])

    @property
    def modules(self) -> dict[str, Any]:
        """For `mock.patch.dict(sys.modules, fake.modules)`: the modules that FlashInfer is reached by."""
        library = SimpleNamespace(trtllm_allreduce_fusion="the kernel")
        builder = SimpleNamespace(
            gen_trtllm_comm_module=lambda: SimpleNamespace(build_and_load=lambda: library)
        )
        return {"flashinfer.comm": self, "flashinfer.jit.comm": builder}
