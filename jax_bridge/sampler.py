"""Choose the next tokens from logits.

Shapes: S sequences, V vocabulary. Each row has its own temperature, top_k, top_p and one uniform number, so a
request's tokens depend on its logits and its seed, never on what runs beside it. The uniform numbers are those of
PyTorch's engine: a seeded request may differ between the frameworks only where rounding moves a token across the
boundary that its draw falls next to.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from shared_config.sampling import uniform
from shared_config.scheduler import Sequence


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """How each row chooses; temperature 0 takes the first maximum."""

    temperature: Float32[Array, " S"]
    top_k: Int32[Array, " S"]
    top_p: Float32[Array, " S"]
    draws: Float32[Array, " S"]


def greedy(logits: Float32[Array, "S V"]) -> Int32[Array, " S"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sample(logits: Float32[Array, "S V"], choice: Choice) -> Int32[Array, " S"]:
    """Tokens are sorted by falling probability, cut to top_k, then to the shortest prefix whose mass reaches top_p,
    and the draw in [0, 1) is inverted through what is left."""
    V = logits.shape[-1]
    is_greedy = choice.temperature == 0
    scaled = logits / jnp.where(is_greedy, jnp.float32(1), choice.temperature)[:, None]
    probabilities = jax.nn.softmax(scaled, axis=-1)
    tokens = jnp.argsort(-probabilities, axis=-1, stable=True)
    ordered = jnp.take_along_axis(probabilities, tokens, axis=-1)
    limit = jnp.where(choice.top_k == 0, V, choice.top_k)
    ordered = jnp.where(jnp.arange(V, dtype=jnp.int32) < limit[:, None], ordered, jnp.float32(0))
    mass = jnp.sum(ordered, axis=-1, keepdims=True)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    ordered = jnp.where(before < choice.top_p[:, None] * mass, ordered, jnp.float32(0))
    cumulative = jnp.cumsum(ordered, axis=-1)
    threshold = choice.draws[:, None] * cumulative[:, -1:]
    # A draw that float32 rounds up to 1 would pass every token: the last one that is left takes it.
    last = jnp.sum(ordered > 0, axis=-1, keepdims=True, dtype=jnp.int32) - 1
    index = jnp.minimum(jnp.sum(cumulative <= threshold, axis=-1, keepdims=True, dtype=jnp.int32), last)
    drawn = jnp.take_along_axis(tokens, index, axis=-1)[:, 0].astype(jnp.int32)
    return jnp.where(is_greedy, greedy(logits), drawn)


def choice_of(sequences: SequenceOf[Sequence], rows: int) -> Choice | None:
    """The parameters of each sequence, padded to `rows` with greedy ones; None when all are greedy."""
    if all(s.params.temperature == 0 for s in sequences):
        return None
    columns = np.zeros((4, rows), np.float32)
    columns[2] = 1.0
    for row, s in enumerate(sequences):
        columns[:, row] = s.params.temperature, s.params.top_k, s.params.top_p, uniform(s.seed, len(s.tokens))
    temperature, top_k, top_p, draws = columns
    return Choice(temperature, top_k.astype(np.int32), top_p, draws)  # type: ignore[arg-type]  (host arrays)
