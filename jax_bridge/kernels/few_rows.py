"""A linear layer for few tokens, as decode steps have them: a compiled `layers.linear.linear`.

Shapes: T tokens, I inputs, O outputs.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from jax_bridge.kernels.compiled import call


def few_rows(
    x: Float[Array, "T I"], weight: Float[Array, "O I"], *, launch_with_pdl: bool = True
) -> Float[Array, "T O"]:
    """x @ weight.T, summed in float32 and rounded once; a token's bits do not depend on the others.

    Takes what `core_torch.kernels.few_rows.check_few_rows` says, up to its MAX_ROWS tokens.
    """
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), x.dtype)
    return call("few_rows", (x, weight), (out,), launch_with_pdl=launch_with_pdl)[0]
