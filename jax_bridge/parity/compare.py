"""Two engines' records -> one result a level.

Shapes: R rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_bridge.parity.tolerances import TOLERANCES, Tolerance
from shared_config.trace import LOGITS, Greedy, Record

MANTISSA_BITS = {"float32": 23, "bfloat16": 7, "float16": 10}


@dataclass(frozen=True)
class LevelResult:
    """`summary`: the numbers in words. `where`: the place of the first fault, "" when passed. `values`: all numbers."""

    level: str
    passed: bool
    summary: str
    where: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    left: Record
    right: Record
    levels: tuple[LevelResult, ...]

    @property
    def failed(self) -> LevelResult | None:
        """The first level that failed, which is where to look for the fault."""
        return next((level for level in self.levels if not level.passed), None)


def compare(left: Record, right: Record) -> Comparison:
    """Levels that neither record has are left out. Raises ValueError for records of different jobs or dtypes."""
    if left.dtype != right.dtype:
        raise ValueError(
            f"{left.engine} ran in {left.dtype}, {right.engine} in {right.dtype}; compare equal dtypes"
        )
    if not np.array_equal(left.rows, right.rows) or len(left.greedy) != len(right.greedy):
        raise ValueError(f"{left.engine} and {right.engine} were given different jobs")
    checks: list[tuple[bool, Callable[[Record, Record, Tolerance], LevelResult]]] = [
        (bool(left.op), _op),
        (len(left.points) > 1, _layers),
        (LOGITS in left.points, _logits),
        (bool(left.greedy), _greedy),
        (bool(left.greedy), _counts),
    ]
    tolerance = TOLERANCES[left.dtype]
    return Comparison(left, right, tuple(check(left, right, tolerance) for has, check in checks if has))


def ulps(got: np.ndarray, want: np.ndarray, dtype: str) -> np.ndarray:
    """|got - want| [..., D] in units of the last place of `dtype`.

    A value counts at least as large as its row's root mean square: where large terms cancel, the last place that
    matters is theirs.
    """
    rms = np.sqrt(np.mean(np.square(want, dtype=np.float64), axis=-1, keepdims=True))
    scale = np.maximum(np.abs(want), rms)
    return np.abs(got.astype(np.float64) - want) / np.exp2(np.floor(np.log2(scale)) - MANTISSA_BITS[dtype])


def _op(left: Record, right: Record, tolerance: Tolerance) -> LevelResult:
    values: dict[str, Any] = {}
    where = ""
    for case, want in left.op.items():
        got = right.op[case]
        worst = _finite(ulps(got, want, left.dtype).max())
        values[case] = {"max_ulp": worst, "bitwise_share": float(np.mean(got == want))}
        if worst > tolerance.op_ulps.value and not where:
            where = f"{case.replace('/', ' tokens, ')}: {worst:.3g} ulp"
    worst = max(case["max_ulp"] for case in values.values())
    share = min(case["bitwise_share"] for case in values.values())
    summary = f"at most {worst:.3g} ulp; {share:.1%} of the values bitwise equal in the worst case"
    return LevelResult("op", not where, summary, where, values)


def _layers(left: Record, right: Record, tolerance: Tolerance) -> LevelResult:
    values: dict[str, Any] = {}
    where = ""
    names = [name for name in left.points if name != LOGITS]
    for name in names:
        got, want = right.points[name].astype(np.float64), left.points[name].astype(np.float64)
        error, norm = np.linalg.norm(got - want, axis=-1), np.linalg.norm(want, axis=-1)
        rows = np.nan_to_num(error / np.maximum(norm, 1e-30), nan=np.inf)
        rms = _finite(np.linalg.norm(error) / np.linalg.norm(norm))
        row = int(rows.argmax())
        values[name] = {"rms": rms, "row": _finite(rows[row])}
        if not where and (rms > tolerance.layer_rms.value or rows[row] > tolerance.layer_row.value):
            limit = tolerance.layer_row.value if rows[row] > tolerance.layer_row.value else 0.0
            first = int(np.argmax(rows > limit)) if limit else row
            where = f"{name}: RMS error {rms:.2g}, {rows[first]:.2g} at {_place(left, first)}"
    last = names[-1]
    summary = f"RMS error {values[last]['rms']:.2g} after the last layer, worst row {values[last]['row']:.2g}"
    return LevelResult("layer", not where, summary, where, values)


def _logits(left: Record, right: Record, tolerance: Tolerance) -> LevelResult:
    want, got = left.points[LOGITS].astype(np.float64), right.points[LOGITS].astype(np.float64)
    errors = np.abs(got - want).max(-1) / np.maximum(np.abs(want).max(-1), 1e-30)
    errors = np.nan_to_num(errors, nan=np.inf)
    log_p, log_q = _log_softmax(want), _log_softmax(got)
    kl = _finite(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)))
    best_left, best_right = _best(want, 5), _best(got, 5)
    top1 = float(np.mean(best_left[:, 0] == best_right[:, 0]))
    top5 = float(np.mean([len(set(a) & set(b)) / 5 for a, b in zip(best_left, best_right, strict=True)]))
    row = int(errors.argmax())
    worst = _finite(errors[row])
    faults = [
        (worst > tolerance.logits.value, f"error {worst:.2g} at {_place(left, row)}"),
        (kl > tolerance.kl.value, f"KL divergence {kl:.2g}"),
        (top1 < tolerance.top1.value, f"top-1 agreement {top1:.2%}"),
        (top5 < tolerance.top5.value, f"top-5 agreement {top5:.2%}"),
    ]
    where = "; ".join(text for failed, text in faults if failed)
    summary = (
        f"largest error {worst:.2g}, KL {kl:.2g}, top-1 {top1:.2%}, top-5 {top5:.2%} of {len(want)} rows"
    )
    values = {"max_error": worst, "kl": kl, "top1": top1, "top5": top5, "rows": len(want)}
    return LevelResult("logits", not where, summary, where, values)


def _greedy(left: Record, right: Record, tolerance: Tolerance) -> LevelResult:
    values: dict[str, Any] = {"prompts": len(left.greedy), "differences": []}
    where = ""
    for i, (a, b) in enumerate(zip(left.greedy, right.greedy, strict=True)):
        length = min(len(a.token_ids), len(b.token_ids))
        first = next((n for n in range(length) if a.token_ids[n] != b.token_ids[n]), length)
        if first == len(a.token_ids) == len(b.token_ids):
            continue
        gap = _gap(a, b, first) if first < length else np.inf
        tie = gap <= tolerance.tie.value
        values["differences"].append({"prompt": i, "token": first, "gap": _finite(gap), "tie": bool(tie)})
        if not tie and not where:
            where = f"prompt {i} differs from token {first} on, where the two are {gap:.2g} apart: not a tie"
    count = len(values["differences"])
    ties = sum(difference["tie"] for difference in values["differences"])
    summary = f"{len(left.greedy) - count} of {len(left.greedy)} continuations equal, {ties} part at a tie"
    return LevelResult("greedy", not where, summary, where, values)


def _gap(a: Greedy, b: Greedy, step: int) -> float:
    """How much better `a` finds its own token than `b`'s, relative to its largest logit; infinite when `b`'s is not
    among the best that were kept."""
    ids, logits = a.best_ids[step].tolist(), a.best_logits[step]
    token = b.token_ids[step]
    if token not in ids:
        return np.inf
    return float((logits[0] - logits[ids.index(token)]) / np.abs(logits).max())


def _counts(left: Record, right: Record, tolerance: Tolerance) -> LevelResult:
    """As many reductions in both; as many of them fused where both fuse, and none where fusion is off."""
    del tolerance
    where = ""
    for i, (a, b) in enumerate(zip(left.greedy, right.greedy, strict=True)):
        one, other = a.reductions, b.reductions
        same = one.fused + one.unfused == other.fused + other.unfused
        kept = all(record.fused or not r.fused for record, r in ((left, one), (right, other)))
        if left.fused == right.fused:
            same = same and one.fused == other.fused
        if not (same and kept) and not where:
            where = f"prompt {i}: {left.engine} ran {one}, {right.engine} {other}"
    totals = {
        record.engine: [
            sum(getattr(g.reductions, kind) for g in record.greedy) for kind in ("fused", "unfused")
        ]
        for record in (left, right)
    }
    summary = "; ".join(
        f"{engine}: {fused} fused, {unfused} unfused" for engine, (fused, unfused) in totals.items()
    )
    return LevelResult("counts", not where, summary, where, totals)


def _place(record: Record, row: int) -> str:
    prompt, position, is_decode = record.rows[row].tolist()
    return f"prompt {prompt}, position {position} ({'decode' if is_decode else 'prefill'})"


def _finite(x: Any) -> float:
    """As a float that JSON can hold: what is not a number is an error without bound."""
    return 1e30 if not np.isfinite(x) else float(x)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _best(logits: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-logits, axis=-1, kind="stable")[:, :count]
