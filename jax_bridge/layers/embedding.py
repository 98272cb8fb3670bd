"""The vocabulary, split over the ranks: token embedding and output head.

Shapes: T tokens, D hidden, V vocabulary, W this rank's rows of it (the last rank's may be padding).
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jax_bridge.layers.linear import linear
from jax_bridge.layers.parameter import parameter
from jax_bridge.op import allreduce
from jax_bridge.partial_sum import ReduceAxis
from shared_config.checkpoint import vocab_share


class VocabParallelEmbedding(nnx.Module):
    """token_ids [T] -> [T, D], summed over the axis."""

    def __init__(self, vocab_size: int, hidden_size: int, axis: ReduceAxis) -> None:
        _, self.rows = vocab_share(vocab_size, 0, axis.size)
        self.axis = axis
        self.weight = parameter(self.rows, hidden_size, split={0: axis})

    def __call__(self, token_ids: Int32[Array, " T"]) -> Float[Array, "T D"]:
        local = token_ids - self.axis.rank() * self.rows
        mine = (local >= 0) & (local < self.rows)
        out = self.weight[...][jnp.where(mine, local, 0)]
        part = jnp.where(mine[:, None], out, jnp.zeros_like(out))
        return allreduce(part, axis_name=self.axis.name, comm=self.axis.comm)


class ParallelHead(nnx.Module):
    """hidden [T, D] -> logits [T, V], gathered from the axis; every rank has them all."""

    def __init__(
        self, vocab_size: int, hidden_size: int, axis: ReduceAxis, tied: VocabParallelEmbedding | None
    ) -> None:
        _, rows = vocab_share(vocab_size, 0, axis.size)
        self.vocab_size, self.axis = vocab_size, axis
        self.weight = parameter(rows, hidden_size, split={0: axis}) if tied is None else tied.weight

    def __call__(self, hidden: Float[Array, "T D"]) -> Float[Array, "T V"]:
        local = linear(hidden, self.weight[...])
        parts = jax.lax.all_gather(local, self.axis.name, axis=1, tiled=True, to="invarying")
        return parts[:, : self.vocab_size]
