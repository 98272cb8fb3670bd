"""The debt between a row-parallel layer and the norm that follows it.

A row-parallel projection leaves each rank with its part of a sum. `PartialSum` carries the part together with the
mesh axis that owes the sum, until the next norm (usually the *next layer's*) pays it, once. All of this happens
while a function is traced; in the program only the reduction is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from jax_bridge.axes import MeshAxis
from jax_bridge.communicator import Communicator


@dataclass(frozen=True)
class ReduceAxis(MeshAxis):
    """The ranks that a sum is owed by. `side` is "attention" or "mlp"."""

    side: str
    comm: Communicator | None = None


class DebtError(RuntimeError):
    """A sum was paid twice, paid to the wrong axis, or never paid."""


class PartialSum:
    """This rank's part [T, D] of a sum over `axis`, to be taken exactly once."""

    open_debts = 0  # of this process; the model checks it at the end of a forward pass

    def __init__(self, tensor: jax.Array, axis: ReduceAxis) -> None:
        self._tensor: jax.Array | None = tensor
        self.axis = axis
        PartialSum.open_debts += 1

    def take(self) -> jax.Array:
        """The part, handed to whoever reduces it. Raises DebtError the second time."""
        if self._tensor is None:
            raise DebtError(
                f"the sum owed over axis {self.axis.name!r} was taken already: it would be paid twice"
            )
        tensor, self._tensor = self._tensor, None
        PartialSum.open_debts -= 1
        return tensor

    def __add__(self, other: PartialSum) -> PartialSum:
        """Both parts as one debt (routed and shared experts, before their one reduction)."""
        if other.axis != self.axis:
            raise DebtError(
                f"cannot merge a sum over {self.axis.name!r} ({self.axis.side}) with one over {other.axis.name!r} "
                f"({other.axis.side}): pay each to its own"
            )
        return PartialSum(self.take() + other.take(), self.axis)

    @classmethod
    def check_settled(cls) -> None:
        """Raise DebtError when a sum that this process owes was never paid."""
        if cls.open_debts:
            count, cls.open_debts = cls.open_debts, 0
            raise DebtError(
                f"{count} partial sums were never reduced; each must go to the norm that follows it"
            )
