"""Writes README's tables from committed results, between markers, so that no number in it is typed by hand.

<!-- results:op -->      the reduction by number of tokens
<!-- results:prefill --> <!-- results:decode -->      the model; <!-- results:all_decode --> in all frameworks
<!-- results:kernels -->     the own kernels of a decode step
<!-- /results:op -->     (and so on) ends a section
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report import TableCells, model_table, model_title, op_table, op_title
from bench.result import ModelRow, OpRow, Result

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
LEFT_OUT = ("fused_oneshot", "fused_twoshot")  # they are in the JSON file; a reader wants what an engine runs
SECTION = re.compile(r"<!-- results:(\w+) -->\n.*?<!-- /results:\1 -->", re.DOTALL)


def markdown(table: TableCells) -> str:
    headings, lines = table
    rows = [[heading.replace("\n", " ") for heading in headings], ["---:"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@dataclass(frozen=True)
class Section:
    """`measured`: "op", or a phase of the model; `file`: the committed result that fills it."""

    measured: str
    file: str


SECTIONS = {
    "op": Section("op", "2xh200.json"),
    "prefill": Section("prefill", "2xh200-48-layers.json"),
    "decode": Section("decode", "2xh200-48-layers.json"),
    "all_decode": Section("decode", "2xh200.json"),
}


def write_section(section: Section, result: Result) -> str:
    """ValueError where the result has nothing for it."""
    if section.measured == "op":
        rows: Sequence[OpRow | ModelRow] = [row for row in result.op if row.method not in LEFT_OUT]
    else:
        rows = [row for row in result.model if row.phase == section.measured]
    if not rows:
        raise ValueError(f"{section.file} has nothing for the section {section.measured}")
    if section.measured == "op":
        title = f"{op_title(result)}: microseconds a call, median of {rows[0].timing.samples}"
        table = op_table([row for row in rows if isinstance(row, OpRow)])
    else:
        title = model_title(result, section.measured)
        table = model_table(result.model, section.measured)
    versions = result.machine.versions
    names = [*sorted({row.framework for row in rows}), "flashinfer", "nccl"]
    used = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    source = (RESULTS / section.file).relative_to(ROOT).as_posix()
    caption = f"{used}; revision {result.revision}; [{source}]({source})."
    return f"{title} (± the middle 80 %).\n\n{markdown(table)}\n\n{caption}"


def updated(text: str, load: Callable[[str], Result]) -> str:
    """`text` with every marked section written anew, from what `load` gives for its file's name."""

    def write(match: re.Match[str]) -> str:
        name = match[1]
        if name not in SECTIONS:
            raise ValueError(f"unknown section results:{name}; there are {', '.join(SECTIONS)}")
        section = SECTIONS[name]
        written = write_section(section, load(section.file))
        return f"<!-- results:{name} -->\n{written}\n<!-- /results:{name} -->"

    return SECTION.sub(write, text)


def update_readme(*, check: bool) -> bool:
    """Writes README.md's sections -> whether they differed. `check` only looks."""
    before = README.read_text()
    after = updated(before, lambda file: Result.load(RESULTS / file))
    if not check and after != before:
        README.write_text(after)
    return after != before
