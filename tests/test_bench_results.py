"""Statistics, the schema of results, and what is made of them: tables, plots, comparisons, README."""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import readme
from bench.__main__ import main
from bench.codec import from_plain, to_plain
from bench.compare import compare, differences
from bench.machine import Rates
from bench.measuring import kernel_floor_us, pair_refusal
from bench.plots import draw
from bench.report import (
    crossing,
    kernel_table,
    model_gain,
    model_table,
    op_gain,
    op_table,
    share_table,
    summary,
)
from bench.result import OpSpec, Result
from bench.stats import Timing, beyond_spread, quantile, slowest, summarize
from bench.trace import covered
from tests.bench_cases import kernel_row, kernel_spec, model_row, model_spec, op_row, result


def test_quantiles_lie_between_samples() -> None:
    assert quantile([4, 1, 3, 2], 0.5) == 2.5
    assert quantile([4, 1, 3, 2], 0) == 1
    assert quantile([4, 1, 3, 2], 1) == 4
    assert quantile([7], 0.9) == 7
    with pytest.raises(ValueError, match="empty"):
        quantile([], 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        quantile([1.0], 1.5)


def test_a_summary_is_the_median_and_the_middle_of_the_samples() -> None:
    samples = [float(i) for i in range(1, 12)]
    random.Random(0).shuffle(samples)
    assert summarize(samples) == Timing(6.0, 2.0, 10.0, 11)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_duration_that_cannot_be_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        summarize([1.0, bad])


def test_a_collective_takes_as_long_as_its_slowest_rank() -> None:
    assert slowest([[1.0, 5.0], [2.0, 3.0]]) == [2.0, 5.0]
    with pytest.raises(ValueError, match="shorter"):
        slowest([[1.0, 5.0], [2.0]])


def test_only_ranges_apart_differ() -> None:
    assert beyond_spread(Timing(10, 9, 11, 5), Timing(13, 12, 14, 5))
    assert beyond_spread(Timing(10, 9, 11, 5), Timing(8, 7, 8.5, 5))
    assert not beyond_spread(Timing(10, 9, 11, 5), Timing(11.5, 10.5, 13, 5))


def test_overlapping_spans_count_once() -> None:
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert covered([]) == 0


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    result().save(file)
    assert Result.load(file) == result()


def _set(plain: Any, place: str, value: Any) -> None:
    *way, last = place.split("/")
    for key in way:
        plain = plain[int(key) if isinstance(plain, list) else key]
    plain[last] = value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("schema_version", 99, "schema_version must be 1, got 99"),
        (
            "op/0/timing/median_us",
            "fast",
            r"Result.op\[0\].timing.median_us must be of type float, got 'fast'",
        ),
        ("op/1/fused", True, r"Result.op\[1\].fused must be of type int, got True"),
        ("machine/versions/torch", 2, r"Result.machine.versions\['torch'\] must be of type str"),
        (
            "decisions/torch op/rules/0/passed",
            1,
            r"decisions\['torch op'\].rules\[0\].passed must be of type bool",
        ),
        ("decisions/torch op/rules/0/value", [], "value must be of type str"),
        ("model", {}, "Result.model must be of type list"),
        ("decisions", [], "Result.decisions must be of type dict"),
        ("decisions/torch op", 3, r"decisions\['torch op'\] must be of type dict, got 3"),
        ("typo", 1, r"unknown \['typo'\]"),
    ],
)
def test_a_file_that_is_no_result_is_refused_by_its_place(
    tmp_path: Path, place: str, value: Any, message: str
) -> None:
    plain = to_plain(result())
    _set(plain, place, value)
    file = tmp_path / "result.json"
    file.write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=message):
        Result.load(file)


def test_a_missing_value_is_refused() -> None:
    plain = to_plain(result().op_spec)
    del plain["tokens"]
    with pytest.raises(ValueError, match=r"OpSpec: missing \['tokens'\]"):
        from_plain(OpSpec, plain)
    assert from_plain(OpSpec, to_plain(result().op_spec)) == result().op_spec


def test_gain_and_crossing_are_against_the_fastest_unfused_way() -> None:
    rows = (*result().op, op_row("unfused", 8, 20.0), op_row("allreduce", 8, 1.0))
    assert op_gain(rows, 8) == 2.0
    assert op_gain(rows, 4096) == pytest.approx(0.9)
    assert crossing(rows) == 8
    assert crossing([op_row("fused", 1, 9.0), op_row("unfused", 1, 5.0)]) is None


