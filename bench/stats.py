"""Medians with their spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Of `samples` repetitions: the median, and the range that holds the middle 80 % of them, in microseconds."""

    median_us: float
    low_us: float
    high_us: float
    samples: int

    def scaled(self, factor: float) -> Timing:
        return Timing(self.median_us * factor, self.low_us * factor, self.high_us * factor, self.samples)


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile (0 to 1), linear between samples."""
    if not samples:
        raise ValueError("samples must not be empty")
    if not 0 <= q <= 1:
        raise ValueError(f"q must be between 0 and 1, got {q}")
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def summarize(samples_us: Sequence[float]) -> Timing:
    """Raises ValueError for no samples, and for one that is not a positive number."""
    for sample in samples_us:
        if not (math.isfinite(sample) and sample > 0):
            raise ValueError(f"a duration must be a positive number of microseconds, got {sample}")
    return Timing(
        median_us=quantile(samples_us, 0.5),
        low_us=quantile(samples_us, 0.1),
        high_us=quantile(samples_us, 0.9),
        samples=len(samples_us),
    )


def slowest(by_rank: Sequence[Sequence[float]]) -> list[float]:
    """Repetition by repetition, the rank that took longest: a collective is over when all of them are."""
    return [max(samples) for samples in zip(*by_rank, strict=True)]


def beyond_spread(before: Timing, after: Timing) -> bool:
    """Whether the two ranges have nothing in common."""
    return after.high_us < before.low_us or after.low_us > before.high_us
