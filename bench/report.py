"""Results as tables to read in a terminal or a README, and as one line of JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from bench.result import METHODS, KernelRow, ModelRow, OpRow, Result
from bench.stats import Timing

FRAMEWORKS = ("torch", "jax", "transformers")
UNFUSED = ("allreduce_norm", "unfused")  # torch's ways to the fused op's result without it
LOG_WIDTH = 200

TableCells = tuple[list[str], list[list[str]]]  # headings, lines


def op_columns(rows: Sequence[OpRow]) -> list[tuple[str, str]]:
    """The (framework, method) pairs that were measured, in order."""
    found = {(row.framework, row.method) for row in rows}
    return [(f, m) for f in FRAMEWORKS for m in METHODS if (f, m) in found]


def op_table(rows: Sequence[OpRow]) -> TableCells:
    """A line per number of tokens, a column per method in microseconds, then the link's floor and the gain."""
    headings, lines = _op_lines(rows, lambda row: _us(row.timing))
    floors = {row.num_tokens: row.floor_us for row in rows}
    for line in lines:
        num_tokens = int(line[0])
        floor, gain = floors[num_tokens], op_gain(rows, num_tokens)
        line += ["-" if floor is None else f"{floor:.1f}", "-" if gain is None else f"{gain:.2f}x"]
    return [*headings, "link\nfloor", "gain"], lines


def op_rate_table(rows: Sequence[OpRow]) -> TableCells:
    """The same in gigabytes per second that each rank sends at least; the link's measured rate is the limit."""
    return _op_lines(rows, lambda row: f"{row.wire_bytes / row.timing.median_us / 1e3:.2f}")


def _op_lines(rows: Sequence[OpRow], cell: Callable[[OpRow], str]) -> TableCells:
    columns = op_columns(rows)
    found = {(row.framework, row.method, row.num_tokens): row for row in rows}
    lines = []
    for num_tokens in sorted({row.num_tokens for row in rows}):
        here = [found.get((*column, num_tokens)) for column in columns]
        lines.append([str(num_tokens), *("-" if row is None else cell(row) for row in here)])
    return ["tokens", *(f"{f}\n{METHODS[m][0]}" for f, m in columns)], lines


def op_gain(rows: Sequence[OpRow], num_tokens: int) -> float | None:
    """How much faster torch's fused op is than the fastest unfused way to the same result."""
    times = {
        row.method: row.timing.median_us
        for row in rows
        if row.num_tokens == num_tokens and row.framework == "torch"
    }
    others = [times[method] for method in UNFUSED if method in times]
    return min(others) / times["fused"] if "fused" in times and others else None


def crossing(rows: Sequence[OpRow]) -> int | None:
    """The most tokens up to which, at every measured size, the fused op is at least as fast; None if never."""
    best = None
    for num_tokens in sorted({row.num_tokens for row in rows}):
        gain = op_gain(rows, num_tokens)
        if gain is None or gain < 1:
            break
        best = num_tokens
    return best


def model_table(rows: Sequence[ModelRow], phase: str) -> TableCells:
    """A line per cell, framework and fusion. `of floor`: how many times the floor a step takes."""
    headings = [
        "batch",
        "prompt",
        "",
        "fusion",
        "ms",
        "tokens/s",
        "floor ms",
        "of floor",
        "experts",
        "comm.",
        "fused",
    ]
    lines = []
    order = [(f, m) for f in FRAMEWORKS for m in ("on", "off", "none")]
    found = [row for row in rows if row.phase == phase]
    for row in sorted(found, key=lambda r: (r.length, r.batch, order.index((r.framework, r.fusion)))):
        floor, share = row.floor_us, row.communication_share
        reductions = row.fused + row.unfused
        lines.append(
            [
                str(row.batch),
                str(row.length),
                row.framework,
                row.fusion,
                _ms(row.timing),
                f"{row.tokens_per_s:,.0f}",
                "-" if floor is None else f"{floor / 1e3:.2f}",
                "-" if floor is None else f"{row.timing.median_us / floor:.1f}x",
                f"{row.distinct_experts:.0f}",
                "-" if share is None else f"{share:.0%}",
                "-" if not reductions else f"{row.fused}/{reductions}",
            ]
        )
    return headings, lines


def kernel_table(rows: Sequence[KernelRow], phase: str) -> TableCells:
    """A line per kernel and size. `share`: of the floor's rate, which bytes, link or products bound."""
    headings = [
        "kernel",
        "tokens",
        "length",
        "us",
        "plain torch us",
        "floor us",
        "share",
        "MB",
        "GB/s",
        "link GB/s",
        "TFLOP/s",
        "apart",
    ]
    lines = []
    found = [row for row in rows if row.phase == phase]
    order = list(dict.fromkeys(row.kernel for row in found))
    for row in sorted(found, key=lambda r: (order.index(r.kernel), r.length or 0, r.num_tokens)):
        line = [row.kernel, str(row.num_tokens), "" if row.length is None else str(row.length)]
        floor = "-" if row.floor_us is None else f"{row.floor_us:.1f}"
        megabytes = f"{row.memory_bytes / 1e6:.1f}"
        if row.timing is None:
            lines.append([*line, "-", _us(row.plain), floor, "-", megabytes, "-", "-", "-", "-"])
            continue
        us, share = row.timing.median_us, row.share
        line += [_us(row.timing), _us(row.plain), floor, "-" if share is None else f"{share:.0%}", megabytes]
        rates = [
            f"{row.memory_bytes / us / 1e3:.0f}",
            f"{row.wire_bytes / us / 1e3:.0f}" if row.wire_bytes else "-",
            f"{row.flops / us / 1e6:.1f}" if row.flops else "-",
        ]
        lines.append([*line, *rates, "-" if row.apart is None else f"{row.apart:.1g}"])
    return headings, lines


