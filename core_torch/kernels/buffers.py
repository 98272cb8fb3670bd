"""The memory that one group reduces through: FlashInfer's, or plain collectives with the same contract.

Both classes have the same steps, which `Workspace` takes with a vote after each: `probe` (local), `create` (collective,
over the communicator it is given), `run`, `raw`, `destroy` (local); `run_choices` is `run` of choices, where the class
`adds_choices`. Shapes: R ranks, T tokens, D hidden.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from core_torch.kernels import native
from core_torch.kernels.comm import CommBackend
from core_torch.kernels.contract import add_rmsnorm, fold_weight, sum_in_rank_order
from core_torch.kernels.flashinfer_api import FlashInferApi, RawKernel, buffer_bytes, try_allocation
from core_torch.kernels.moe_prefill import ChoiceParts
from core_torch.kernels.pair_allreduce import PairMemory, pair_bytes


class Buffers(Protocol):
    """One allocation, made once for `max_tokens` tokens."""

    def probe(self, max_tokens: int) -> None:
        """Allocates what `create` will, and gives it back. Raises when there is not enough, talks to nobody."""
        ...

    def create(self, max_tokens: int, comm: CommBackend) -> None: ...

    def run(
        self,
        partial: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_bias: float,
        out_residual: Tensor,
        out_normed: Tensor,
        trigger_completion_at_end: bool = True,
    ) -> None: ...

    def adds_choices(self, num_tokens: int) -> bool:
        """Whether `run_choices` takes a call of so many tokens."""
        ...

    def run_choices(
        self,
        choices: ChoiceParts,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_bias: float,
        out_residual: Tensor,
        out_normed: Tensor,
    ) -> None: ...

    def raw(self) -> RawKernel: ...

    def destroy(self) -> None: ...


class NoChoices:
    """Of buffers whose kernel takes a part that is one tensor."""

    def adds_choices(self, num_tokens: int) -> bool:
        del num_tokens
        return False

    def run_choices(self, *operands: Any, **named: Any) -> None:
        del operands, named
        raise ValueError(f"{type(self).__name__} adds no choices: sum them")


class ReferenceBuffers(NoChoices):
    """The kernel's contract through an all-gather, on any device: for tests and machines without the kernel."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        world_size: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._group = group
        self._shape = (world_size, hidden_size)
        self._dtype = dtype
        self._device = device
        self._gathered: Tensor | None = None  # [R, max_tokens, D]

    def probe(self, max_tokens: int) -> None:
        self._allocate(max_tokens)

    def create(self, max_tokens: int, comm: CommBackend) -> None:
        self._gathered = self._allocate(max_tokens)
        comm.barrier()

    def run(
        self,
        partial: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_bias: float,
        out_residual: Tensor,
        out_normed: Tensor,
        trigger_completion_at_end: bool = True,
    ) -> None:
        del trigger_completion_at_end  # there is no kernel
        assert self._gathered is not None
        parts = self._gathered[:, : partial.shape[0]]
        dist.all_gather(list(parts.unbind()), partial, group=self._group)
        summed, normed = add_rmsnorm(sum_in_rank_order(parts), residual, weight, eps, weight_bias)
        out_residual.copy_(summed)
        out_normed.copy_(normed)

    def raw(self) -> RawKernel:
        raise ValueError("the reference backend has no kernel to call; use backend='trtllm'")

    def destroy(self) -> None:
        self._gathered = None

    def _allocate(self, max_tokens: int) -> Tensor:
        world_size, hidden_size = self._shape
        return torch.empty((world_size, max_tokens, hidden_size), dtype=self._dtype, device=self._device)


