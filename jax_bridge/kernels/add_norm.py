"""What follows an all-reduce that is not fused, in one kernel: a compiled `plain.add_rmsnorm`.

Shapes: T tokens, D hidden.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

from jaxtyping import Array, Float

from jax_bridge.kernels.compiled import call
from jax_bridge.transports.base import like


def add_norm(
    summed: Float[Array, "T D"],
    residual: Float[Array, "T D"] | None,
    weight: Float[Array, " D"],
    eps: float,
    weight_bias: float,
    *,
    launch_with_pdl: bool = True,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """-> (residual + summed, its norm times `weight_bias + weight`); a token's bits do not depend on the others.

    Without a residual the sum is the first result. Takes what `core_torch.kernels.add_norm.check_add_norm` says.
    """
    attrs = {"eps": eps, "weight_bias": weight_bias, "launch_with_pdl": launch_with_pdl}
    if residual is None:
        return summed, call("norm", (summed, weight), (like(summed),), **attrs)[0]
    stream, normed = call("add_norm", (summed, residual, weight), (like(summed), like(summed)), **attrs)
    return stream, normed
