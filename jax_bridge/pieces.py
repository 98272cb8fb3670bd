"""How rows travel between the ranks of a layout that hold different ones. Nothing is owed among them.

An attention piece is the attention-TP ranks of one (dp, cp), which hold the same rows. Where a MoE slice spans several
pieces their rows are gathered before the MoE; its sum is then paid at once and each rank takes its own rows of it.

Shapes: R rows of this rank, G ranks of a gather, T rows of a pass, D hidden, L rows whose logits are wanted.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jax_bridge.axes import MeshAxis
from jax_bridge.batch import Batch
from jax_bridge.op import sum_for_norm
from jax_bridge.partial_sum import PartialSum, ReduceAxis
from shared_config import ParallelLayout

NOBODY = ReduceAxis((), 1, "mlp")  # owes what was paid already


@dataclass(frozen=True)
class Pieces:
    """The axes that rows travel along: `context` are the ranks that share a pass and split the mixers' heads, `data`
    those whose passes are of other sequences, `prefill` and `decode` those whose rows the MoE needs beside its own,
    `everyone` one rank of each piece."""

    layout: ParallelLayout
    context: MeshAxis
    data: MeshAxis
    prefill: MeshAxis
    decode: MeshAxis
    everyone: MeshAxis

    def cut(self, rows: Shaped[Array, " T"], batch: Batch) -> Shaped[Array, " R"]:
        """This rank's rows of its pass: a piece in prefill, in decode all."""
        return rows if batch.is_decode else self.context.own_rows(rows)

    def gather(self, x: Shaped[Array, "R ..."], batch: Batch) -> Shaped[Array, "G*R ..."]:
        """This rank's rows -> all rows that its MoE slice works on, by piece."""
        return self._gathers(batch).all_rows(x)

    def scatter(self, owed: PartialSum, batch: Batch) -> PartialSum:
        """The MoE's debt over gathered rows, paid at once, unfused: this rank's own rows [R, D], owed by nobody.

        Where a slice works on one piece alone the debt stays what it is, for the next norm to pay.
        """
        if self.layout.pieces_per_slice == 1:
            return owed
        total = sum_for_norm(owed.take(), owed.axis.name, comm=owed.axis.comm, side=owed.axis.side)
        return PartialSum(self._gathers(batch).own_rows(total), NOBODY)

    def pick(self, hidden: Float[Array, "R D"], batch: Batch) -> Float[Array, "L D"]:
        """The rows whose logits are wanted, on every rank, whichever holds them."""
        holders = self.data if batch.is_decode else self.everyone
        if holders.size == 1:
            return hidden[batch.logit_rows]
        local = batch.logit_rows - holders.rank() * hidden.shape[0]
        mine = (local >= 0) & (local < hidden.shape[0])
        rows = jnp.where(mine[:, None], hidden[jnp.where(mine, local, 0)], jnp.zeros((), hidden.dtype))
        return jax.lax.psum(rows, holders.name)  # exact: every rank but one adds zero

    def _gathers(self, batch: Batch) -> MeshAxis:
        return self.decode if batch.is_decode else self.prefill