class FlashInferBuffers:
    """A FlashInfer workspace, `trtllm` or `mnnvl`, on one GPU (on the CPU with a stand-in for FlashInfer).

    It takes up to `most_tokens`; calls of more are the project's own kernel's, with memory of its own.
    """

    def __init__(
        self,
        api: FlashInferApi,
        backend: str,
        *,
        world_size: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup | None,
        most_tokens: int = sys.maxsize,
    ) -> None:
        self._api = api
        self._most_tokens = most_tokens
        self._backend = backend
        self._world_size = world_size
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self._group = group
        self._workspace: Any = None
        self._pair: PairMemory | None = None
        # By address and bias. The weight is kept too, so that its address cannot come to mean another one.
        self._folded: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}

    def probe(self, max_tokens: int) -> None:
        most, long = min(max_tokens, self._most_tokens), max_tokens > self._most_tokens
        sizes = buffer_bytes(self._world_size, most, self._hidden_size, self._dtype)
        if long:
            sizes = (*sizes, pair_bytes(max_tokens, self._hidden_size))
        with _current(self._device):
            if self._backend == "trtllm":
                self._api.kernel()
            if long:
                native.load("pair_allreduce", self._device)
            torch.cuda.empty_cache()
            try_allocation(sizes, self._device.index)

    def create(self, max_tokens: int, comm: CommBackend) -> None:
        with _current(self._device):
            self._workspace = self._api.create_workspace(
                self._backend,
                comm,
                hidden_size=self._hidden_size,
                dtype=self._dtype,
                max_tokens=min(max_tokens, self._most_tokens),
                group=self._group,
            )
            if max_tokens > self._most_tokens:
                self._pair = PairMemory(
                    comm, max_tokens=max_tokens, hidden_size=self._hidden_size, device=self._device
                )

    def run(
        self,
        partial: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_bias: float,
        out_residual: Tensor,
        out_normed: Tensor,
        trigger_completion_at_end: bool = True,
    ) -> None:
        if (pair := self._pair_for(partial.shape[0])) is not None:
            pair.run(partial, residual, weight, eps, weight_bias, out_residual, out_normed)
            return
        if weight_bias != 0.0 and not self._api.takes_weight_bias:
            weight, weight_bias = self._fold(weight, weight_bias), 0.0
        self._api.run(
            self._workspace,
            partial,
            residual,
            weight,
            eps,
            weight_bias,
            out_residual,
            out_normed,
            trigger_completion_at_end=trigger_completion_at_end,
        )

    def adds_choices(self, num_tokens: int) -> bool:
        return self._pair_for(num_tokens) is not None

    def run_choices(
        self,
        choices: ChoiceParts,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_bias: float,
        out_residual: Tensor,
        out_normed: Tensor,
    ) -> None:
        pair = self._pair_for(residual.shape[0])
        assert pair is not None  # `adds_choices` said so
        pair.run_choices(choices, residual, weight, eps, weight_bias, out_residual, out_normed)

    def raw(self) -> RawKernel:
        if self._backend != "trtllm":
            raise ValueError(f"only the trtllm backend has a raw kernel, this is {self._backend!r}")
        kernel = self._api.kernel()
        if self._pair is not None:
            kernel = self._pair.beside(kernel, self._most_tokens)
        return RawKernel(kernel, self._workspace.workspace_tensor, self._world_size, self._workspace.rank)

    def destroy(self) -> None:
        self._folded.clear()
        if self._workspace is None:
            return
        with _current(self._device):
            # Peers keep their own mappings, so only this rank's kernels have to be over.
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            self._api.destroy_workspace(self._workspace)
            self._workspace = None
            if self._pair is not None:
                self._pair.destroy()
                self._pair = None
            torch.cuda.empty_cache()

    def _pair_for(self, num_tokens: int) -> PairMemory | None:
        """Whose kernel takes a call of so many tokens, if it is not FlashInfer's."""
        return self._pair if num_tokens > self._most_tokens else None

    def _fold(self, weight: Tensor, weight_bias: float) -> Tensor:
        """`fold_weight`, once per weight: weights are constants after loading."""
        key = (weight.data_ptr(), weight_bias)
        if key not in self._folded:
            self._folded[key] = (weight, fold_weight(weight, weight_bias))
        return self._folded[key][1]


def _current(device: torch.device) -> AbstractContextManager[object]:
    """FlashInfer works on the thread's current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
