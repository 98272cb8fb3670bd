"""What runs on every device of the mesh: one pass with its sampling, or a loop of greedy decode steps.

Shapes: S sequences, L rows whose logits are wanted, V vocabulary. Each function is one device's side of a program
(`ModelRunner.program`); outputs are alike on all devices.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_bridge.batch import Batch
from jax_bridge.cache import LayerCache
from jax_bridge.models.qwen3_next import Qwen3Next
from jax_bridge.sampler import Choice, greedy, sample


def run_pass(
    model: Qwen3Next, cache: list[LayerCache], inputs: tuple[Batch, Choice | None]
) -> tuple[tuple[jax.Array, jax.Array], list[LayerCache]]:
    """((logits [L, V], tokens [S]), cache)."""
    batch, choice = inputs
    logits, cache = model(batch, cache)
    rows = logits[batch.sample_rows]
    return (logits, greedy(rows) if choice is None else sample(rows, choice)), cache


def run_loop(
    model: Qwen3Next,
    cache: list[LayerCache],
    inputs: tuple[Batch, jax.Array, jax.Array, jax.Array],
    *,
    eos: tuple[int, ...],
    page_size: int,
    most: int,
) -> tuple[tuple[jax.Array, jax.Array], list[LayerCache]]:
    """((tokens [most, S], how many rows of them were filled), cache).

    The inputs: the first step's batch, how many steps to run (at most `most`), which rows end at an `eos` token [S],
    and which have ended before they begin [S].
    """
    first, steps, ends, ended = inputs

    def goes_on(state: tuple[Any, ...]) -> jax.Array:
        count, ended = state[0], state[1]
        return (count < steps) & ~jnp.all(ended)

    def one_step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        count, ended, batch, cache, tokens = state
        chosen, cache = model.best_tokens(batch, cache)
        ended = ended | (ends & jnp.isin(chosen, jnp.asarray(eos, jnp.int32)))
        return count + 1, ended, batch.next_token(chosen, page_size), cache, tokens.at[count].set(chosen)

    tokens = jnp.zeros((most, first.sample_rows.shape[0]), jnp.int32)
    state = (jnp.int32(0), ended, first, cache, tokens)
    count, _, _, cache, tokens = jax.lax.while_loop(goes_on, one_step, state)
    return (tokens, count), cache


@jax.jit
def logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """logits [T, V], targets [T] -> the log-probability of each [T]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), targets[:, None], axis=-1)[:, 0]