def test_tables_have_a_cell_for_everything_measured() -> None:
    headings, lines = op_table(result().op)
    assert [heading.replace("\n", " ") for heading in headings] == [
        "tokens", "torch fused", "torch all-reduce + norm", "link floor", "gain",
    ]  # fmt: skip
    assert lines[0] == ["8", "4.0 ± 0.2", "8.0 ± 0.4", "0.1", "2.00x"]
    headings, lines = model_table(result().model, "decode")
    assert len(lines) == 3
    assert dict(zip(headings, lines[0], strict=True)) == {
        "batch": "8", "prompt": "128", "": "torch", "fusion": "on", "ms": "5.00 ± 0.25", "tokens/s": "1,600",
        "floor ms": "1.67", "of floor": "3.0x", "experts": "75", "comm.": "20%", "fused": "96/96",
    }  # fmt: skip
    assert model_gain(result().model, "torch", "decode", 8, 128) == pytest.approx(1.1)


def test_the_last_line_is_json_with_units() -> None:
    line = json.loads(json.dumps(summary(result())))
    assert line["op_gain_by_tokens"] == {"8": 2.0, "4096": 0.9}
    assert line["decode torch fusion on batch 8 128 prompt tokens: ms"] == 5.0


KERNELS = (
    kernel_row("gdn_decode", 1, 2.0),
    kernel_row("gdn_decode", 8, 8.0),
    kernel_row("paged_decode", 8, 4.0, length=1024, flops=4e6),
    kernel_row("moe_prefill: experts", 8192, 1000.0, phase="prefill", flops=3e11),
    kernel_row("pair_allreduce", 8192, 100.0, phase="prefill", wire_bytes=33_000_000),
    kernel_row("norm_rope", 8, None),
)


def test_a_kernel_stands_beside_plain_torch_and_its_floor() -> None:
    headings, lines = kernel_table(KERNELS, "decode")
    rows = [dict(zip(headings, line, strict=True)) for line in lines]
    assert rows[1] == {
        "kernel": "gdn_decode", "tokens": "8", "length": "", "us": "8.0 ± 0.4", "plain torch us": "100.0 ± 5.0",
        "floor us": "2.0", "share": "25%", "MB": "8.0", "GB/s": "1000", "link GB/s": "-", "TFLOP/s": "-",
        "apart": "0.002",
    }  # fmt: skip
    assert (rows[2]["length"], rows[2]["TFLOP/s"]) == ("1024", "1.0")
    assert (rows[3]["kernel"], rows[3]["us"], rows[3]["share"]) == ("norm_rope", "-", "-")
    prefill = [dict(zip(headings, line, strict=True)) for line in kernel_table(KERNELS, "prefill")[1]]
    assert [row["kernel"] for row in prefill] == ["moe_prefill: experts", "pair_allreduce"]
    assert [row["link GB/s"] for row in prefill] == ["-", "330"]
    assert share_table(KERNELS, "decode") == (
        ["kernel", "1", "8"],
        [["gdn_decode", "2.0 (25%)", "8.0 (25%)"], ["paged_decode, length 1024", "-", "4.0 (25%)"]],
    )


def test_kernels_are_in_the_json_line_and_compared() -> None:
    measured = result(kernels=KERNELS)
    line = summary(measured)["decode kernels: us (share of floor) by tokens"]
    assert line == {
        "gdn_decode": {"1": "2.0 (25%)", "8": "8.0 (25%)"},
        "paged_decode, length 1024": {"8": "4.0 (25%)"},
    }
    slower = result(kernels=(kernel_row("gdn_decode", 8, 10.0),))
    verdicts = {
        change.key: change.verdict for change in compare(measured, slower) if change.verdict != "same"
    }
    assert verdicts == {"kernel gdn_decode, decode, 8 tokens": "slower"}


def test_a_pass_of_prefill_is_one_prompt_or_as_many_as_fit() -> None:
    assert kernel_spec().passes == ((1, 1024), (8, 1024))
    assert kernel_spec(lengths=(3000, 8192, 9000)).passes == ((1, 3000), (2, 3000), (1, 8192))


def test_results_of_before_there_were_kernels_are_read(tmp_path: Path) -> None:
    plain = to_plain(result())
    del plain["kernels"], plain["kernel_spec"], plain["decisions"]["torch op"]["pair"]
    file = tmp_path / "result.json"
    file.write_text(json.dumps(plain))
    loaded = Result.load(file)
    assert loaded.kernels == ()
    assert loaded.decisions["torch op"].pair.max_bytes == 0


def test_results_of_before_kernels_had_peers_are_read(tmp_path: Path) -> None:
    plain = to_plain(result(kernels=KERNELS[:1]))
    del plain["kernels"][0]["wire_bytes"]
    file = tmp_path / "result.json"
    file.write_text(json.dumps(plain))
    assert Result.load(file).kernels == KERNELS[:1]


def test_a_kernel_cannot_be_faster_than_its_bytes_its_products_or_its_link() -> None:
    rates = Rates(memory_bytes_per_s=4e12, flops_per_s=800e12, link_bytes_per_s=400e9)
    row = kernel_row(
        "pair_allreduce: choices", 8, None, memory_bytes=4_000_000, flops=1.6e9, wire_bytes=1_200_000
    )
    assert kernel_floor_us(row, rates) == pytest.approx(3)
    assert kernel_floor_us(replace(row, wire_bytes=0), rates) == pytest.approx(2)
    assert kernel_floor_us(replace(row, wire_bytes=0, flops=0.0), rates) == pytest.approx(1)


