"""A parity run's results: as text, as JSON, and as a plot of the error by layer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jax_bridge.parity.compare import Comparison
from jax_bridge.parity.tolerances import TOLERANCES
from shared_config.trace import LOGITS, Record


def print_report(comparisons: list[Comparison], console: Console) -> None:
    """A table for each comparison, then the verdict on one line each."""
    for comparison in comparisons:
        left, right = comparison.left, comparison.right
        table = Table(title=f"{left.engine} and {right.engine}, {left.dtype}", title_justify="left")
        for column in ("level", "", "result"):
            table.add_column(column)
        for level in comparison.levels:
            text = level.summary if level.passed else f"{level.where}\n{level.summary}"
            table.add_row(level.level, "ok" if level.passed else "FAILED", text)
        console.print(table)
    for comparison in comparisons:
        failed = comparison.failed
        verdict = (
            "equal within tolerance"
            if failed is None
            else f"NOT equal, first at level {failed.level}: {failed.where}"
        )
        console.print(
            f"parity of {comparison.left.engine} and {comparison.right.engine}: {verdict}", soft_wrap=True
        )


def print_texts(prompts: list[str], left: Record, right: Record, console: Console) -> None:
    """The first continuation of both engines, side by side."""
    table = Table(title=f"greedy, after {prompts[0]!r}", title_justify="left")
    for record in (left, right):
        table.add_column(record.engine)
    table.add_row(*(record.greedy[0].text.replace("[", r"\[") for record in (left, right)))
    console.print(table)


def to_json(comparisons: list[Comparison], facts: dict[str, Any]) -> str:
    """`facts` (model, ranks, prompts), then every number of every level, and the tolerances with their reasons."""
    dtypes = {comparison.left.dtype for comparison in comparisons}
    return json.dumps(
        {
            **facts,
            "passed": all(comparison.failed is None for comparison in comparisons),
            "comparisons": [
                {
                    "engines": [_engine(comparison.left), _engine(comparison.right)],
                    "levels": [asdict(level) for level in comparison.levels],
                }
                for comparison in comparisons
            ],
            "tolerances": {dtype: asdict(TOLERANCES[dtype]) for dtype in sorted(dtypes)},
        },
        indent=1,
    )


def _engine(record: Record) -> dict[str, Any]:
    return {"name": record.engine, "fused": record.fused, "why": record.why, **record.versions}


def plot(comparisons: list[Comparison], path: Path, title: str) -> None:
    """Error of the residual stream at each point, RMS (lines) and worst row (dots), with the tolerance of the RMS.

    Points that are bitwise equal have no place on a logarithmic axis and are left out.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib (or crossfuse[bench])") from error
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    names = [name for name in comparisons[0].left.points if name != LOGITS]
    for comparison in comparisons:
        level = next(level for level in comparison.levels if level.level == "layer")
        rms, row = ([level.values[name][kind] or float("nan") for name in names] for kind in ("rms", "row"))
        label = f"{comparison.left.engine} / {comparison.right.engine}"
        (line,) = axes.plot(names, rms, marker="o", markersize=3, label=label)
        axes.plot(names, row, marker=".", markersize=3, linestyle="none", color=line.get_color(), alpha=0.6)
    dtype = comparisons[0].left.dtype
    limit = TOLERANCES[dtype].layer_rms.value
    axes.axhline(limit, color="gray", linestyle="--", label=f"tolerance of the RMS ({dtype})")
    axes.set_yscale("log")
    axes.set_ylabel("relative error of the residual stream\nRMS of all rows (lines), worst row (dots)")
    axes.set_title(title)
    axes.tick_params(axis="x", rotation=90, labelsize=7)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
