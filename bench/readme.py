"""Writes README's tables from committed results, between markers, so that no number in it is typed by hand.

<!-- results:op -->      the reduction by number of tokens
<!-- results:prefill --> <!-- results:decode -->      the model; <!-- results:all_decode --> in all frameworks
<!-- results:kernels -->     the own kernels, of a decode step and of a pass of prefill
<!-- /results:op -->     (and so on) ends a section
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.report import (
    TableCells,
    kernel_title,
    model_table,
    model_title,
    op_table,
    op_title,
    share_table,
)
from bench.result import Result

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
LEFT_OUT = ("fused_oneshot", "fused_twoshot")  # they are in the JSON file; a reader wants what an engine runs
SECTION = re.compile(r"<!-- results:(\w+) -->\n.*?<!-- /results:\1 -->", re.DOTALL)


def markdown(table: TableCells) -> str:
    headings, lines = table
    marks = [":---" if heading == "kernel" else "---:" for heading in headings]
    rows = [[heading.replace("\n", " ") for heading in headings], marks, *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@dataclass(frozen=True)
class Section:
    """`measured`: "op", "kernels", or a phase of the model; `file`: the committed result that fills it."""

    measured: str
    file: str


SECTIONS = {
    "op": Section("op", "2xh200.json"),
    "prefill": Section("prefill", "2xh200-48-layers.json"),
    "decode": Section("decode", "2xh200-48-layers.json"),
    "all_decode": Section("decode", "2xh200.json"),
    "kernels": Section("kernels", "2xh200.json"),
}


def write_section(section: Section, result: Result) -> str:
    """ValueError where the result has nothing for it."""
    frameworks: set[str] = set()
    libraries = ["flashinfer", "nccl"]
    parts = []
    if section.measured == "op":
        rows = [row for row in result.op if row.method not in LEFT_OUT]
        frameworks = {row.framework for row in rows}
        if rows:
            title = f"{op_title(result)}: microseconds a call, median of {rows[0].timing.samples} (± the middle 80 %)"
            parts = [(title, op_table(rows))]
    elif section.measured == "kernels":
        libraries = ["torch", "triton"]
        for phase in ("decode", "prefill"):
            if any(row.phase == phase and row.timing is not None for row in result.kernels):
                title = (
                    f"{kernel_title(result, phase)}: microseconds by tokens, and share of the floor's rate"
                )
                parts.append((title, share_table(result.kernels, phase)))
    else:
        frameworks = {row.framework for row in result.model if row.phase == section.measured}
        if frameworks:
            title = f"{model_title(result, section.measured)} (± the middle 80 %)"
            parts = [(title, model_table(result.model, section.measured))]
    if not parts:
        raise ValueError(f"{section.file} has nothing for the section {section.measured}")
    versions = result.machine.versions
    used = ", ".join(
        f"{name} {versions[name]}" for name in [*sorted(frameworks), *libraries] if name in versions
    )
    source = (RESULTS / section.file).relative_to(ROOT).as_posix()
    caption = f"{used}; revision {result.revision}; [{source}]({source})."
    return "\n\n".join([*(f"{title}.\n\n{markdown(table)}" for title, table in parts), caption])


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
