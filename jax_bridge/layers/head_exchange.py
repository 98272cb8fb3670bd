"""Context parallelism inside a mixer: its rows are traded for heads, and back.

`core_torch.layers.head_exchange` says why this way, and what the other one would cost.

Shapes: R rows of this rank, T of its pass (cp R in prefill, R in decode), W columns of all heads, w of own heads.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_bridge.axes import MeshAxis
from jax_bridge.batch import Batch
from shared_config.checkpoint import head_share


class HeadExchange:
    """`parts`: (heads, columns of one head) of each component of a projection's output, over all heads.

    `heads` and `sizes` are this rank's heads and columns of each component. KV heads that are fewer than the ranks are
    replicated. Everything that the core reads is traded, gates too, so that the core needs to know nothing of it.
    """

    def __init__(self, context: MeshAxis, parts: list[tuple[int, int]]) -> None:
        self.context, self.parts = context, tuple(parts)
        self.heads = tuple(len(head_share(heads, 0, context.size, "heads")) for heads, _ in parts)
        self.sizes = tuple(own * width for own, (_, width) in zip(self.heads, parts, strict=True))

    def to_heads(self, x: Float[Array, "R W"], batch: Batch) -> Float[Array, "T w"]:
        """In prefill from this rank's rows, in decode from those that all context-parallel ranks hold."""
        size = self.context.size
        if size == 1:
            return x
        columns = []
        all_sizes = tuple(heads * width for heads, width in self.parts)
        for part, (heads, width) in zip(split_sizes(x, all_sizes), self.parts, strict=True):
            each = part.reshape(-1, heads, width)
            if heads < size:
                each = jnp.repeat(each, size // heads, axis=1)
            columns.append(each.reshape(len(each), size, -1))
        shares = jnp.concatenate(columns, axis=-1)  # [R, cp, w]
        if batch.is_decode:
            return jax.lax.dynamic_index_in_dim(shares, self.context.rank(), axis=1, keepdims=False)
        return jax.lax.all_to_all(shares, self.context.name, split_axis=1, concat_axis=0, tiled=True)[:, 0]

    def to_rows(self, out: Float[Array, "T v"], batch: Batch) -> Float[Array, "R cp*v"]:
        """Of own heads -> of all heads."""
        if self.context.size == 1:
            return out
        if batch.is_decode:
            return jax.lax.all_gather(out, self.context.name, axis=1, tiled=True, to="invarying")
        return jax.lax.all_to_all(out, self.context.name, split_axis=0, concat_axis=1, tiled=True)


def split_sizes(x: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    """x [..., sum(sizes)] -> one array for each size."""
    return jnp.split(x, list(itertools.accumulate(sizes[:-1])), axis=-1)
