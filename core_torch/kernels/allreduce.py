"""Paying an owed sum: all-reduce + residual add + RMSNorm over one group of ranks, fused or not.

Shapes: T tokens, D hidden. `partial [T, D]` is this rank's part of the sum, or the parts of a token's choices (of
experts) that have yet to be added (`ChoiceParts`); `residual [T, D]` the stream that it is added to, `weight [D]` the
norm's. Callers never ask which way a batch goes: `allreduce_residual_rmsnorm` does, per batch, from the group's
decision, and counts it.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from core_torch.kernels.add_norm import add_norm, check_add_norm
from core_torch.kernels.choice import NOT_ASKED, Answers, KernelOptions
from core_torch.kernels.contract import add_rmsnorm, check_operands, sum_in_rank_order
from core_torch.kernels.counts import ReductionCounts
from core_torch.kernels.moe_prefill import ChoiceParts
from core_torch.kernels.native import Answer
from core_torch.kernels.pair_allreduce import pair_answer
from core_torch.kernels.votes import Vote, vote

if TYPE_CHECKING:
    from core_torch.kernels.comm import CommBackend
    from core_torch.kernels.workspace import Workspace
    from shared_config import BatchAnswer, FusionDecision

# A custom op takes numbers and tensors only, so it finds its group by a number. Groups of several threads
# may come and go at the same time, hence the lock; a group that nobody holds any more is forgotten.
_groups: weakref.WeakValueDictionary[int, ReduceGroup] = weakref.WeakValueDictionary()
_groups_lock = threading.Lock()
_next_handle = itertools.count()


@dataclass(eq=False)
class ReduceGroup:
    """The ranks that a sum is owed by, and how they pay it.

    `side` is "attention" or "mlp"; `ranks` are global, `rank` is this process's place among them;
    `device_group` is the torch group of their devices (None for a group of one), `comm` their CPU messages;
    `workspace` is None when nothing is fused.
    """

    name: str
    side: str
    ranks: tuple[int, ...]
    rank: int
    device_group: dist.ProcessGroup | None
    comm: CommBackend
    decision: FusionDecision
    workspace: Workspace | None = None
    counts: ReductionCounts = field(default_factory=ReductionCounts)
    compiled: Answer = NOT_ASKED  # whether add and norm are one kernel where the sum is not fused with them
    handle: int = field(init=False)
    _answers: dict[tuple[int, int], BatchAnswer] = field(init=False, default_factory=dict, repr=False)
    _agreed: dict[str, Vote] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"group {self.name}: local rank {self.rank} is not one of ranks {self.ranks}")
        if self.size > 1 and self.device_group is None:
            raise ValueError(f"group {self.name}: ranks {self.ranks} need a torch process group, got None")
        with _groups_lock:
            self.handle = next(_next_handle)
            _groups[self.handle] = self

    @property
    def size(self) -> int:
        return len(self.ranks)

    def choose_kernels(self, options: KernelOptions) -> Answers:
        self.compiled = options.ask("add_norm", check_add_norm, hidden_size=self.decision.hidden_size)
        alone = {"add_norm": self.compiled}
        return alone if self.size == 1 else alone | {"pair_allreduce": pair_answer(self.decision)}

    def agree(self, name: str, answer: Answer) -> Answer:
        """Collective, once a name: kernel `name` is usable where every rank of the group says so.

        For kernels that decide what a rank brings to a reduction (`ChoiceParts` or a sum), which all must bring alike.
        """
        if self.size == 1:
            return answer
        if name not in self._agreed:
            self._agreed[name] = vote(self.comm, answer.usable, f"choosing {name}", answer.reason)
        agreed = self._agreed[name]
        return Answer(agreed.passed, agreed.reason) if answer.usable else answer

    def fuses(self, num_tokens: int, itemsize: int) -> BatchAnswer:
        """Whether a batch of `num_tokens` is fused, and why not. Remembered: a model asks twice per layer."""
        key = (num_tokens, itemsize)
        if key not in self._answers:
            self._answers[key] = self.decision.fuses(
                num_tokens, side=self.side, itemsize=itemsize, owed_ranks=self.ranks, op_ranks=self.ranks
            )
        return self._answers[key]


def allreduce_residual_rmsnorm(
    partial: Tensor | ChoiceParts,
    residual: Tensor | None,
    weight: Tensor,
    *,
    group: ReduceGroup,
    eps: float,
    weight_bias: float,
) -> tuple[Tensor, Tensor]:
    """Pays `group`'s sum: -> (residual + sum of partial over ranks, its norm times `weight_bias + weight`).

    Consumes `partial`: its contents are undefined afterwards, as the sum must not be paid twice. `residual`
    may be None (none yet); the result's residual is then the sum. A group of one launches no collective and
    counts nothing. Under `torch.compile` this is one opaque op. All ranks of the group call with the same
    shapes, in the same order, and all with choices or none. Choices are added in the same kernel where that can
    (`Workspace.adds_choices`), with the same bits.

    Raises ValueError or TypeError for operands that do not fit together.
    """
    if isinstance(partial, ChoiceParts):
        if group.size > 1 and residual is not None and residual.shape[0] > 0:
            partial.check(weight, residual)
            mine = partial.parts, partial.experts, partial.num_experts
            return torch.ops.crossfuse.allreduce_residual_rmsnorm_of_choices(
                *mine, residual, weight, group.handle, eps, weight_bias
            )
        partial = partial.sum()
    check_operands(partial, weight, residual=residual)
    if group.size == 1 or partial.shape[0] == 0:
        add = add_norm if group.compiled.usable else add_rmsnorm
        return add(partial, residual, weight, eps, weight_bias)
    return torch.ops.crossfuse.allreduce_residual_rmsnorm(
        partial, residual, weight, group.handle, eps, weight_bias
    )


def fused(
    partial: Tensor | ChoiceParts,
    residual: Tensor | None,
    weight: Tensor,
    *,
    group: ReduceGroup,
    eps: float,
    weight_bias: float,
) -> tuple[Tensor, Tensor]:
    """`allreduce_residual_rmsnorm` in one kernel, through the workspace. ValueError where there is none.

    Choices that the workspace does not add are added before, in a kernel of their own.
    """
    if group.workspace is None:
        raise ValueError(f"group {group.name} has no workspace to fuse in: {group.decision.reason}")
    if isinstance(partial, ChoiceParts):
        if residual is not None and group.workspace.adds_choices(partial):
            outputs = group.workspace.run_choices(partial, residual, weight, eps, weight_bias)
            group.counts.add(fused=1)
            return outputs
        partial = partial.sum()
    # The kernel always adds a residual; before the first layer there is none yet.
    residual = torch.zeros_like(partial) if residual is None else residual
    outputs = group.workspace.run(partial, residual, weight, eps, weight_bias)
    group.counts.add(fused=1)
    return outputs


def unfused(
    partial: Tensor | ChoiceParts,
    residual: Tensor | None,
    weight: Tensor,
    *,
    group: ReduceGroup,
    eps: float,
    weight_bias: float,
) -> tuple[Tensor, Tensor]:
    """`allreduce_residual_rmsnorm` in three steps, the sum in place in `partial`; choices are added before."""
    if isinstance(partial, ChoiceParts):
        partial = partial.sum()
    # With no residual the sum becomes the residual, which must not be the partial that was consumed.
    summed = _sum_in_place(partial.clone() if residual is None else partial, group)
    group.counts.add(unfused=1)
    add = add_norm if group.compiled.usable else add_rmsnorm
    return add(summed, residual, weight, eps, weight_bias)


def all_reduce(x: Tensor, *, group: ReduceGroup, owed: bool = False) -> Tensor:
    """The plain sum over `group`'s ranks, in place in `x` (contiguous); returns `x`.

    Counted as `plain`, or with `owed` as `unfused`: then a norm follows, but cannot take the sum as it is.
    """
    if not x.is_contiguous():
        raise ValueError(f"x must be contiguous, got shape {tuple(x.shape)} with strides {x.stride()}")
    if group.size > 1 and x.numel() > 0:
        torch.ops.crossfuse.all_reduce(x, group.handle, owed)
    return x


def _sum_in_place(x: Tensor, group: ReduceGroup) -> Tensor:
    """`x` summed over the group; in rank order when the decision is deterministic."""
    if not group.decision.deterministic:
        dist.all_reduce(x, group=group.device_group)
        return x
    # A ring or tree adds in an order that depends on the size of the message, so the order is pinned here.
    parts = x.new_empty((group.size, *x.shape))
    dist.all_gather(list(parts.unbind()), x, group=group.device_group)
    return x.copy_(sum_in_rank_order(parts))


def _group(handle: int) -> ReduceGroup:
    with _groups_lock:
        group = _groups.get(handle)
    if group is None:
        raise RuntimeError(f"reduce group {handle} is gone; a compiled model must not outlive its groups")
    return group


# The ops, by schema rather than by `torch.library.custom_op`, whose Python wrapper costs 20 us a call.
torch.library.define(
    "crossfuse::allreduce_residual_rmsnorm",
    "(Tensor(a!) partial, Tensor? residual, Tensor weight, int handle, float eps, float weight_bias)"
    " -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "crossfuse::allreduce_residual_rmsnorm_of_choices",
    "(Tensor parts, Tensor experts, int num_experts, Tensor residual, Tensor weight, int handle, float eps,"
    " float weight_bias) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "crossfuse::all_reduce",
    "(Tensor(a!) x, int handle, bool owed=False) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("crossfuse::allreduce_residual_rmsnorm", "CompositeExplicitAutograd")
def _pay(
    partial: Tensor, residual: Tensor | None, weight: Tensor, handle: int, eps: float, weight_bias: float
) -> tuple[Tensor, Tensor]:
    return _pay_sum(_group(handle), partial, residual, weight, eps, weight_bias)


def _pay_sum(
    group: ReduceGroup,
    partial: Tensor | ChoiceParts,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    weight_bias: float,
) -> tuple[Tensor, Tensor]:
    """Fused or not is asked here, at run time, so that one compiled model serves batches of both kinds."""
    fits = group.workspace is not None and group.workspace.takes(partial)
    pay = fused if fits and group.fuses(partial.shape[0], partial.itemsize).fuses else unfused
    return pay(partial, residual, weight, group=group, eps=eps, weight_bias=weight_bias)


@torch.library.impl("crossfuse::allreduce_residual_rmsnorm_of_choices", "CompositeExplicitAutograd")
def _pay_choices(
    parts: Tensor,
    experts: Tensor,
    num_experts: int,
    residual: Tensor,
    weight: Tensor,
    handle: int,
    eps: float,
    weight_bias: float,
) -> tuple[Tensor, Tensor]:
    choices = ChoiceParts(parts, experts, num_experts)
    return _pay_sum(_group(handle), choices, residual, weight, eps, weight_bias)


@torch.library.register_fake("crossfuse::allreduce_residual_rmsnorm_of_choices")
def _(
    parts: Tensor,
    experts: Tensor,
    num_experts: int,
    residual: Tensor,
    weight: Tensor,
    handle: int,
    eps: float,
    weight_bias: float,
) -> tuple[Tensor, Tensor]:
    del parts, experts, num_experts, weight, handle, eps, weight_bias
    return torch.empty_like(residual), torch.empty_like(residual)


@torch.library.register_fake("crossfuse::allreduce_residual_rmsnorm")
def _(
    partial: Tensor, residual: Tensor | None, weight: Tensor, handle: int, eps: float, weight_bias: float
) -> tuple[Tensor, Tensor]:
    del residual, weight, handle, eps, weight_bias
    return torch.empty_like(partial), torch.empty_like(partial)


@torch.library.impl("crossfuse::all_reduce", "CompositeExplicitAutograd")
def _all_reduce(x: Tensor, handle: int, owed: bool = False) -> None:
    group = _group(handle)
    _sum_in_place(x, group)
    group.counts.add(unfused=int(owed), plain=int(not owed))


@torch.library.register_fake("crossfuse::all_reduce")
def _(x: Tensor, handle: int, owed: bool = False) -> None:
    del x, handle, owed
