"""Qwen3-Next: which layer follows which, and where each owed sum is paid.

The residual stream and the debt travel together: a layer returns the residual and the sum that its MLP still owes;
the next layer's input norm, or the final norm, pays it. Two reductions a layer, none outside a norm. Where a MoE slice
works on the rows of several attention pieces they are gathered before it, and its sum is paid and scattered after it.

Shapes: R rows of this rank, D hidden, V vocabulary, L rows whose logits are wanted.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jax_bridge.axes import MeshAxis
from jax_bridge.batch import Batch
from jax_bridge.cache import LayerCache
from jax_bridge.layers.attention import GatedAttention
from jax_bridge.layers.embedding import ParallelHead, VocabParallelEmbedding
from jax_bridge.layers.gated_delta_net import GatedDeltaNet
from jax_bridge.layers.mlp import MLP, SparseMoE
from jax_bridge.layers.norm import RMSNorm
from jax_bridge.partial_sum import PartialSum, ReduceAxis
from jax_bridge.pieces import Pieces
from shared_config.model import Qwen3NextConfig


class DecoderLayer(nnx.Module):
    """One mixer and one MLP, each after a norm that pays what came before."""

    def __init__(
        self,
        config: Qwen3NextConfig,
        index: int,
        attention: ReduceAxis,
        mlp: ReduceAxis,
        experts: MeshAxis,
        pieces: Pieces,
    ) -> None:
        self.pieces = pieces
        mixer = GatedAttention if config.layer_types[index] == "full_attention" else GatedDeltaNet
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = mixer(config, attention, pieces.context)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (
            SparseMoE(config, mlp, experts)
            if config.is_moe_layer(index)
            else MLP(config, config.intermediate_size, mlp, "intermediate_size")
        )

    def __call__(
        self, owed: PartialSum | None, residual: jax.Array, real: jax.Array, batch: Batch, cache: LayerCache
    ) -> tuple[PartialSum, jax.Array, LayerCache]:
        """`real`: which of the MoE's rows are tokens."""
        if owed is None:  # the first layer: the embedding owes nothing
            normed = self.input_layernorm(residual)
        else:
            residual, normed = self.input_layernorm.pay(owed, residual)
        mixed, cache = self.mixer(normed, batch, cache)  # type: ignore[arg-type]  (the config pairs them)
        residual, normed = self.post_attention_layernorm.pay(mixed, residual)
        rows = self.pieces.gather(normed, batch)
        owed = self.mlp(rows, real) if isinstance(self.mlp, SparseMoE) else self.mlp(rows)
        return self.pieces.scatter(owed, batch), residual, cache


class Qwen3Next(nnx.Module):
    """token ids -> logits, for one rank; `attention` and `mlp` are the axes that owe the layers' sums, `experts` holds
    blocks of experts, `pieces` is how rows get from one to the other."""

    def __init__(
        self,
        config: Qwen3NextConfig,
        attention: ReduceAxis,
        mlp: ReduceAxis,
        experts: MeshAxis,
        pieces: Pieces,
    ) -> None:
        self.pieces = pieces
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, attention)
        self.layers = nnx.List(
            [
                DecoderLayer(config, i, attention, mlp, experts, pieces)
                for i in range(config.num_hidden_layers)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelHead(config.vocab_size, config.hidden_size, attention, tied)

    def __call__(
        self, batch: Batch, caches: list[LayerCache]
    ) -> tuple[Float[Array, "L V"], list[LayerCache]]:
        """Logits [L, V] in float32 of `batch.logit_rows`, and the new caches."""
        hidden, caches = self.hidden_states(batch, caches)
        return self.lm_head(hidden).astype(jnp.float32), caches

    def best_tokens(
        self, batch: Batch, caches: list[LayerCache]
    ) -> tuple[Int32[Array, " L"], list[LayerCache]]:
        """The token with the largest logit of each of `batch.logit_rows`, and the new caches; gathers no logits."""
        hidden, caches = self.hidden_states(batch, caches)
        return self.lm_head.argmax(self.lm_head.local(hidden)), caches

    def hidden_states(
        self, batch: Batch, caches: list[LayerCache]
    ) -> tuple[Float[Array, "L D"], list[LayerCache]]:
        """What the head takes, of `batch.logit_rows`, and the new caches."""
        PartialSum.open_debts = 0  # a trace that failed half-way owes nothing any more
        owed: PartialSum | None = None
        residual = self.embed_tokens(self.pieces.cut(batch.token_ids, batch))
        real = self.pieces.gather(self.pieces.cut(batch.real, batch), batch)
        updated: list[LayerCache] = []
        for layer, cache in zip(self.layers, caches, strict=True):
            owed, residual, cache = layer(owed, residual, real, batch, cache)
            updated.append(cache)
        assert owed is not None  # a config has at least one layer
        _, hidden = self.norm.pay(owed, residual)
        PartialSum.check_settled()
        return self.pieces.pick(hidden, batch), updated
