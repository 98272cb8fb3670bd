"""The debt between a row-parallel layer and the norm that follows it.

A row-parallel projection leaves each rank with its part of a sum. `PartialSum` carries the part together with the
group that owes the sum, until the next norm (usually the *next layer's*) pays it, once.
"""

from __future__ import annotations

import torch

from core_torch.kernels.allreduce import ReduceGroup


class DebtError(RuntimeError):
    """A sum was paid twice, paid to the wrong group, or never paid."""


class PartialSum:
    """This rank's part [T, D] of a sum over `group`, to be taken exactly once."""

    open_debts = 0  # of this process; the model checks it at the end of a forward pass

    def __init__(self, tensor: torch.Tensor, group: ReduceGroup) -> None:
        self._tensor: torch.Tensor | None = tensor
        self.group = group
        PartialSum.open_debts += 1

    def take(self) -> torch.Tensor:
        """The part, handed to whoever reduces it. Raises DebtError the second time."""
        if self._tensor is None:
            raise DebtError(
                f"the sum owed over group {self.group.name!r} was taken already: it would be paid twice"
            )
        tensor, self._tensor = self._tensor, None
        PartialSum.open_debts -= 1
        return tensor

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
