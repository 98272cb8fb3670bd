"""Linear layers of one rank. A column-parallel layer is a `Linear` over its share of the outputs.

Shapes: T tokens, I inputs, O outputs (this rank's share of whichever is split).
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_bridge.axes import MeshAxis
from jax_bridge.layers.parameter import parameter
from jax_bridge.partial_sum import PartialSum, ReduceAxis


class Linear(nnx.Module):
    """x [T, I] -> x @ weight.T + bias, [T, O]; the outputs are split over `axis`, or, without one, on every rank."""

    def __init__(self, inputs: int, outputs: int, axis: MeshAxis | None = None, bias: bool = False) -> None:
        split = None if axis is None else {0: axis}
        self.weight = parameter(outputs, inputs, split=split)
        self.bias = parameter(outputs, split=split) if bias else None

    def __call__(self, x: Float[Array, "T I"]) -> Float[Array, "T O"]:
        out = linear(x, self.weight[...])
        return out if self.bias is None else out + self.bias[...]


class RowParallelLinear(nnx.Module):
    """x [T, this rank's inputs] -> this rank's part of the output [T, O]; `axis` owes the sum.

    The bias belongs to the sum, so one rank alone adds it.
    """

    def __init__(self, inputs: int, outputs: int, axis: ReduceAxis, bias: bool = False) -> None:
        self.weight = parameter(outputs, inputs, split={1: axis})
        self.bias = parameter(outputs) if bias else None
        self.axis = axis

    def __call__(self, x: Float[Array, "T I"]) -> PartialSum:
        out = linear(x, self.weight[...])
        if self.bias is not None:
            bias = self.bias[...]
            out = out + jnp.where(self.axis.rank() == 0, bias, jnp.zeros_like(bias))
        return PartialSum(out, self.axis)


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, I], weight [O, I] -> [T, O] in their dtype."""
    return jnp.einsum("ti,oi->to", x, weight)
