"""The public reductions: all-reduce + residual add + RMSNorm as one call, and the plain sum.

Shapes: [..., D] with D hidden; the leading dims are tokens. Call them inside `jax.shard_map` over a mesh with
the axes of `axis_name`: one axis by its name, or several as a tuple, whose devices together are one group.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_bridge import reduction
from jax_bridge.axes import AxisName, axes_of, in_mesh_order
from jax_bridge.communicator import Communicator, find_communicator
from jax_bridge.reduction import Reduction, Sequence
from jax_bridge.varying import is_checked, vary_over, varying_axes

DTYPES = ("float16", "bfloat16", "float32")


def allreduce_residual_rmsnorm(
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
    compiled: bool = False,
) -> tuple[Float[Array, "*tokens D"], Float[Array, "*tokens D"]]:
    """Adds the sum over `axis_name` of `partial` to `residual`, and RMS-normalises it: -> (residual, normed).

        residual = residual + sum over ranks of partial
        normed   = residual * rsqrt(mean(residual^2) + eps) * (weight_bias + weight)

    `partial` is each rank's own; `residual` and `weight` are the same on all ranks. float16, bfloat16 or float32,
    all three alike. One kernel inside `fused_communicator` where its decision says so for this many tokens;
    otherwise XLA's all-reduce, add and norm (`explain` tells which, and why). `comm` is found by `axis_name`
    unless given. `side` is "attention" or "mlp": which of the decoder's two reductions this is.

    `in_place`: a fused call writes the new residual over the old one, which costs nothing where the old one is not
    read again: in a chain, a loop, or with the argument donated. Where it is kept (an argument that is not
    donated, a value used twice) XLA copies it before the call; `in_place=False` saves that copy.

    `compiled`: add and norm of a call that is not fused are one kernel. For bfloat16 on GPUs, as
    `core_torch.kernels.add_norm.check_add_norm` says, once `kernels.compiled.open_kernels` has opened "add_norm".

    Fused calls that do not depend on each other have no order, which is an error on CPU and a hang or wrong
    numbers on GPUs: pass one call's residual to the next, as a decoder does, or use `CallOrder`.

    Works under jit, shard_map (either `check_vma`), scan, while_loop, cond (taken alike on all ranks), checkpoint,
    vmap (the batch joins the tokens) and reverse-mode differentiation. Raises ValueError or TypeError at trace
    time, naming both sides of what does not fit.
    """
    new_residual, normed, _ = pay(
        partial,
        residual,
        weight,
        None,
        axis_name,
        eps=eps,
        weight_bias=weight_bias,
        comm=comm,
        side=side,
        in_place=in_place,
        compiled=compiled,
    )
    return new_residual, normed


def allreduce(
    x: Float[Array, "*tokens D"], *, axis_name: AxisName, comm: Communicator | None = None
) -> Float[Array, "*tokens D"]:
    """The sum of `x` over `axis_name`: in float32 in rank order where it is fused, `lax.psum` where it is not.

    The same conditions, transformations and errors as `allreduce_residual_rmsnorm`.
    """
    return total(x, None, axis_name, comm=comm)[0]


def pay(
    partial: jax.Array,
    residual: jax.Array,
    weight: jax.Array,
    sequence: Sequence,
    axis_name: AxisName,
    *,
    eps: float,
    weight_bias: float,
    comm: Communicator | None,
    side: str,
    in_place: bool,
    compiled: bool,
) -> tuple[jax.Array, jax.Array, Sequence]:
    """`allreduce_residual_rmsnorm` with the number that orders it."""
    _check_array("partial", partial)
    _check_fits("residual", residual, partial.shape, partial)
    _check_fits("weight", weight, partial.shape[-1:], partial)
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a finite number of at least 0, got {eps!r}")
    if side not in ("attention", "mlp"):
        raise ValueError(f"side must be 'attention' or 'mlp', got {side!r}")
    axis_name = _checked_axes(axis_name)
    axes = frozenset(axes_of(axis_name))
    checked = is_checked(axis_name)
    # Everything varies over the same other axes, and the results over the group's only if an operand does that
    # should not: then nobody can promise that they are equal.
    others = frozenset[str]().union(*map(varying_axes, (partial, residual, weight))) - axes
    alike = checked and axes.isdisjoint(varying_axes(residual) | varying_axes(weight))
    shared = others if alike or not checked else others | axes
    communicator, reason = find_communicator(axis_name, comm)
    call = Reduction(
        axis_name,
        side,
        communicator,
        reason,
        checked,
        alike,
        float(eps),
        float(weight_bias),
        in_place,
        compiled,
    )
    return reduction.allreduce_residual_rmsnorm(
        call,
        vary_over(partial, others | axes) if checked else partial,
        vary_over(residual, shared),
        vary_over(weight, shared),
        sequence,
    )


def total(
    x: jax.Array, sequence: Sequence, axis_name: AxisName, *, comm: Communicator | None
) -> tuple[jax.Array, Sequence]:
    """`allreduce` with the number that orders it."""
    _check_array("x", x)
    axis_name = _checked_axes(axis_name)
    checked = is_checked(axis_name)
    communicator, reason = find_communicator(axis_name, comm)
    call = Reduction(axis_name, "attention", communicator, reason, checked, alike=checked)
    return reduction.allreduce(call, vary_over(x, axes_of(axis_name)) if checked else x, sequence)


def sum_for_norm(
    partial: jax.Array, axis_name: AxisName, *, comm: Communicator | None, side: str
) -> jax.Array:
    """The sum of gathered rows, of which the norm then takes its own: never fused, counted as the norm's reduction."""
    _check_array("partial", partial)
    axis_name = _checked_axes(axis_name)
    checked = is_checked(axis_name)
    communicator, reason = find_communicator(axis_name, comm)
    call = Reduction(axis_name, side, communicator, reason, checked, alike=checked)
    return reduction.sum_for_norm(call, vary_over(partial, axes_of(axis_name)) if checked else partial)


def _check_array(name: str, x: jax.Array) -> None:
    if not isinstance(x, jax.Array):
        raise TypeError(f"{name} must be a jax.Array, got {type(x).__name__}")
    if x.ndim < 1:
        raise ValueError(f"{name} must be [..., hidden_size], got shape {x.shape}")
    if jnp.dtype(x.dtype).name not in DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(DTYPES)}, got {x.dtype}{list(x.shape)}")


def _check_fits(name: str, x: jax.Array, shape: tuple[int, ...], partial: jax.Array) -> None:
    _check_array(name, x)
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape} to go with partial {partial.shape}, got {x.shape}")
    if x.dtype != partial.dtype:
        raise TypeError(
            f"{name} must have partial's dtype: partial is {partial.dtype}{list(partial.shape)}, "
            f"{name} is {x.dtype}{list(x.shape)}"
        )


def _checked_axes(axis_name: AxisName) -> AxisName:
    """`axis_name` in the mesh's order."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    here = jax.sharding.get_abstract_mesh()
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"axis_name must be the name of a mesh axis or a tuple of names, got {axis_name!r}"
            )
        try:
            jax.lax.axis_size(name)
        except NameError as error:
            raise ValueError(
                f"axis_name {name!r} is not bound here: call this inside jax.shard_map over a mesh with that axis"
            ) from error
        if name not in here.manual_axes:
            raise ValueError(
                f"axis_name {name!r} is an axis of vmap here, not of a mesh: call this inside jax.shard_map"
            )
    return in_mesh_order(axis_name, here.axis_names)
