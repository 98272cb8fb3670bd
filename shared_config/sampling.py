"""How to continue a prompt: the same parameters, and the same random numbers, in both frameworks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request.

    temperature 0 is greedy. top_k 0 keeps all tokens, top_p 1.0 all probability. With a `seed` a request draws
    the same numbers whatever else runs beside it. `stop` strings end the text and are not part of it. Generation
    also ends at the model's EOS, unless `ignore_eos`, and after `max_tokens`.
    `prompt_logprobs` asks for the log-probability of each prompt token after the first; `return_logits` for the
    float32 logits [tokens, vocabulary] that each generated token was chosen from (parity runs use both).
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    prompt_logprobs: bool = False
    return_logits: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        checks = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0.0 <= self.temperature < float("inf"), "0 (greedy) or a positive number"),
            "top_k": (self.top_k >= 0, "0 (all) or a positive number of tokens"),
            "top_p": (0.0 < self.top_p <= 1.0, "in (0, 1]"),
            "stop": (all(isinstance(s, str) and s for s in self.stop), "non-empty strings"),
        }
        for name, (ok, expected) in checks.items():
            if not ok:
                raise ValueError(f"SamplingParams.{name} must be {expected}, got {getattr(self, name)!r}")


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on `seed` and the token's `position` alone (BLAKE2b, 53 bits)."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
