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

from core_torch.kernels.choice import NOT_ASKED, Answers, KernelOptions
from core_torch.kernels.vocabulary import check_vocabulary
from jax_bridge.kernels.vocabulary import best_entries, largest_keys, largest_keys_plain
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
    """hidden [T, D] -> logits [T, V], gathered from the axis; every rank has them all.

    `local`, this rank's logits [T, W], is enough for `argmax`, which gathers two numbers a row and rank.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, axis: ReduceAxis, tied: VocabParallelEmbedding | None
    ) -> None:
        _, self.rows = vocab_share(vocab_size, 0, axis.size)
        self.vocab_size, self.axis = vocab_size, axis
        self.weight = parameter(self.rows, hidden_size, split={0: axis}) if tied is None else tied.weight
        self.compiled = NOT_ASKED

    def choose_kernels(self, options: KernelOptions) -> Answers:
        self.compiled = options.ask("vocabulary", check_vocabulary, hidden_size=self.weight.shape[1])
        return {"vocabulary": self.compiled}

    def __call__(self, hidden: Float[Array, "T D"]) -> Float[Array, "T V"]:
        return self.gather(self.local(hidden))

    def local(self, hidden: Float[Array, "T D"]) -> Float[Array, "T W"]:
        return linear(hidden, self.weight[...])

    def gather(self, local: Float[Array, "T W"]) -> Float[Array, "T V"]:
        parts = jax.lax.all_gather(local, self.axis.name, axis=1, tiled=True, to="invarying")
        return parts[:, : self.vocab_size]

    def argmax(self, local: Float[Array, "T W"]) -> Int32[Array, " T"]:
        """local [T, W] of every rank -> the token [T] with the largest logit, of equal ones the first; alike on all."""
        if self.rows * self.axis.size > self.vocab_size:  # the last ranks' entries may be padding
            entry = self.axis.rank() * self.rows + jnp.arange(self.rows, dtype=jnp.int32)
            local = jnp.where(entry < self.vocab_size, local, jnp.asarray(-jnp.inf, local.dtype))
        keys = (largest_keys if self.compiled.usable else largest_keys_plain)(local)
        every = jax.lax.all_gather(keys[None], self.axis.name, tiled=True, to="invarying")
        return best_entries(every, self.rows)
