"""One order for calls that do not depend on each other.

A fused kernel keeps state in its workspace, so all ranks must make the calls of a communicator in one order. XLA
runs independent calls in any order, and side effects or barriers do not stop it; only data does. A `CallOrder`
is a number that each call takes from the one before it:

    order = jax_bridge.CallOrder.start()
    total_a, order = order.allreduce(a, axis_name="tp")
    total_b, order = order.allreduce(b, axis_name="tp")      # after a's, on every rank

It is a pytree: a loop carries it, a function takes and returns it. Use one order for all independent calls of a
program; two orders are two sets of calls that may still overtake each other.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jax_bridge import op
from jax_bridge.axes import AxisName
from jax_bridge.communicator import Communicator


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CallOrder:
    """A place in an order. The CPU kernel counts calls in `number` and compares it between ranks, GPU kernels only
    pass it on: do not read it."""

    number: Int32[Array, " 1"]

    @classmethod
    def start(cls) -> CallOrder:
        return cls(jnp.zeros((1,), jnp.int32))

    def allreduce_residual_rmsnorm(
        self,
        partial: Float[Array, "*tokens D"],
        residual: Float[Array, "*tokens D"],
        weight: Float[Array, " D"],
        *,
        axis_name: AxisName,
        eps: float,
        weight_bias: float = 1.0,
        comm: Communicator | None = None,
        side: str = "attention",
        in_place: bool = True,
    ) -> tuple[tuple[Float[Array, "*tokens D"], Float[Array, "*tokens D"]], CallOrder]:
        """`jax_bridge.allreduce_residual_rmsnorm` after all calls that led to this order, and the order after it."""
        residual, normed, number = op.pay(
            partial,
            residual,
            weight,
            self.number,
            axis_name,
            eps=eps,
            weight_bias=weight_bias,
            comm=comm,
            side=side,
            in_place=in_place,
            compiled=False,
        )
        assert number is not None
        return (residual, normed), CallOrder(number)

    def allreduce(
        self, x: Float[Array, "*tokens D"], *, axis_name: AxisName, comm: Communicator | None = None
    ) -> tuple[Float[Array, "*tokens D"], CallOrder]:
        """`jax_bridge.allreduce` after all calls that led to this order, and the order after it."""
        total, number = op.total(x, self.number, axis_name, comm=comm)
        assert number is not None
        return total, CallOrder(number)
