"""What changed between two results, beyond their spread."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import print_table
from bench.result import Result
from bench.stats import Timing, beyond_spread


@dataclass(frozen=True)
class Change:
    """One row that both results have. `ratio` is the time after over the time before."""

    key: str
    before: Timing
    after: Timing

    @property
    def ratio(self) -> float:
        return self.after.median_us / self.before.median_us

    @property
    def verdict(self) -> str:
        if not beyond_spread(self.before, self.after):
            return "same"
        return "faster" if self.ratio < 1 else "slower"


def timings(result: Result) -> dict[str, Timing]:
    return {row.key: row.timing for row in (*result.op, *result.model)} | {
        row.key: row.timing for row in result.kernels if row.timing is not None
    }


def compare(before: Result, after: Result) -> list[Change]:
    """Every row that both have, the largest change first. ValueError when they have none in common."""
    old, new = timings(before), timings(after)
    changes = [Change(key, old[key], new[key]) for key in old if key in new]
    if not changes:
        raise ValueError("the two results have no row in common")
    return sorted(changes, key=lambda change: max(change.ratio, 1 / change.ratio), reverse=True)


def differences(before: Result, after: Result) -> list[str]:
    """What else differs: a time cannot be blamed on the code when the machine or a version changed too."""
    pairs: dict[str, tuple[object, object]] = {
        "device": (before.machine.label, after.machine.label),
        "driver": (before.machine.hardware.driver, after.machine.hardware.driver),
        "revision": (before.revision, after.revision),
    }
    for what, old, new in (
        ("version of", before.machine.versions, after.machine.versions),
        ("flag", before.machine.flags, after.machine.flags),
        ("model's", _model(before), _model(after)),
    ):
        pairs |= {
            f"{what} {name}": (old.get(name), new.get(name)) for name in sorted(old.keys() | new.keys())
        }
    return [f"{name}: {old} -> {new}" for name, (old, new) in pairs.items() if old != new]


def _model(result: Result) -> dict[str, Any]:
    model, kernels = result.model_spec, result.kernel_spec
    found: dict[str, Any] = {} if kernels is None else kernels.hf_config | {"shapes": kernels.name}
    return (
        found
        if model is None
        else found | model.hf_config | {"name": model.name, "weights": model.load_format}
    )


def compare_files(before_file: Path, after_file: Path) -> dict[str, object]:
    """Prints the comparison; returns what the one JSON line says of it."""
    before, after = Result.load(before_file), Result.load(after_file)
    changes, others = compare(before, after), differences(before, after)
    for line in others:
        print(line)
    changed = [change for change in changes if change.verdict != "same"]
    lines = [
        [
            change.key,
            f"{change.before.median_us:.1f} ({change.before.low_us:.1f} to {change.before.high_us:.1f})",
            f"{change.after.median_us:.1f} ({change.after.low_us:.1f} to {change.after.high_us:.1f})",
            f"{change.ratio:.3f}",
            change.verdict,
        ]
        for change in changed
    ]
    print_table("beyond the spread, microseconds", (["", "before", "after", "ratio", ""], lines))
    print(f"{len(changes) - len(changed)} of {len(changes)} rows are the same within their spread")
    only = timings(before).keys() ^ timings(after).keys()
    if only:
        print(f"in one of them only: {len(only)} rows")
    return {
        "rows": len(changes),
        "faster": {c.key: round(c.ratio, 4) for c in changed if c.verdict == "faster"},
        "slower": {c.key: round(c.ratio, 4) for c in changed if c.verdict == "slower"},
        "other_differences": others,
    }
