"""A group's workspace: made by all ranks or by none, owned, grown only outside capture, closed explicitly.

    with open_workspace(decision, comm, ...) as workspace:
        residual, normed = workspace.run(partial, residual, weight, eps, weight_bias)

Shapes: T tokens, D hidden. One workspace serves one stream; a second framework opens its own. Nothing here
uses torch.distributed but the `reference` backend, so ranks may be threads of one process with a `comm` of
their own.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from core_torch.kernels import selftest
from core_torch.kernels.buffers import Buffers, FlashInferBuffers, ReferenceBuffers
from core_torch.kernels.comm import CommBackend
from core_torch.kernels.contract import check_operands
from core_torch.kernels.flashinfer_api import FlashInferApi, RawKernel
from core_torch.kernels.moe_prefill import MAX_CHOICES, ChoiceParts
from core_torch.kernels.votes import Attempt, attempt, attempt_together, vote
from shared_config import FlashInferInfo, FusionDecision

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class WorkspaceError(RuntimeError):
    """The ranks could not make a workspace; raised on all of them alike, with the rank and the reason.

    `step` names what was voted down. `fatal`: a rank's GPU is stuck, so the run cannot go on unfused either.
    """

    def __init__(self, step: str, reason: str, fatal: bool = False) -> None:
        super().__init__(reason)
        self.step = step
        self.reason = reason
        self.fatal = fatal


class Workspace:
    """See `open_workspace`, which makes it."""

    def __init__(
        self,
        make_buffers: Callable[[], Buffers],
        comm: CommBackend,
        all_ranks: CommBackend,
        *,
        backend: str,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        most_tokens: int = sys.maxsize,
    ) -> None:
        self.backend = backend
        self.world_size = comm.Get_size()
        self.rank = comm.Get_rank()
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.device = device
        self.max_tokens = 0
        # Up to how many tokens the next kernel may be launched while this one runs. It must then wait for it as PDL
        # asks (cudaGridDependencySynchronize); kernels launched without PDL always do.
        self.max_early_tokens = 0
        self.closed = False
        self._most_tokens = most_tokens  # that the backend's own kernel takes
        self._make_buffers = make_buffers
        self._comm = comm
        self._all_ranks = all_ranks
        self._buffers: Buffers | None = None
        self._outgrown: list[Buffers] = []
        self._failure: WorkspaceError | None = None

    def sufficient(self, num_tokens: int) -> bool:
        return not self.closed and num_tokens <= self.max_tokens

    def takes(self, partial: Tensor | ChoiceParts) -> bool:
        """Whether `run` would take this batch (of choices: its sum)."""
        num_tokens, hidden_size = partial.shape
        return self.sufficient(num_tokens) and hidden_size == self.hidden_size and partial.dtype == self.dtype

    def run(
        self,
        partial: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_bias: float,
        out_residual: Tensor | None = None,
        out_normed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """-> (residual + sum over ranks of `partial`, its RMSNorm times `weight_bias + weight`), all [T, D].

        `partial`, `residual`, outputs `[T, D]`, `weight [D]`, of the workspace's dtype and device,
        contiguous. Outputs that are not given are allocated; `out_residual` may be `residual`. All ranks
        call with the same T, in the same order, on one stream.

        Raises ValueError, TypeError for operands that do not fit, RuntimeError on a closed workspace.
        """
        if self.closed or self._buffers is None:
            raise RuntimeError("the workspace is closed; open a new one before capture")
        out_residual = torch.empty_like(partial) if out_residual is None else out_residual
        out_normed = torch.empty_like(partial) if out_normed is None else out_normed
        check_operands(partial, weight, residual=residual, out_residual=out_residual, out_normed=out_normed)
        num_tokens, hidden_size = partial.shape
        if hidden_size != self.hidden_size:
            raise ValueError(
                f"partial has hidden size {hidden_size}, the workspace is for {self.hidden_size}"
            )
        if partial.dtype != self.dtype:
            raise TypeError(f"partial is {partial.dtype}, the workspace is for {self.dtype}")
        if partial.device != self.device:
            raise ValueError(f"partial is on {partial.device}, the workspace on {self.device}")
        if not 0 < num_tokens <= self.max_tokens:
            raise ValueError(
                f"the workspace takes 1 to {self.max_tokens} tokens, got {num_tokens}; "
                "call ensure() before capture, or reduce unfused"
            )
        at_end = num_tokens > self.max_early_tokens
        self._buffers.run(partial, residual, weight, eps, weight_bias, out_residual, out_normed, at_end)
        return out_residual, out_normed

    def adds_choices(self, choices: ChoiceParts) -> bool:
        """Whether `run_choices` would take this batch."""
        fits = self.takes(choices) and choices.experts.dtype == torch.int32
        fits = fits and choices.experts.shape[1] <= MAX_CHOICES
        return fits and self._buffers is not None and self._buffers.adds_choices(choices.shape[0])

    def run_choices(
        self, choices: ChoiceParts, residual: Tensor, weight: Tensor, eps: float, weight_bias: float
    ) -> tuple[Tensor, Tensor]:
        """`run` of `choices.sum()`, bit for bit, where `adds_choices` says so; the sum is made in the same kernel.

        Raises ValueError, TypeError for operands that do not fit, RuntimeError on a closed workspace.
        """
        if self.closed or self._buffers is None:
            raise RuntimeError("the workspace is closed; open a new one before capture")
        choices.check(weight, residual)
        if residual.device != self.device or not self.adds_choices(choices):
            raise ValueError(
                f"the workspace (hidden size {self.hidden_size}, {self.dtype}, {self.device}) does not add choices of "
                f"shape {choices.shape}, {choices.dtype}, experts {tuple(choices.experts.shape)} of "
                f"{choices.experts.dtype}, on {residual.device}: give it their sum()"
            )
        out_residual, out_normed = torch.empty_like(residual), torch.empty_like(residual)
        self._buffers.run_choices(choices, residual, weight, eps, weight_bias, out_residual, out_normed)
        return out_residual, out_normed

    def raw(self) -> RawKernel:
        """The TVM-FFI kernel with this rank's pointer table (trtllm), for JAX. Valid until `ensure` or `close`."""
        if self.closed or self._buffers is None:
            raise RuntimeError("the workspace is closed")
        return self._buffers.raw()

    def ensure(self, num_tokens: int) -> None:
        """Collective: room for `num_tokens`, made with the same votes and self-test as the first.

        The smaller buffers stay until `close`, because a CUDA graph may have been captured with them.
        Raises RuntimeError during capture, and WorkspaceError, on all ranks, when it fails; the workspace
        then keeps its size and does not try again.
        """
        if self.sufficient(num_tokens):
            return
        refuse_capture("growing a workspace")
        if self.closed:
            raise RuntimeError("the workspace is closed; open a new one")
        if self._failure is not None:
            raise self._failure
        buffers = self._build(num_tokens)
        if self._buffers is not None:
            self._outgrown.append(self._buffers)
        self._buffers = buffers
        self.max_tokens = num_tokens

    def close(self) -> None:
        """Gives the memory back. Graphs captured with this workspace must not be replayed any more.

        Local: no rank waits for another, so a rank that dies keeps nobody from closing.
        """
        if self.closed:
            return
        self.closed = True
        for buffers in (*self._outgrown, self._buffers):
            if buffers is not None:
                buffers.destroy()
        self._outgrown.clear()
        self._buffers = None

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _build(self, max_tokens: int) -> Buffers:
        """New buffers, tested. Collective: a vote after each step; WorkspaceError on all ranks after a no."""

        def probe() -> Buffers:
            buffers = self._make_buffers()
            buffers.probe(max_tokens)
            return buffers

        tried = attempt(probe)
        self._agree("trying the allocation", tried, None)
        buffers = tried.value
        assert buffers is not None
        made = attempt_together(self._comm, lambda comm: buffers.create(max_tokens, comm))
        self._agree("creating the workspace", made, buffers)
        prepared = attempt(
            lambda: selftest.prepare(
                world_size=self.world_size,
                rank=self.rank,
                hidden_size=self.hidden_size,
                dtype=self.dtype,
                device=self.device,
                token_counts=selftest.token_counts(max_tokens, self._most_tokens),
                choice_counts=selftest.choice_counts(buffers, max_tokens, self._most_tokens),
            )
        )
        self._agree("preparing the self-test", prepared, buffers)
        cases = prepared.value or []
        tested = attempt(lambda: selftest.run(buffers, cases, self.world_size))
        self._agree("the self-test", tested, buffers)
        return buffers

    def _agree(self, step: str, mine: Attempt, buffers: Buffers | None) -> None:
        """All ranks vote on their attempts; a no undoes the step and raises WorkspaceError on all."""
        outcome = vote(self._all_ranks, mine.ok, step, mine.reason, mine.fatal)
        if outcome.passed:
            return
        if buffers is not None and not outcome.fatal:  # freeing would wait for a kernel that never ends
            buffers.destroy()
        gc.collect()  # what a half-made workspace left behind
        self._failure = WorkspaceError(step, outcome.reason, outcome.fatal)
        raise self._failure


