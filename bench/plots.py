"""PNG plots: the op's latency by tokens, the model's time beside its floor, the kernels' shares of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.report import kernel_title, model_title, op_columns, op_title
from bench.result import METHODS, KernelRow, ModelRow, Result

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
    """The plots of what was measured: `op.png`, `prefill.png` and `decode.png`, `kernels.png`."""
    files = []
    if result.op:
        files.append(_draw_op(result, folder / "op.png"))
    for phase in ("prefill", "decode"):
        rows = [row for row in result.model if row.phase == phase]
        if rows:
            files.append(_draw_model(result, phase, rows, folder / f"{phase}.png"))
    timed = [row for row in result.kernels if row.timing is not None]
    if timed:
        files.append(_draw_kernels(result, timed, folder / "kernels.png"))
    return files


def _draw_kernels(result: Result, rows: list[KernelRow], file: Path) -> Path:
    """A panel for each phase: bars of the floor's share, by kernel and number of tokens."""
    plt = require_matplotlib()
    phases = [phase for phase in ("decode", "prefill") if any(row.phase == phase for row in rows)]
    bars = {phase: [row for row in rows if row.phase == phase] for phase in phases}
    heights = [len(bars[phase]) for phase in phases]
    figure, grid = plt.subplots(
        len(phases), 1, figsize=(9, 2 + 0.17 * sum(heights)), layout="constrained", squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axes, phase in zip(grid[:, 0], phases, strict=True):
        names = list(dict.fromkeys(row.kernel for row in bars[phase]))
        ordered = sorted(bars[phase], key=lambda r: (names.index(r.kernel), r.length or 0, r.num_tokens))
        for place, row in enumerate(ordered):
            assert row.timing is not None
            color = f"C{names.index(row.kernel) % 10}"
            axes.barh(place, 100 * (row.share or 0), color=color, alpha=0.85)
            axes.text(
                100 * (row.share or 0) + 1, place, f"{row.timing.median_us:.1f}", va="center", fontsize=6
            )
        length = (
            f" x {row.length}" if row.length is not None and phase == "decode" else "" for row in ordered
        )
        labels = [f"{row.kernel}, {row.num_tokens}{more}" for row, more in zip(ordered, length, strict=True)]
        axes.set_yticks(range(len(ordered)), labels, fontsize=7)
        axes.set(xlim=(0, 110), title=kernel_title(result, phase))
        axes.title.set_fontsize("small")
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.grid(True, axis="x", alpha=0.25)
    grid[-1][0].set_xlabel("% of the floor's rate; beside each bar its microseconds")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


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
    for labels in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        labels(lambda us, _: f"{us:g}" if f"{us:e}"[0] in "1235" else "")
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
    """A panel for each cell, whose times differ by orders of magnitude: bars from zero, with their spread, and each
    bar's own floor as a black line. transformers is cut off where the engines would become too small to read; its bar
    then bears its height."""
    plt = require_matplotlib()
    cells = sorted({(row.length, row.batch) for row in rows})
    series = list(dict.fromkeys((row.framework, row.fusion) for row in rows))
    hatches = {"torch": "", "jax": "//", "transformers": ".."}
    found = {(row.length, row.batch, row.framework, row.fusion): row for row in rows}
    panel = max(1.9, 0.5 * len(series))  # inches: room for the title
    figure, grid = plt.subplots(
        1, len(cells), figsize=(max(7.5, panel * len(cells)), 5), layout="constrained", squeeze=False
    )
    for axes, (length, batch) in zip(grid[0], cells, strict=True):
        cell = [row for row in rows if (row.length, row.batch) == (length, batch)]
        engines = [row.timing.high_us / 1e3 for row in cell if row.framework != "transformers"]
        top = 1.3 * max(engines) if engines else None
        for place, (framework, fusion) in enumerate(series):
            row = found.get((length, batch, framework, fusion))
            if row is None:
                continue
            low, middle, high = (
                us / 1e3 for us in (row.timing.low_us, row.timing.median_us, row.timing.high_us)
            )
            axes.bar(
                place, middle, 0.9, yerr=[[middle - low], [high - middle]], capsize=3,
                label=framework if fusion == "none" else f"{framework}, fusion {fusion}",
                color=FUSION_COLORS[fusion], hatch=hatches[framework], edgecolor="white", alpha=0.85,
            )  # fmt: skip
            if top is not None and high > top:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                text = f"{middle:.0f} ms"
                axes.text(place, 0.98 * top, text, ha="center", va="top", fontsize="x-small", bbox=box)
            if row.floor_us:
                floor = row.floor_us / 1e3
                axes.plot([place - 0.45, place + 0.45], [floor, floor], "k-", linewidth=2, label="floor")
        axes.set(title=f"batch {batch}, {length} tokens", xticks=[], ylim=(0, top))
        axes.title.set_fontsize("small")
        axes.grid(True, axis="y", alpha=0.25)
    grid[0][0].set_ylabel("milliseconds")
    figure.suptitle(model_title(result, phase), fontsize="medium")
    labelled = {
        label: handle
        for axes in grid[0]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file
