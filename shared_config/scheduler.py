"""Continuous batching: which tokens of which requests the next step runs. Pure values, no framework.

A request waits until a state slot and all the pages that it can ever need are free (prompt + max_tokens), then
prefills in chunks and decodes with the others. Because its pages are reserved on admission nothing is ever evicted.
Page 0 and slot 0 belong to nobody: they take the writes of padding rows.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from shared_config.sampling import SamplingParams


@dataclass
class Sequence:
    """A request under way. `computed` tokens are in the cache; `pages` and `slot` are its places there."""

    index: int
    prompt: list[int]
    params: SamplingParams
    seed: int = 0
    output: list[int] = field(default_factory=list)
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    @property
    def prefilling(self) -> bool:
        return self.computed < len(self.prompt)

    def dp_rank(self, attn_dp_size: int) -> int:
        """The attention data-parallel rank that runs this sequence's attention and holds its cache."""
        return self.index % attn_dp_size


@dataclass(frozen=True)
class Chunk:
    """`num_tokens` tokens of `sequence` from position `start`; `samples` when its last token's logits are used."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True)
class Step:
    """One forward pass: prompt chunks (`prefill`), or one token of each running sequence."""

    prefill: bool
    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class Scheduler:
    """Admits, orders and releases sequences.

    num_pages and num_slots count the ones that can be handed out (page 0 and slot 0 come on top). A step holds at
    most `max_step_tokens` prompt tokens; with `one_prefill_at_a_time` they are one sequence's. Each of the
    `attn_dp_size` attention-DP ranks has a cache of its own of num_pages pages; slots are numbered over all.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        num_slots: int,
        max_step_tokens: int,
        max_model_len: int,
        one_prefill_at_a_time: bool = False,
        attn_dp_size: int = 1,
    ) -> None:
        self.num_pages, self.page_size, self.max_step_tokens = num_pages, page_size, max_step_tokens
        self.max_model_len, self.one_prefill_at_a_time = max_model_len, one_prefill_at_a_time
        self._free_pages = [deque(range(1, num_pages + 1)) for _ in range(attn_dp_size)]
        self._free_slots = deque(range(1, num_slots + 1))
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._decoded_last = False

    def refusal(self, prompt_len: int, params: SamplingParams) -> str | None:
        """Why a request can never run here, or None."""
        total = prompt_len + params.max_tokens
        if prompt_len == 0:
            return "the prompt is empty; give at least one token"
        if total > self.max_model_len:
            return (
                f"prompt ({prompt_len} tokens) + max_tokens ({params.max_tokens}) = {total} exceeds max_model_len = "
                f"{self.max_model_len}; shorten the prompt, lower max_tokens or raise max_model_len"
            )
        if self._pages_for(total) > self.num_pages:
            return (
                f"prompt ({prompt_len} tokens) + max_tokens ({params.max_tokens}) needs {self._pages_for(total)} KV "
                f"pages and the cache has {self.num_pages}; give the cache more pages or shorten the request"
            )
        return None

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _pages_of(self, sequence: Sequence) -> deque[int]:
        """The free pages of the cache that is to hold `sequence`."""
        return self._free_pages[sequence.dp_rank(len(self._free_pages))]

    def add(self, sequence: Sequence) -> None:
        """Queue a request. Raises ValueError with `refusal`'s reason."""
        reason = self.refusal(len(sequence.prompt), sequence.params)
        if reason is not None:
            raise ValueError(reason)
        self.waiting.append(sequence)

    def _admit(self) -> None:
        while self.waiting and self._free_slots:
            needed = self._pages_for(len(self.waiting[0].prompt) + self.waiting[0].params.max_tokens)
            free = self._pages_of(self.waiting[0])
            if needed > len(free):
                break
            sequence = self.waiting.popleft()
            sequence.pages = [free.popleft() for _ in range(needed)]
            sequence.slot = self._free_slots.popleft()
            self.running.append(sequence)

    def next_step(self) -> Step | None:
        """The next step, or None when nothing is left. Prefill and decode steps alternate when both are possible,
        so that running requests are not starved by a queue of prompts."""
        self._admit()
        prefilling = [s for s in self.running if s.prefilling]
        decoding = [s for s in self.running if not s.prefilling]
        if prefilling and (self._decoded_last or not decoding):
            self._decoded_last = False
            return Step(True, tuple(self._prompt_chunks(prefilling)))
        if decoding:
            self._decoded_last = True
            return Step(False, tuple(Chunk(s, s.computed, 1, True) for s in decoding))
        if self.waiting:
            raise RuntimeError("requests wait, but none runs and none can be admitted")
        return None

    def _prompt_chunks(self, prefilling: list[Sequence]) -> list[Chunk]:
        budget, chunks = self.max_step_tokens, []
        for sequence in prefilling:
            count = min(budget, len(sequence.prompt) - sequence.computed)
            if count == 0 or (chunks and self.one_prefill_at_a_time):
                break
            last = sequence.computed + count == len(sequence.prompt)
            chunks.append(Chunk(sequence, sequence.computed, count, last))
            budget -= count
        return chunks

    def following(self, step: Step) -> Step | None:
        """The decode step after `step`, which has been advanced over and may still run, whatever its tokens are
        (should one end its sequence: with that sequence once more). None where that is not known yet."""
        sequences = [chunk.sequence for chunk in step.chunks]
        ends = any(s.slot == 0 or len(s.output) + 1 >= s.params.max_tokens for s in sequences)
        if step.prefill or ends or any(s.prefilling for s in self.running):
            return None
        return Step(False, tuple(Chunk(s, s.computed, 1, True) for s in sequences))

    def advance(self, step: Step) -> None:
        """Record that `step`'s tokens are in the cache."""
        for chunk in step.chunks:
            chunk.sequence.computed += chunk.num_tokens

    def finish(self, sequence: Sequence) -> None:
        """Release a sequence's pages and slot."""
        self.running.remove(sequence)
        self._pages_of(sequence).extend(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.pages, sequence.slot = [], 0

    def reset(self) -> None:
        """Drop every request, as after a failure."""
        self.waiting.clear()
        for sequence in list(self.running):
            self.finish(sequence)

    @property
    def free_pages(self) -> int:
        return sum(map(len, self._free_pages))