def test_what_two_ranks_run_is_left_out_with_a_reason() -> None:
    machine = result().machine
    assert pair_refusal(kernel_spec(), machine) == ""
    assert "for 2 ranks, and --tp is 4" in pair_refusal(kernel_spec(tp=4), machine)
    alone = replace(machine, hardware=replace(machine.hardware, num_gpus=1))
    assert "needs 2 GPUs, this machine has 1" in pair_refusal(kernel_spec(), alone)
    assert pair_refusal(kernel_spec(device="cpu"), alone) == ""


def test_plots_are_drawn(tmp_path: Path) -> None:
    files = draw(result(kernels=KERNELS), tmp_path)
    assert [file.name for file in files] == ["op.png", "prefill.png", "decode.png", "kernels.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000 for file in files)


def test_compare_tells_change_from_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = result()
    after = dataclasses.replace(
        result(
            op=(op_row("fused", 8, 4.1), op_row("fused", 4096, 120.0), op_row("fused", 1, 3.0)),
            model=(model_row("decode", "on", 8, 4000.0),),
        ),
        revision="ba9876543210",
        machine=dataclasses.replace(before.machine, versions=before.machine.versions | {"torch": "2.12.0"}),
    )
    verdicts = {change.key: change.verdict for change in compare(before, after)}
    assert verdicts == {
        "op torch fused, 8 tokens": "same",
        "op torch fused, 4096 tokens": "slower",
        "decode torch, fusion on, batch 8, 128 prompt tokens": "faster",
    }
    assert differences(before, after) == [
        "revision: 0123456789ab -> ba9876543210",
        "version of torch: 2.11.0 -> 2.12.0",
    ]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    before.save(files[0])
    after.save(files[1])
    assert main(["compare", *map(str, files)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["slower"] == {"op torch fused, 4096 tokens": 1.2}
    assert last["rows"] == 3


def test_compare_of_unrelated_or_broken_files_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result(op=(), model=(model_row("decode", "on", 1, 1.0),)).save(tmp_path / "a.json")
    result(model=()).save(tmp_path / "b.json")
    (tmp_path / "c.json").write_text("[]")
    for other, message in (
        ("b.json", "no row in common"),
        ("c.json", "c.json is not a result"),
        ("d.json", "d.json"),
    ):
        assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / other)]) == 2
        assert message in capsys.readouterr().err


def test_readme_sections_are_written_from_results() -> None:
    empty = "<!-- results:decode -->\n<!-- /results:decode -->\n"
    text = f"top\n<!-- results:op -->\nold\n<!-- /results:op -->\nmiddle\n{empty}"
    once = readme.updated(text, lambda _: result())
    assert "old" not in once
    assert "| 8 | 4.0 ± 0.2 | 8.0 ± 0.4 | 0.1 | 2.00x |" in once
    assert "80b, 48 layers, random weights" in once
    assert readme.updated(once, lambda _: result()) == once
    kernels = readme.updated(
        "<!-- results:kernels -->\n<!-- /results:kernels -->", lambda _: result(kernels=KERNELS)
    )
    assert "| gdn_decode | 2.0 (25%) | 8.0 (25%) |" in kernels
    assert "kernels of a pass of prefill: 80b, bfloat16, one of 2 ranks, 2x NVIDIA H200" in kernels
    with pytest.raises(ValueError, match=r"2xh200.json has nothing for the section op"):
        readme.updated(text, lambda _: result(op=()))
    with pytest.raises(ValueError, match="unknown section results:typo"):
        readme.updated("<!-- results:typo -->\n<!-- /results:typo -->", lambda _: result())


def test_readme_says_what_the_committed_results_say() -> None:
    assert not readme.update_readme(check=True), "run `python -m bench readme`"


def test_committed_results_really_fused() -> None:
    results = (Path(readme.ROOT) / "bench" / "results").glob("*.json")
    files = sorted(
        file for file in results if not file.stem.endswith("-parity")
    )  # parity has a format of its own
    assert files
    for file in files:
        loaded = Result.load(file)
        fused = [row for row in loaded.op if row.method.startswith("fused")]
        assert all(row.fused > 0 and row.unfused == 0 for row in fused), file
        decode = [row for row in loaded.model if (row.phase, row.fusion) == ("decode", "on")]
        assert all(row.fused > 0 for row in decode), file


def test_a_cell_must_fit_into_the_cache() -> None:
    spec = model_spec()
    pages = 8 * spec.pages_per_sequence
    spec.check_pages(pages)
    with pytest.raises(ValueError, match=f"needs {pages} KV pages, and memory is left for {pages - 1}"):
        spec.check_pages(pages - 1)
