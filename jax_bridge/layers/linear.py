"""Linear layers of one rank. A column-parallel layer is a `Linear` over its share of the outputs.

Shapes: T tokens, I inputs, O outputs (this rank's share of whichever is split).
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from core_torch.kernels.choice import NOT_ASKED, Answers, KernelOptions
from core_torch.kernels.few_rows import check_few_rows, is_worth_it
from jax_bridge.axes import MeshAxis
from jax_bridge.kernels.few_rows import few_rows
from jax_bridge.layers.parameter import parameter
from jax_bridge.partial_sum import PartialSum, ReduceAxis


class Product(nnx.Module):
    """What the layers below share: weight [O, I], bias, and a compiled product for few tokens.

    `split` is which dim of the weight continues on the ranks of which axis.
    """

    def __init__(
        self, inputs: int, outputs: int, split: Mapping[int, MeshAxis], bias: nnx.Param | None
    ) -> None:
        self.weight = parameter(outputs, inputs, split=split)
        self.bias, self.inputs = bias, inputs
        self.compiled = NOT_ASKED

    def choose_kernels(self, options: KernelOptions) -> Answers:
        self.compiled = options.ask(
            "few_rows", check_few_rows, inputs=self.inputs, bias=self.bias is not None
        )
        return {"few_rows": self.compiled}

    def multiply(self, x: Float[Array, "T I"]) -> Float[Array, "T O"]:
        """Without the bias."""
        weight = self.weight[...]
        compiled = self.compiled.usable and is_worth_it(x.shape[0], weight.shape[0])
        return few_rows(x, weight) if compiled else linear(x, weight)


class Linear(Product):
    """x [T, I] -> x @ weight.T + bias, [T, O]; the outputs are split over `axis`, or, without one, on every rank."""

    def __init__(self, inputs: int, outputs: int, axis: MeshAxis | None = None, bias: bool = False) -> None:
        split = {} if axis is None else {0: axis}
        super().__init__(inputs, outputs, split, parameter(outputs, split=split) if bias else None)

    def __call__(self, x: Float[Array, "T I"]) -> Float[Array, "T O"]:
        out = self.multiply(x)
        return out if self.bias is None else out + self.bias[...]


class RowParallelLinear(Product):
    """x [T, this rank's inputs] -> this rank's part of the output [T, O]; `axis` owes the sum.

    The bias belongs to the sum, so one rank alone adds it.
    """

    def __init__(self, inputs: int, outputs: int, axis: ReduceAxis, bias: bool = False) -> None:
        super().__init__(inputs, outputs, {1: axis}, parameter(outputs) if bias else None)
        self.axis = axis

    def __call__(self, x: Float[Array, "T I"]) -> PartialSum:
        out = self.multiply(x)
        if self.bias is not None:
            bias = self.bias[...]
            out = out + jnp.where(self.axis.rank() == 0, bias, jnp.zeros_like(bias))
        return PartialSum(out, self.axis)


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, I], weight [O, I] -> [T, O] in their dtype."""
    return jnp.einsum("ti,oi->to", x, weight)
