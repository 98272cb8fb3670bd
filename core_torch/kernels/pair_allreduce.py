"""The fused all-reduce of two ranks for long messages: the project's own kernel, beside FlashInfer's for short ones.

Each rank writes its part into the other's memory, and adds, norms and writes what has arrived while the rest travels
(`csrc/pair_allreduce.cuh`). A part may come as the parts of a token's choices (`ChoiceParts`), which are added on the
way. The memory is FlashInfer's kind, which peers reach by file descriptors, without multicast.
Shapes: T tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_torch.kernels import native
from core_torch.kernels.comm import CommBackend
from core_torch.kernels.flashinfer_api import SymmetricMemory
from core_torch.kernels.moe_prefill import ChoiceParts
from shared_config import FusionDecision

MAX_DIM = 8192  # csrc/add_norm.cuh
# kPlainRows and kChoiceRows of csrc/pair_allreduce.cuh: of which the rows are a multiple, and the fewest of one flag.
ROW_MULTIPLE, FLAG_ROWS = 4, 2


def check_pair_allreduce(*, hidden_size: int, dtype: torch.dtype, device: torch.device) -> native.Answer:
    """Whether the kernel takes this width and dtype on `device`, and can be had there."""
    on_device = native.check_device(device)
    answer = native.first_failure(
        (on_device.usable, on_device.reason),
        (dtype == torch.bfloat16, f"pair_allreduce takes bfloat16, not {dtype}"),
        (
            hidden_size % 8 == 0 and hidden_size <= MAX_DIM,
            f"pair_allreduce takes a width that is a multiple of 8 up to {MAX_DIM}, not {hidden_size}",
        ),
    )
    return native.check_library("pair_allreduce", device) if answer.usable else answer


def pair_answer(decision: FusionDecision) -> native.Answer:
    """Whether long calls run in it, and why not, by a decision that is in force."""
    if decision.pair.max_bytes == 0:
        return native.Answer(False, decision.pair.source)
    return native.Answer(decision.enabled, "" if decision.enabled else f"fusion is off: {decision.reason}")


def pair_bytes(max_tokens: int, hidden_size: int) -> int:
    """What one rank allocates: bfloat16 rows of two calls, and a flag for every few of them."""
    rows = _whole_rows(max_tokens)
    return 2 * (rows * hidden_size * 2 + rows // FLAG_ROWS * 4)


class PairMemory:
    """The memory of two ranks for calls of up to `max_tokens`, and the kernel on it. Collective over `comm`."""

    def __init__(self, comm: CommBackend, *, max_tokens: int, hidden_size: int, device: torch.device) -> None:
        self.rank = comm.Get_rank()
        self.max_tokens = _whole_rows(max_tokens)
        self._memory = SymmetricMemory(pair_bytes(max_tokens, hidden_size), comm, device)
        self._buffers = torch.tensor(self._memory.addresses, dtype=torch.int64, device=device)
        self._state = torch.zeros(2, dtype=torch.int32, device=device)
        self._run = native.function("pair_allreduce", device)
        self._run_choices = native.function("pair_allreduce_choices", device, of="pair_allreduce")
        self._device = device
        torch.cuda.synchronize(device)
        comm.barrier()  # nobody writes before all flags are zero

    def run(
        self,
        partial: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_bias: float,
        out_residual: Tensor,
        out_normed: Tensor,
    ) -> None:
        """`Workspace.run`'s operands, on the current stream. Waits for the peer's call."""
        where = self._buffers, self._state, self.rank, self.max_tokens
        self._run(partial, residual, weight, out_residual, out_normed, *where, eps, weight_bias)

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
        """`run` of `choices.sum()`, which is never written; the same bits."""
        where = self._buffers, self._state, self.rank, self.max_tokens
        mine = choices.parts, choices.experts, choices.num_experts
        self._run_choices(*mine, residual, weight, out_residual, out_normed, *where, eps, weight_bias)

    def beside(self, flashinfer: Any, most_tokens: int) -> Any:
        """A TVM-FFI function with the parameters of `flashinfer`, FlashInfer's kernel: that one up to `most_tokens`,
        this one above."""
        import tvm_ffi

        make = native.function("pair_or", self._device, of="pair_allreduce")
        buffers, state = map(tvm_ffi.from_dlpack, (self._buffers, self._state))
        return make(flashinfer, buffers, state, self.rank, self.max_tokens, most_tokens)

    def destroy(self) -> None:
        self._memory.destroy()


def _whole_rows(max_tokens: int) -> int:
    return -(-max_tokens // ROW_MULTIPLE) * ROW_MULTIPLE
