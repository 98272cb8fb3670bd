"""What a request gives back, in either framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reductions:
    """How many norm reductions ran: `fused` in one kernel, `unfused` as all-reduce, add, norm."""

    fused: int = 0
    unfused: int = 0

    def __add__(self, other: Reductions) -> Reductions:
        return Reductions(self.fused + other.fused, self.unfused + other.unfused)

    def __str__(self) -> str:
        return f"{self.fused} fused, {self.unfused} unfused"


@dataclass
class RequestOutput:
    """One request's result.

    finish_reason: "stop" (EOS or a stop string), "length", "refused" (see `error`), or None while it runs.
    reductions: those of the steps that this request took part in.
    logits: [generated tokens, vocabulary] float32 array when asked for; prompt_logprobs: one per prompt token
    after the first.
    """

    index: int
    prompt: str | None
    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    reductions: Reductions = field(default_factory=Reductions)
    prompt_logprobs: list[float] | None = None
    logits: Any = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
