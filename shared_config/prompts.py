"""From what a user passes to `generate` to requests: one prompt or many, text or token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shared_config.generation import Request
from shared_config.sampling import SamplingParams

Prompt = str | Sequence[int]


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt (a text, or token ids) as a batch of one. Raises TypeError for a mixture."""
    if isinstance(prompts, str):
        return [prompts]
    ids = [p for p in prompts if isinstance(p, int)]
    if ids and len(ids) == len(prompts):
        return [ids]
    batch = [p for p in prompts if not isinstance(p, int)]
    if len(batch) != len(prompts):
        raise TypeError("prompts mixes token ids with prompts; give one list of ids, or a list of prompts")
    return batch


def build_requests(
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    *,
    encode: Callable[[str], list[int]],
    vocab_size: int,
    fresh_seed: Callable[[], int],
) -> list[Request]:
    """A request for each prompt, with its own params or the common ones; one without a seed gets a fresh one.

    Raises ValueError for a wrong number of params and for a token id outside the vocabulary.
    """
    batch = as_batch(prompts)
    params = SamplingParams() if params is None else params
    many = [params] * len(batch) if isinstance(params, SamplingParams) else list(params)
    if len(many) != len(batch):
        raise ValueError(
            f"params has {len(many)} entries for {len(batch)} prompts; give one, or one for each"
        )
    requests = []
    for index, (prompt, one) in enumerate(zip(batch, many, strict=True)):
        text = prompt if isinstance(prompt, str) else None
        ids = encode(prompt) if isinstance(prompt, str) else [int(t) for t in prompt]
        outside = [t for t in ids if not 0 <= t < vocab_size]
        if outside:
            raise ValueError(
                f"prompts[{index}] has token id {outside[0]}, outside the vocabulary of {vocab_size}"
            )
        requests.append(Request(index, text, ids, one, fresh_seed() if one.seed is None else one.seed))
    return requests
