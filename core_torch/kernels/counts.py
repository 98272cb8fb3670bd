"""How often each kind of reduction really ran, so that a result can prove what it measured."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass
class ReductionCounts:
    """Reductions of one group on this rank since the last `reset`.

    `fused` and `unfused` are the sums that a norm follows, by the way they were paid. `plain` are sums with
    no norm behind them (an embedding split over ranks), which could never fuse. They are counted where they
    are launched, so a compiled model counts too. A CUDA graph launches without Python: whoever captures
    keeps `counts.difference(before_capture)` and adds it with `counts += captured` at every replay.
    """

    fused: int = 0
    unfused: int = 0
    plain: int = 0

    def add(self, *, fused: int = 0, unfused: int = 0, plain: int = 0) -> None:
        self.fused += fused
        self.unfused += unfused
        self.plain += plain

    def reset(self) -> None:
        self.fused = self.unfused = self.plain = 0

    def snapshot(self) -> ReductionCounts:
        """A copy that later reductions leave alone."""
        return replace(self)

    def difference(self, earlier: ReductionCounts) -> ReductionCounts:
        """What ran since `earlier`, a snapshot of these counts."""
        return ReductionCounts(
            self.fused - earlier.fused, self.unfused - earlier.unfused, self.plain - earlier.plain
        )

    def __iadd__(self, other: ReductionCounts) -> ReductionCounts:
        self.add(fused=other.fused, unfused=other.unfused, plain=other.plain)
        return self
