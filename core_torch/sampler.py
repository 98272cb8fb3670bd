"""Choose the next tokens from logits.

Shapes: B sequences, V vocabulary. Each row has its own temperature, top_k, top_p and one uniform number, so a
request's tokens depend on its logits and its seed, never on what runs beside it.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from shared_config.sampling import uniform
from shared_config.scheduler import Sequence


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    draws: torch.Tensor,
) -> torch.Tensor:
    """logits [B, V] float32 and [B] parameters -> token ids [B]; temperature 0 takes the first maximum.

    Tokens are sorted by falling probability, cut to top_k, then to the shortest prefix whose mass reaches top_p,
    and the draw in [0, 1) is inverted through what is left.
    """
    greedy = temperature == 0
    scaled = logits / torch.where(greedy, 1.0, temperature)[:, None]
    ordered, tokens = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    limit = torch.where(top_k == 0, logits.shape[-1], top_k)
    ordered = ordered.masked_fill(rank >= limit[:, None], 0)
    mass = ordered.sum(-1, keepdim=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= top_p[:, None] * mass, 0)
    cumulative = ordered.cumsum(-1)
    threshold = draws[:, None] * cumulative[:, -1:]
    # A draw just below 1 may round to 1 in float32: it still takes the last token that is left.
    last = (ordered > 0).sum(-1, keepdim=True) - 1
    choice = (cumulative <= threshold).sum(-1, keepdim=True).minimum(last)
    drawn = tokens.gather(-1, choice)[:, 0]
    return torch.where(greedy, logits.argmax(-1), drawn)


def sample_sequences(logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> torch.Tensor:
    """`sample` with each sequence's own parameters; row i of logits [B, V] belongs to `sequences[i]`."""
    if all(s.params.temperature == 0 for s in sequences):
        return logits.argmax(-1)

    def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)

    return sample(
        logits,
        column([s.params.temperature for s in sequences], torch.float32),
        column([s.params.top_k for s in sequences], torch.int64),
        column([s.params.top_p for s in sequences], torch.float32),
        column([uniform(s.seed, len(s.tokens)) for s in sequences], torch.float32),
    )
