"""PNG plots: the op's latency by tokens, and the model's time beside its floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.report import model_title, op_columns, op_title
from bench.result import METHODS, ModelRow, Result

STYLES = {
    ("torch", "fused"): ("tab:green", "o-"),
    ("torch", "fused_oneshot"): ("tab:olive", "1:"),
    ("torch", "fused_twoshot"): ("tab:olive", "2--"),
    ("torch", "allreduce_norm"): ("tab:red", "s-"),
    ("torch", "unfused"): ("tab:orange", "D-"),
    ("torch", "allreduce"): ("tab:gray", "v--"),
    ("jax", "fused_ffi"): ("tab:blue", "o-"),
    ("jax", "fused_cupy"): ("tab:cyan", "^--"),
    ("jax", "psum_norm"): ("tab:purple", "s-"),
}
FUSION_COLORS = {"on": "tab:green", "off": "tab:red", "none": "tab:gray"}


def require_matplotlib() -> Any:
    """`matplotlib.pyplot`, without a display. ImportError with the install command."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib (or crossfuse[bench])") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw(result: Result, folder: Path) -> list[Path]:
    """The plots of what was measured, as `op.png`, `prefill.png` and `decode.png`."""
    files = []
    if result.op:
        files.append(_draw_op(result, folder / "op.png"))
    for phase in ("prefill", "decode"):
        rows = [row for row in result.model if row.phase == phase]
        if rows:
            files.append(_draw_model(result, phase, rows, folder / f"{phase}.png"))
    return files


def _draw_op(result: Result, file: Path) -> Path:
    plt = require_matplotlib()
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for column in op_columns(result.op):
        rows = sorted(
            (row for row in result.op if (row.framework, row.method) == column), key=lambda r: r.num_tokens
        )
        x = [row.num_tokens for row in rows]
        color, style = STYLES[column]
        axes.plot(
            x,
            [row.timing.median_us for row in rows],
            style,
            color=color,
            label=f"{column[0]}: {METHODS[column[1]][0]}",
        )
        axes.fill_between(
            x,
            [row.timing.low_us for row in rows],
            [row.timing.high_us for row in rows],
            color=color,
            alpha=0.15,
        )
    floors = sorted({(row.num_tokens, row.floor_us) for row in result.op if row.floor_us is not None})
    if floors:
        axes.plot(*zip(*floors, strict=True), "k:", label="link floor")
    sizes = sorted({row.num_tokens for row in result.op})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    lowest = min(row.timing.low_us for row in result.op)
    axes.set_ylim(bottom=lowest / 3)
    axes.set(title=op_title(result), xlabel="tokens", ylabel="microseconds a call (band: middle 80 %)")
    axes.grid(True, which="both", alpha=0.25)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


def _draw_model(result: Result, phase: str, rows: list[ModelRow], file: Path) -> Path:
    """For each cell the frameworks' bars with their spread, and each bar's own floor as a black line."""
    plt = require_matplotlib()
    cells = sorted({(row.length, row.batch) for row in rows})
    series = list(dict.fromkeys((row.framework, row.fusion) for row in rows))
    width = 0.8 / len(series)
    figure, axes = plt.subplots(
        figsize=(min(14, max(7, 1.2 * len(cells) * len(series))), 5), layout="constrained"
    )
    hatches = {"torch": "", "jax": "//", "transformers": ".."}
    found = {(row.length, row.batch, row.framework, row.fusion): row for row in rows}
    for index, (framework, fusion) in enumerate(series):
        here = [(place, found.get((*cell, framework, fusion))) for place, cell in enumerate(cells)]
        places = [place - 0.4 + (index + 0.5) * width for place, row in here if row is not None]
        present = [row for _, row in here if row is not None]
        heights = [row.timing.median_us / 1e3 for row in present]
        lower = [(row.timing.median_us - row.timing.low_us) / 1e3 for row in present]
        upper = [(row.timing.high_us - row.timing.median_us) / 1e3 for row in present]
        label = framework if fusion == "none" else f"{framework}, fusion {fusion}"
        axes.bar(
            places, heights, width * 0.95, yerr=[lower, upper], capsize=3, label=label,
            color=FUSION_COLORS[fusion], hatch=hatches[framework], edgecolor="white", alpha=0.85,
        )  # fmt: skip
        floors = [
            (place, row.floor_us / 1e3) for place, row in zip(places, present, strict=True) if row.floor_us
        ]
        for place, floor in floors:
            axes.hlines(floor, place - width / 2, place + width / 2, color="black", linewidth=2)
    axes.plot([], [], color="black", linewidth=2, label="floor")
    axes.set_xticks(range(len(cells)), [f"batch {batch}\n{length} tokens" for length, batch in cells])
    axes.set_yscale("log")
    axes.set(title=model_title(result, phase), ylabel="milliseconds")
    axes.grid(True, axis="y", which="both", alpha=0.25)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file
