"""Results as tables to read in a terminal or a README."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench.result import METHODS, OpRow, Result
from bench.stats import Timing

Cells = list[list[str]]
LOG_WIDTH = 200


def op_table(rows: Sequence[OpRow]) -> tuple[list[str], Cells]:
    """Headings and cells: a line per number of tokens, a column per method in microseconds, floor and gain last."""
    columns = [
        (f, m)
        for f in ("torch", "jax")
        for m in METHODS
        if any((r.framework, r.method) == (f, m) for r in rows)
    ]
    found = {(r.framework, r.method, r.num_tokens): r for r in rows}
    cells = []
    for num_tokens in sorted({r.num_tokens for r in rows}):
        here = [found.get((*column, num_tokens)) for column in columns]
        floor = next((r.floor_us for r in here if r is not None), None)
        cells.append(
            [
                str(num_tokens),
                *("-" if r is None else _us(r.timing) for r in here),
                "-" if floor is None else f"{floor:.1f}",
                _gain(rows, num_tokens),
            ]
        )
    return ["tokens", *(f"{f}\n{METHODS[m][0]}" for f, m in columns), "link\nfloor", "gain"], cells


def op_gain(rows: Sequence[OpRow], num_tokens: int) -> float | None:
    """How much faster torch's fused op is than the fastest unfused way that gives the same result."""
    times = {
        r.method: r.timing.median_us for r in rows if r.num_tokens == num_tokens and r.framework == "torch"
    }
    others = [times[m] for m in ("allreduce_norm", "unfused") if m in times]
    return min(others) / times["fused"] if "fused" in times and others else None


def crossing(rows: Sequence[OpRow]) -> int | None:
    """The most tokens up to which, at every measured size, the fused op is at least as fast; None if never."""
    best = None
    for num_tokens in sorted({r.num_tokens for r in rows}):
        gain = op_gain(rows, num_tokens)
        if gain is None or gain < 1:
            break
        best = num_tokens
    return best


def _gain(rows: Sequence[OpRow], num_tokens: int) -> str:
    gain = op_gain(rows, num_tokens)
    return "-" if gain is None else f"{gain:.2f}x"


def _us(timing: Timing) -> str:
    """The median, with the wider half of its spread."""
    spread = max(timing.high_us - timing.median_us, timing.median_us - timing.low_us)
    digits = 0 if timing.median_us >= 1000 else 1
    return f"{timing.median_us:.{digits}f} ± {spread:.{digits}f}"


def print_table(title: str, headings: Sequence[str], cells: Cells) -> None:
    table = Table(title=title, title_justify="left", show_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for line in cells:
        table.add_row(*line)
    console = Console()
    # A log is as wide as it has to be; only a terminal has an end.
    Console(width=None if console.is_terminal else LOG_WIDTH).print(table)


def print_result(result: Result) -> None:
    machine = result.machine
    rates = machine.rates
    link = "none" if rates.link_bytes_per_s is None else f"{rates.link_bytes_per_s / 1e9:.0f} GB/s each way"
    print(
        f"{machine.label}: memory {rates.memory_bytes_per_s / 1e9:.0f} GB/s, "
        f"products {rates.flops_per_s / 1e12:.3g} TFLOP/s, link {link} (measured)"
    )
    if result.op and result.op_spec is not None:
        spec = result.op_spec
        title = f"all-reduce + add + norm, hidden {spec.hidden_size}, {spec.dtype}, TP {spec.tp}: microseconds a call"
        print_table(title, *op_table(result.op))
        crossed = crossing(result.op)
        print(
            f"fused is at least as fast at every size up to {crossed} tokens"
            if crossed
            else "fused is never faster"
        )


def summary(result: Result) -> dict[str, object]:
    """The one JSON line: what a script or a reader of logs wants first."""
    sizes = sorted({r.num_tokens for r in result.op})
    return {
        "device": result.machine.label,
        "revision": result.revision,
        "op_gain_by_tokens": {
            n: round(gain, 3) for n in sizes if (gain := op_gain(result.op, n)) is not None
        },
        "op_fused_us_by_tokens": {
            r.num_tokens: round(r.timing.median_us, 2)
            for r in result.op
            if (r.framework, r.method) == ("torch", "fused")
        },
        "op_faster_up_to_tokens": crossing(result.op),
    }
