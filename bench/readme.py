"""Writes README's tables from committed results, between markers, so that no number in it is typed by hand.

<!-- results:op -->      the reduction by number of tokens
<!-- results:prefill --> <!-- results:decode -->      the model
<!-- /results:op -->     (and so on) ends a section
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from bench.report import TableCells, model_table, model_title, op_table, op_title
from bench.result import Result

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULT = ROOT / "bench" / "results" / "2xh200.json"
LEFT_OUT = ("fused_oneshot", "fused_twoshot")  # they are in the JSON file; a reader wants what an engine runs
SECTION = re.compile(r"<!-- results:(\w+) -->\n.*?<!-- /results:\1 -->", re.DOTALL)


def markdown(table: TableCells) -> str:
    headings, lines = table
    rows = [[heading.replace("\n", " ") for heading in headings], ["---:"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def op_section(result: Result) -> str:
    rows = [row for row in result.op if row.method not in LEFT_OUT]
    samples = rows[0].timing.samples
    title = f"{op_title(result)}: microseconds a call, median of {samples}"
    return _section(result, title, op_table(rows), {row.framework for row in rows})


def model_section(phase: str) -> Callable[[Result], str]:
    def section(result: Result) -> str:
        frameworks = {row.framework for row in result.model if row.phase == phase}
        return _section(result, model_title(result, phase), model_table(result.model, phase), frameworks)

    return section


SECTIONS: dict[str, Callable[[Result], str]] = {
    "op": op_section,
    "prefill": model_section("prefill"),
    "decode": model_section("decode"),
}


def _section(result: Result, title: str, table: TableCells, frameworks: set[str]) -> str:
    versions = result.machine.versions
    names = [*sorted(frameworks), "flashinfer", "nccl"]
    used = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    source = RESULT.relative_to(ROOT).as_posix()
    caption = f"{used}; revision {result.revision}; [{source}]({source})."
    return f"{title} (± the middle 80 %).\n\n{markdown(table)}\n\n{caption}"


def updated(text: str, result: Result) -> str:
    """`text` with every marked section written anew. ValueError for a section that the result cannot fill."""

    def write(match: re.Match[str]) -> str:
        name = match[1]
        if name not in SECTIONS:
            raise ValueError(f"unknown section results:{name}; there are {', '.join(SECTIONS)}")
        measured = result.op if name == "op" else [row for row in result.model if row.phase == name]
        if not measured:
            raise ValueError(f"the result has nothing for the section results:{name}")
        return f"<!-- results:{name} -->\n{SECTIONS[name](result)}\n<!-- /results:{name} -->"

    return SECTION.sub(write, text)


def update_readme(*, check: bool) -> bool:
    """Writes README.md's sections -> whether they differed. `check` only looks."""
    before = README.read_text()
    after = updated(before, Result.load(RESULT))
    if not check and after != before:
        README.write_text(after)
    return after != before
