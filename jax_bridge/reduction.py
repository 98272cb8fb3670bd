"""The two reductions with their transformations: fused or plain by shape, one launch under vmap, a backward pass.

Shapes: [..., D], D hidden; the leading dims are tokens. The layers, from outside: `custom_vjp` (differentiated
reductions never batch wrongly), `custom_vmap` (a batch dim becomes tokens), then the choice fused or plain, which
is made from the shape that is left, with a note for `report.explain`.

Backward, with g = d_normed * (b + w), inv = rsqrt(mean(s^2) + eps) and s the new residual:

    ds = d_residual + inv * g - s * inv^3 * mean(g * s),    dw = sum over tokens of d_normed * s * inv

`ds` is the gradient of the residual, and of every rank's partial sum: there it is made varying when the results
are known to be equal on all ranks (`check_vma=True`), and summed over ranks when they are not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jax_bridge import plain
from jax_bridge.axes import AxisName, axes_of
from jax_bridge.communicator import Communicator
from jax_bridge.kernels.add_norm import add_norm
from jax_bridge.report import CallRecord, note
from jax_bridge.varying import vary_over, varying_axes
from shared_config import BatchAnswer

Sequence = jax.Array | None  # int32 [1], see `order.CallOrder`


@dataclass(frozen=True)
class Reduction:
    """What is fixed when a reduction is traced. `communicator` is None, with the reason, where nothing can fuse.

    `checked`: types say over which axes values vary. `alike`: the results are the same on all ranks of the group,
    and their types say so. `in_place`: the new residual takes over the old one's buffer. `compiled`: add and norm are
    one kernel where the sum is not fused with them.
    """

    axis_name: AxisName
    side: str
    communicator: Communicator | None
    reason: str
    checked: bool
    alike: bool
    eps: float = 0.0
    weight_bias: float = 0.0
    in_place: bool = False
    compiled: bool = False

    def answer(self, x: jax.Array) -> BatchAnswer:
        """Whether a reduction of `x [..., D]` is fused."""
        if self.communicator is None:
            return BatchAnswer(False, self.reason)
        return self.communicator.answer(x.shape, x.dtype, side=self.side)

    @property
    def pinned_order(self) -> bool:
        return self.communicator is not None and self.communicator.decision.deterministic


def _noted(call: Reduction, op: str, x: jax.Array) -> tuple[jax.Array, bool]:
    """`x` with a note of what becomes of it, and whether it is fused. What reduces nothing leaves no note."""
    answer = call.answer(x)
    if jax.lax.axis_size(call.axis_name) == 1 or x.size == 0:
        return x, False
    record = CallRecord(op, call.axis_name, x.shape, str(x.dtype), answer.fuses, answer.reason)
    return note(x, record), answer.fuses


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _norm(
    call: Reduction,
    in_place: bool,
    partial: jax.Array,
    residual: jax.Array,
    weight: jax.Array,
    sequence: Sequence,
) -> tuple[jax.Array, jax.Array, Sequence]:
    partial, fuses = _noted(call, "allreduce_residual_rmsnorm", partial)
    if not fuses:
        total = plain.allreduce(partial, call.axis_name, call.pinned_order)
        return *_add_rmsnorm(call, total, residual, weight), sequence
    assert call.communicator is not None
    new_residual, normed, next_sequence = call.communicator.transport.allreduce_residual_rmsnorm(
        _rows(partial),
        _rows(residual),
        weight,
        sequence,
        eps=call.eps,
        weight_bias=call.weight_bias,
        in_place=in_place,
    )
    axes = varying_axes(residual)
    return (
        vary_over(new_residual.reshape(partial.shape), axes),
        vary_over(normed.reshape(partial.shape), axes),
        _like_before(next_sequence, sequence),
    )


def _add_rmsnorm(
    call: Reduction, total: jax.Array, residual: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    if not call.compiled:
        return plain.add_rmsnorm(total, residual, weight, call.eps, call.weight_bias)
    stream, normed = add_norm(_rows(total), _rows(residual), weight, call.eps, call.weight_bias)
    return stream.reshape(total.shape), normed.reshape(total.shape)


def _batchable_norm(call: Reduction, in_place: bool) -> Callable[..., Any]:
    norm = custom_vmap(functools.partial(_norm, call, in_place))

    @norm.def_vmap
    def rule(
        axis_size: int,
        in_batched: list[bool],
        partial: jax.Array,
        residual: jax.Array,
        weight: jax.Array,
        sequence: Sequence,
    ) -> tuple[Any, Any]:
        partial_batched, residual_batched, weight_batched, sequence_batched = in_batched
        _reject_batched(sequence_batched)
        partial = partial if partial_batched else _repeat(partial, axis_size)
        residual = residual if residual_batched else _repeat(residual, axis_size)
        batched = (True, True, None if sequence is None else False)
        if not weight_batched:
            return norm(partial, residual, weight, sequence), batched

        # A weight of its own for each element: one launch each, ordered by the loop.
        def step(sequence: Sequence, operands: tuple[jax.Array, ...]) -> tuple[Sequence, tuple[Any, Any]]:
            new_residual, normed, sequence = norm(*operands, sequence)
            return sequence, (new_residual, normed)

        sequence, outputs = jax.lax.scan(step, sequence, (partial, residual, weight))
        return (*outputs, sequence), batched

    return norm


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def allreduce_residual_rmsnorm(
    call: Reduction, partial: jax.Array, residual: jax.Array, weight: jax.Array, sequence: Sequence
) -> tuple[jax.Array, jax.Array, Sequence]:
    """-> (residual, normed, sequence). Operands are validated; residual and weight vary over the same axes."""
    return _batchable_norm(call, call.in_place)(partial, residual, weight, sequence)


def _norm_forward(
    call: Reduction, partial: jax.Array, residual: jax.Array, weight: jax.Array, sequence: Sequence
) -> tuple[Any, Any]:
    # Not in place: the residual that comes in is what the call before this one has saved for its own backward.
    outputs = _batchable_norm(call, in_place=False)(partial, residual, weight, sequence)
    return outputs, (outputs[0], weight)


def _norm_backward(call: Reduction, saved: tuple[jax.Array, jax.Array], cotangents: Any) -> tuple[Any, ...]:
    new_residual, weight = saved
    d_residual, d_normed, _ = cotangents
    s = new_residual.astype(jnp.float32)
    d_out = d_normed.astype(jnp.float32)
    inv = jax.lax.rsqrt(jnp.mean(s * s, axis=-1, keepdims=True) + jnp.float32(call.eps))
    g = d_out * (jnp.float32(call.weight_bias) + weight.astype(jnp.float32))
    ds = d_residual.astype(jnp.float32) + inv * g - s * inv**3 * jnp.mean(g * s, axis=-1, keepdims=True)
    dw = jnp.sum((d_out * s * inv).reshape(-1, weight.shape[-1]), axis=0)
    ds = ds.astype(new_residual.dtype)
    return _to_every_rank(call, ds), ds, dw.astype(weight.dtype), None


allreduce_residual_rmsnorm.defvjp(_norm_forward, _norm_backward)


def _sum(call: Reduction, partial: jax.Array, sequence: Sequence) -> tuple[jax.Array, Sequence]:
    partial, fuses = _noted(call, "allreduce", partial)
    if not fuses:
        return plain.allreduce(partial, call.axis_name, call.pinned_order), sequence
    assert call.communicator is not None
    total, next_sequence = call.communicator.transport.allreduce(_rows(partial), sequence)
    axes = varying_axes(partial) - set(axes_of(call.axis_name))
    return vary_over(total.reshape(partial.shape), axes), _like_before(next_sequence, sequence)


def _batchable_sum(call: Reduction) -> Callable[..., Any]:
    total = custom_vmap(functools.partial(_sum, call))

    @total.def_vmap
    def rule(
        axis_size: int, in_batched: list[bool], partial: jax.Array, sequence: Sequence
    ) -> tuple[Any, Any]:
        del axis_size
        _reject_batched(in_batched[1])
        return total(partial, sequence), (True, None if sequence is None else False)

    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def allreduce(call: Reduction, partial: jax.Array, sequence: Sequence) -> tuple[jax.Array, Sequence]:
    """-> (sum over the axis, sequence)."""
    return _batchable_sum(call)(partial, sequence)


def _sum_forward(call: Reduction, partial: jax.Array, sequence: Sequence) -> tuple[Any, None]:
    return _batchable_sum(call)(partial, sequence), None


def _sum_backward(call: Reduction, _saved: None, cotangents: Any) -> tuple[jax.Array, None]:
    return _to_every_rank(call, cotangents[0]), None


allreduce.defvjp(_sum_forward, _sum_backward)


def sum_for_norm(call: Reduction, partial: jax.Array) -> jax.Array:
    """The sum over the axis as the first of a norm's three unfused steps, and counted as that norm's reduction."""
    partial, fuses = _noted(call, "allreduce_residual_rmsnorm", partial)
    assert not fuses  # the decision refuses where rows of several ranks were gathered
    return plain.allreduce(partial, call.axis_name, call.pinned_order)


def _to_every_rank(call: Reduction, cotangent: jax.Array) -> jax.Array:
    """The gradient of a partial sum from the gradient of the sum."""
    if not call.alike:
        cotangent = jax.lax.psum(cotangent, call.axis_name)
    return vary_over(cotangent, axes_of(call.axis_name)) if call.checked else cotangent


def _like_before(after: Sequence, before: Sequence) -> Sequence:
    """A sequence number keeps its type, so that loops can carry it."""
    return after if after is None or before is None else vary_over(after, varying_axes(before))


def _repeat(x: jax.Array, times: int) -> jax.Array:
    return jnp.broadcast_to(x, (times, *x.shape))


def _reject_batched(sequence_batched: Any) -> None:
    if sequence_batched:
        raise ValueError(
            "a CallOrder cannot be batched by vmap: it is one order on each device; close over it instead"
        )