def share_table(rows: Sequence[KernelRow], phase: str) -> TableCells:
    """The same in short: a line per kernel, a column per number of tokens with the time and the share."""
    found = {
        (_name(row), row.num_tokens): row for row in rows if row.phase == phase and row.timing is not None
    }
    sizes = sorted({num_tokens for _, num_tokens in found})
    lines = []
    for name in dict.fromkeys(name for name, _ in found):
        cells = [found.get((name, size)) for size in sizes]
        lines.append([name, *("-" if row is None else _time_and_share(row) for row in cells)])
    return ["kernel", *(str(size) for size in sizes)], lines


def _name(row: KernelRow) -> str:
    return row.kernel if row.length is None else f"{row.kernel}, length {row.length}"


def _time_and_share(row: KernelRow) -> str:
    assert row.timing is not None
    share = "" if row.share is None else f" ({row.share:.0%})"
    return f"{row.timing.median_us:.1f}{share}"


def model_gain(rows: Sequence[ModelRow], framework: str, phase: str, batch: int, length: int) -> float | None:
    """Time without fusion over time with it."""
    times = {
        row.fusion: row.timing.median_us
        for row in rows
        if (row.framework, row.phase, row.batch, row.length) == (framework, phase, batch, length)
    }
    return times["off"] / times["on"] if {"on", "off"} <= times.keys() else None


def _spread(timing: Timing) -> float:
    """The wider half."""
    return max(timing.high_us - timing.median_us, timing.median_us - timing.low_us)


def _us(timing: Timing) -> str:
    digits = 0 if timing.median_us >= 1000 else 1
    return f"{timing.median_us:.{digits}f} ± {_spread(timing):.{digits}f}"


def _ms(timing: Timing) -> str:
    digits = 1 if timing.median_us >= 100_000 else 2
    return f"{timing.median_us / 1e3:.{digits}f} ± {_spread(timing) / 1e3:.{digits}f}"


def op_title(result: Result) -> str:
    spec = result.op_spec
    assert spec is not None
    return f"all-reduce + add + norm, hidden {spec.hidden_size}, {spec.dtype}, TP {spec.tp}, {result.machine.label}"


def model_title(result: Result, phase: str) -> str:
    spec = result.model_spec
    assert spec is not None
    weights = ", random weights" if spec.load_format == "dummy" else ""
    what = {"prefill": "prefill to the first token", "decode": "a decode step"}[phase]
    return f"{what}: {spec.name}{weights}, {spec.dtype}, TP {spec.tp}, {result.machine.label}"


def kernel_title(result: Result, phase: str) -> str:
    spec = result.kernel_spec
    assert spec is not None
    what = {"prefill": "a pass of prefill", "decode": "a decode step"}[phase]
    return f"kernels of {what}: {spec.name}, {spec.dtype}, one of {spec.tp} ranks, {result.machine.label}"


def print_table(title: str, table: TableCells) -> None:
    headings, lines = table
    drawn = Table(title=title, title_justify="left", show_edge=False)
    for heading in headings:
        drawn.add_column(heading, justify="left" if heading == "kernel" else "right", no_wrap=True)
    for line in lines:
        drawn.add_row(*line)
    console = Console()
    # A log is as wide as it has to be; only a terminal has an end.
    Console(width=None if console.is_terminal else LOG_WIDTH).print(drawn)


def print_result(result: Result) -> None:
    rates = result.machine.rates
    link = "none" if rates.link_bytes_per_s is None else f"{rates.link_bytes_per_s / 1e9:.0f} GB/s each way"
    print(
        f"{result.machine.label}: memory {rates.memory_bytes_per_s / 1e9:.0f} GB/s, "
        f"products {rates.flops_per_s / 1e12:.3g} TFLOP/s, link {link} (measured)"
    )
    if result.op:
        print_table(f"{op_title(result)}: microseconds a call", op_table(result.op))
        print_table("the same in GB/s that each rank sends", op_rate_table(result.op))
        crossed = crossing(result.op)
        if crossed is not None:
            print(f"torch: fused is at least as fast as the fastest unfused way up to {crossed} tokens")
    for phase in ("prefill", "decode"):
        if any(row.phase == phase for row in result.model):
            print_table(model_title(result, phase), model_table(result.model, phase))
    for phase in ("decode", "prefill"):
        if any(row.phase == phase for row in result.kernels):
            print_table(kernel_title(result, phase), kernel_table(result.kernels, phase))
    for note in result.notes:
        print(f"note: {note}")


def summary(result: Result) -> dict[str, object]:
    """The one JSON line: what a script or a reader of logs wants first. Units are in the keys."""
    sizes = sorted({row.num_tokens for row in result.op})
    fused = [row for row in result.op if (row.framework, row.method) == ("torch", "fused")]
    line: dict[str, object] = {"device": result.machine.label, "revision": result.revision}
    if result.op:
        line |= {
            "op_fused_us_by_tokens": {row.num_tokens: round(row.timing.median_us, 2) for row in fused},
            "op_gain_by_tokens": {
                n: round(gain, 3) for n in sizes if (gain := op_gain(result.op, n)) is not None
            },
            "op_faster_up_to_tokens": crossing(result.op),
        }
    for row in result.model:
        line[f"{row.key.replace(', ', ' ')}: ms"] = round(row.timing.median_us / 1e3, 3)
    for phase in ("decode", "prefill"):
        headings, lines = share_table(result.kernels, phase)
        if lines:  # as in README: "7.4 (84%)" by number of tokens
            line[f"{phase} kernels: us (share of floor) by tokens"] = {
                name: {size: cell for size, cell in zip(headings[1:], cells, strict=True) if cell != "-"}
                for name, *cells in lines
            }
    return line
