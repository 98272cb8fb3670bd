"""From a decision to a working group: all ranks fuse, or none does, and all know why."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

from core_torch.kernels.buffers import Buffers
from core_torch.kernels.comm import CommBackend
from core_torch.kernels.pair_allreduce import check_pair_allreduce
from core_torch.kernels.votes import Vote, vote
from core_torch.kernels.workspace import Workspace, WorkspaceError, open_workspace, refuse_capture
from shared_config import FlashInferInfo, FusionDecision, FusionError, FusionWarning


def start_fusion(
    decision: FusionDecision,
    comm: CommBackend,
    *,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    flashinfer: FlashInferInfo,
    device_group: dist.ProcessGroup | None = None,
    all_ranks: CommBackend | None = None,
    max_tokens: int | None = None,
    make_buffers: Callable[[], Buffers] | None = None,
) -> tuple[FusionDecision, Workspace | None]:
    """Collective, before any CUDA graph is captured: -> (the decision in force, its workspace or None).

    The ranks compare their decisions (sizes depend on them), make and test the workspace with a vote after
    each step (`open_workspace`), and compare rank 0's digest once more with what they are about to act on.
    Where one of them cannot have the project's own kernel for long messages, none uses it (`decision.pair`).
    Any no turns fusion off on all ranks, with the rank and the reason in the decision and in one
    FusionWarning on rank 0. The decision that comes back is the memory of it: with that one nothing is
    tried again.

    The workspace is sized by the decision's limit, or by `max_tokens` where no larger batch can come.
    `all_ranks` are those that must act alike when `comm` is one group of several. `make_buffers`: see
    `open_workspace`.

    Raises on all ranks alike: FusionError where the decision's mode is "on" and a step fails, or where a
    GPU is stuck and nothing can go on; CommError when a rank ends; RuntimeError during capture.
    """
    refuse_capture("starting fusion")
    voters = all_ranks or comm
    if voters.Get_size() == 1:
        return decision, None
    decision, agreed = _compare(decision, voters)
    if not agreed.passed:
        return _refuse(decision, voters, "same decision", agreed.reason), None
    if not decision.enabled or comm.Get_size() == 1:
        return decision, None
    if hidden_size != decision.hidden_size:
        raise ValueError(f"hidden_size is {hidden_size}, but the decision is for {decision.hidden_size}")
    if decision.pair.max_bytes:
        answer = check_pair_allreduce(hidden_size=hidden_size, dtype=dtype, device=device)
        usable = vote(voters, answer.usable, "choosing pair_allreduce", answer.reason)
        if not usable.passed:
            decision = decision.without_pair(usable.reason)
    limit = decision.max_tokens(dtype.itemsize)
    limit = limit if max_tokens is None else min(limit, max_tokens)
    if limit < 1:
        reason = f"the limit of {decision.max_bytes} bytes is below one token of {hidden_size} {dtype}"
        return _refuse(decision, voters, "limit", reason), None
    try:
        workspace = open_workspace(
            decision,
            comm,
            hidden_size=hidden_size,
            dtype=dtype,
            device=device,
            max_tokens=limit,
            flashinfer=flashinfer,
            device_group=device_group,
            all_ranks=all_ranks,
            make_buffers=make_buffers,
        )
    except WorkspaceError as error:
        if error.fatal:
            raise FusionError(f"{error.reason}; start again with fusion='off'", decision) from error
        return _refuse(decision, voters, error.step, error.reason), None
    decision, agreed = _compare(decision, voters)
    if not agreed.passed:
        workspace.close()
        return _refuse(decision, voters, "same decision", agreed.reason), None
    return decision, workspace


def _compare(decision: FusionDecision, voters: CommBackend) -> tuple[FusionDecision, Vote]:
    """-> (rank 0's decision, whether every rank had the same one)."""
    text = voters.bcast(decision.to_json(), 0)
    shared = FusionDecision.from_json(text)
    same = shared.digest == decision.digest
    difference = "" if same else f"decided {_summary(decision)}, rank 0 decided {_summary(shared)}"
    return shared, vote(voters, same, "comparing decisions", difference)


def _summary(decision: FusionDecision) -> str:
    return (
        f"enabled={decision.enabled} backend={decision.backend} mode={decision.mode} "
        f"max_bytes={decision.max_bytes} by {decision.decided_by!r}, digest {decision.digest[:12]}"
    )


def _refuse(decision: FusionDecision, voters: CommBackend, step: str, reason: str) -> FusionDecision:
    """The decision, switched off for good; FusionError on every rank where the user demanded fusion."""
    off = decision.without_fusion(reason, f"start-up: {step}")
    if decision.mode == "on" and not decision.deterministic:
        raise FusionError(f"fusion='on' cannot be met: {reason}", off)
    if voters.Get_rank() == 0:
        warnings.warn(FusionWarning(f"fusion is off on all ranks: {reason}"), stacklevel=3)
    return off