def open_workspace(
    decision: FusionDecision,
    comm: CommBackend,
    *,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    max_tokens: int,
    flashinfer: FlashInferInfo,
    device_group: dist.ProcessGroup | None = None,
    all_ranks: CommBackend | None = None,
    make_buffers: Callable[[], Buffers] | None = None,
) -> Workspace:
    """Collective over `all_ranks` (default `comm`): the workspace of `comm`'s ranks for up to `max_tokens`.

    In this order, with a vote after each: try the real allocation, create, prepare and run a known-answer
    self-test. `decision.backend` names the backend; "mnnvl" is only ever there with the operator's consent to
    multicast. `device_group` is the torch group of the same ranks' devices; the reference backend needs it.
    `all_ranks` is for a group that is one of several: a failure in any of them stops all. `make_buffers` replaces
    the backend's own buffers, for a backend that another framework brings.

    Raises WorkspaceError on all ranks alike, ValueError for what no vote is needed to see, RuntimeError
    during the capture of a CUDA graph, and CommError when a rank has ended.
    """
    refuse_capture("opening a workspace")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {DTYPES}, got {dtype}")
    if decision.backend == "reference" and device_group is None and make_buffers is None:
        raise ValueError("the reference backend needs device_group, got None")
    world_size = comm.Get_size()
    most_tokens = decision.max_backend_tokens(dtype.itemsize) if decision.pair.max_bytes else sys.maxsize
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())

    def backend_buffers() -> Buffers:
        if decision.backend != "reference":
            return FlashInferBuffers(
                FlashInferApi(flashinfer),
                decision.backend,
                world_size=world_size,
                hidden_size=hidden_size,
                dtype=dtype,
                device=device,
                group=device_group,
                most_tokens=most_tokens,
            )
        assert device_group is not None
        return ReferenceBuffers(
            device_group, world_size=world_size, hidden_size=hidden_size, dtype=dtype, device=device
        )

    workspace = Workspace(
        make_buffers or backend_buffers,
        comm,
        all_ranks or comm,
        backend=decision.backend,
        hidden_size=hidden_size,
        dtype=dtype,
        device=device,
        most_tokens=most_tokens,
    )
    workspace.ensure(max_tokens)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the self-test's tensors, before anybody measures what memory is left
    return workspace


def refuse_capture(what: str) -> None:
    """Collectives and allocations deadlock or break a CUDA graph that is being captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what} while a CUDA graph is being captured: do it before capture")
