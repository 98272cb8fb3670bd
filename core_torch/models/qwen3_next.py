"""Qwen3-Next: which layer follows which, and where each owed sum is paid.

The residual stream and the debt travel together: a layer returns the residual and the sum that its MLP still owes;
the next layer's input norm, or the final norm, pays it. Two reductions a layer, none outside a norm, unless the MoE
works on the rows of several attention pieces (`Pieces`): those are gathered, and its sum is paid at once.

Shapes: R rows of this rank, D hidden, V vocabulary, L rows whose logits are wanted.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from core_torch.batch import Batch
from core_torch.cache import LayerCache
from core_torch.kernels.allreduce import ReduceGroup
from core_torch.layers.attention import GatedAttention
from core_torch.layers.embedding import ParallelHead, VocabParallelEmbedding
from core_torch.layers.gated_delta_net import GatedDeltaNet
from core_torch.layers.mlp import MLP, SparseMoE
from core_torch.layers.norm import RMSNorm
from core_torch.partial_sum import PartialSum
from core_torch.pieces import Pieces
from shared_config.model import Qwen3NextConfig


class DecoderLayer(nn.Module):
    """One mixer and one MLP, each after a norm that pays what came before."""

    def __init__(
        self,
        config: Qwen3NextConfig,
        index: int,
        attention: ReduceGroup,
        mlp: ReduceGroup,
        pieces: Pieces,
    ) -> None:
        super().__init__()
        self.pieces = pieces
        mixer = GatedAttention if config.layer_types[index] == "full_attention" else GatedDeltaNet
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = mixer(config, attention, pieces.context)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (
            SparseMoE(config, mlp, pieces.layout.ep_size)
            if config.is_moe_layer(index)
            else MLP(config, config.intermediate_size, mlp, "intermediate_size")
        )
        self.mixer.ahead += (self.mlp.gate if isinstance(self.mlp, SparseMoE) else self.mlp.gate_up_proj,)

    def forward(
        self, owed: PartialSum | None, residual: torch.Tensor, batch: Batch, cache: LayerCache
    ) -> tuple[PartialSum, torch.Tensor]:
        if owed is None:  # the first layer: the embedding owes nothing
            normed = self.input_layernorm(residual)
        else:
            residual, normed = self.input_layernorm.pay(owed, residual)
        residual, normed = self.post_attention_layernorm.pay(self.mixer(normed, batch, cache), residual)
        return self.pieces.scatter(self.mlp(self.pieces.gather(normed, batch)), batch), residual


class Qwen3Next(nn.Module):
    """token ids -> logits, for one rank; `attention` and `mlp` are the groups that owe the layers' sums, `pieces` how
    rows get from one to the other."""

    def __init__(
        self, config: Qwen3NextConfig, attention: ReduceGroup, mlp: ReduceGroup, pieces: Pieces
    ) -> None:
        super().__init__()
        self.config, self.attention, self.mlp, self.pieces = config, attention, mlp, pieces
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, attention)
        layers = [DecoderLayer(config, i, attention, mlp, pieces) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        for layer, following in pairwise(layers):
            if isinstance(layer.mlp, SparseMoE):
                layer.mlp.ahead = (following.mixer.in_proj,)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelHead(config.vocab_size, config.hidden_size, attention, tied)

    def forward(self, batch: Batch, caches: list[LayerCache]) -> torch.Tensor:
        """Logits [L, V] in float32 of `batch.logit_rows`, on every rank; the caches are updated in place."""
        return self.lm_head(self.hidden_states(batch, caches)).float()

    def hidden_states(self, batch: Batch, caches: list[LayerCache]) -> torch.Tensor:
        """What the head takes [L, D], of `batch.logit_rows`, on every rank; the caches are updated in place."""
        PartialSum.open_debts = 0  # a pass that failed half-way owes nothing any more
        owed: PartialSum | None = None
        residual = self.embed_tokens(batch.token_ids)
        for layer, cache in zip(self.layers, caches, strict=True):
            owed, residual = layer(owed, residual, batch, cache)
        assert owed is not None  # a config has at least one layer
        _, hidden = self.norm.pay(owed, residual)
        PartialSum.check_settled()
        return self.pieces.pick(hidden, batch)
