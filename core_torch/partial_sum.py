"""The debt between a row-parallel layer and the norm that follows it.

A row-parallel projection leaves each rank with its part of a sum. `PartialSum` carries the part together with the
group that owes the sum, until the next norm (usually the *next layer's*) pays it, once.
"""

from __future__ import annotations

import torch

from core_torch.kernels.allreduce import ReduceGroup
from core_torch.kernels.moe_prefill import ChoiceParts


class DebtError(RuntimeError):
    """A sum was paid twice, paid to the wrong group, or never paid."""


class PartialSum:
    """This rank's part [T, D] of a sum over `group`, to be taken exactly once.

    The part of many tokens' experts comes before a token's choices are added: who reduces it may do that too.
    """

    open_debts = 0  # of this process; the model checks it at the end of a forward pass

    def __init__(self, part: torch.Tensor | ChoiceParts, group: ReduceGroup) -> None:
        self._part: torch.Tensor | ChoiceParts | None = part
        self.group = group
        PartialSum.open_debts += 1

    def take(self) -> torch.Tensor:
        """The part, handed to whoever reduces it. Raises DebtError the second time."""
        part = self.take_as_it_is()
        return part.sum() if isinstance(part, ChoiceParts) else part

    def take_as_it_is(self) -> torch.Tensor | ChoiceParts:
        """`take` for who can add a token's choices."""
        if self._part is None:
            raise DebtError(
                f"the sum owed over group {self.group.name!r} was taken already: it would be paid twice"
            )
        part, self._part = self._part, None
        PartialSum.open_debts -= 1
        return part

    def __add__(self, other: PartialSum) -> PartialSum:
        """Both parts as one debt (routed and shared experts, before their one reduction)."""
        if other.group is not self.group:
            raise DebtError(
                f"cannot merge a sum over {self.group.name!r} with one over {other.group.name!r}: pay each to its own"
            )
        return PartialSum(self.take() + other.take(), self.group)

    @classmethod
    def check_settled(cls) -> None:
        """Raise DebtError when a sum that this process owes was never paid."""
        if cls.open_debts:
            count, cls.open_debts = cls.open_debts, 0
            raise DebtError(
                f"{count} partial sums were never reduced; each must go to the norm that follows it"
            )
