"""Prefill's tables and questions, on CPU: which chunks and cache places a pass has, what its kernels take."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from core_torch.__main__ import main
from core_torch.batch import Span, build_prefill
from core_torch.kernels import gdn_prefill, moe_prefill, native, triton_kernels
from core_torch.kernels.attention import attention_reference
from core_torch.kernels.flash_prefill import (
    EVEN_BACKENDS,
    check_even_prefill,
    check_flash_prefill,
    even_attention,
    flat_slots,
    lay_out,
)
from core_torch.kernels.gdn_prefill import CARRIES, check_gdn_prefill, choose_carry, cut_into_chunks
from core_torch.kernels.moe_prefill import Tile, Tiles, check_moe_prefill, choose_tiles, down_launch
from core_torch.kernels.native import Answer
from core_torch.kernels.triton_kernels import Launch, launch
from core_torch.prebuild import prefill_kernels
from shared_config import ParallelLayout, Qwen3NextConfig
from shared_config.layout import RankPlace
from shared_config.placement import place_step
from shared_config.presets import PRESETS
from shared_config.sampling import SamplingParams
from shared_config.scheduler import Chunk, Sequence, Step

CPU = torch.device("cpu")
TINY = Path(__file__).parent / "data/tiny-qwen3-next"


def test_states_are_carried_as_wide_as_leaves_enough_programs() -> None:
    columns = {states: choose_carry(states, 128).columns for states in (256, 128, 65, 64, 33, 32, 1)}
    assert columns == {256: 64, 128: 64, 65: 64, 64: 32, 33: 32, 32: 16, 1: 16}
    assert choose_carry(512, 32).columns == 64  # more than a head has: all of them
    assert all(carry.stages > 1 for carry in CARRIES)


def test_chunks_never_cross_the_end_of_a_sequence() -> None:
    spans = [Span(0, 130, 0, 3), Span(130, 1, 7, 1), Span(131, 64, 0, 2)]
    found = cut_into_chunks(spans, CPU)
    assert found.sequences.tolist() == [[0, 130, 3, 0, 0], [130, 1, 1, 1, 3], [131, 64, 2, 0, 4]]
    assert found.chunks.tolist() == [
        [0, 64, 0, 0],
        [64, 64, 64, 0],
        [128, 2, 128, 0],
        [130, 1, 0, 1],
        [131, 64, 0, 2],
    ]
    assert found.sequences.dtype == found.chunks.dtype == torch.int32
    assert found.sequences.is_contiguous()
    assert found.chunks.is_contiguous()


def test_keys_lie_where_the_pages_say() -> None:
    assert flat_slots([5, 2, 9], 3, 10, 4).tolist() == [23, 8, 9, 10, 11, 36, 37]
    ragged = lay_out([2, 3], [[5, 2], [7]], [6, 3], 4, CPU)
    assert ragged.query_ends.tolist() == [0, 2, 5]
    assert ragged.key_ends.tolist() == [0, 6, 9]
    assert ragged.key_rows.tolist() == [20, 21, 22, 23, 8, 9, 28, 29, 30]
    assert (ragged.longest_query, ragged.longest_key) == (3, 6)
    assert not ragged.even
    assert ragged.query_ends.dtype == ragged.key_ends.dtype == torch.int32


def test_fresh_sequences_of_usual_lengths_are_even() -> None:
    pages = [list(range(128)), list(range(128, 256))]
    assert lay_out([1024, 1024], pages, [1024, 1024], 16, CPU).even
    assert not lay_out([1024, 1024], pages, [1024, 2048], 16, CPU).even
    assert not lay_out([1024, 1008], pages, [1024, 1008], 16, CPU).even
    assert not lay_out([512, 512], pages, [512, 512], 16, CPU).even


@pytest.mark.parametrize("G", [1, 4])
def test_even_attention(G: int) -> None:
    q, k, v = (torch.randn(2 * 48, heads, 32) for heads in (4, G, G))
    got = even_attention(q, k, v, 48, scale=0.2, backends=EVEN_BACKENDS)
    for rows in (slice(48), slice(48, None)):
        want = attention_reference(q[rows], k[rows], v[rows], scale=0.2)
        assert (got[rows].double() - want).abs().max() < 1e-5


def sequence(index: int, prompt: list[int], pages: list[int], slot: int) -> Sequence:
    return Sequence(index, prompt, SamplingParams(max_tokens=1), pages=pages, slot=slot)


def test_a_pass_has_its_tables_once_and_padding_is_one_more_sequence() -> None:
    first, second = sequence(0, list(range(100, 110)), [4, 1, 6], 2), sequence(1, [7, 8, 9], [3], 1)
    step = Step(True, (Chunk(first, 5, 5, True), Chunk(second, 0, 3, True)))
    placement = place_step(step, ParallelLayout(), round_up=lambda rows: rows + 2)
    batch = build_prefill(placement, RankPlace(0, 0, 0, 0, 0, 0), [(0, 4), (1, 2)], page_size=4, device=CPU)
    assert batch.token_ids.tolist() == [105, 106, 107, 108, 109, 7, 8, 9, 0, 0]
    assert batch.positions.tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 0, 1]
    assert batch.kv_slots.tolist() == [5, 6, 7, 24, 25, 12, 13, 14, 0, 1]
    assert batch.lengths.tolist() == [10, 3, 2]
    assert batch.state_slots.tolist() == [2, 1, 0]
    assert batch.page_tables.tolist() == [[4, 1, 6], [3, 0, 0], [0, 0, 0]]
    assert batch.logit_rows is not None
    assert batch.logit_rows.tolist() == [4, 7]
    assert batch.chunks is not None
    assert batch.chunks.sequences[:, :4].tolist() == [[0, 5, 2, 1], [5, 3, 1, 0], [8, 2, 0, 0]]
    assert batch.ragged is not None
    assert batch.ragged.key_rows.tolist() == [16, 17, 18, 19, 4, 5, 6, 7, 24, 25, 12, 13, 14, 0, 1]
    assert batch.ragged.query_ends.tolist() == [0, 5, 8, 10]


GDN = {"num_k_heads": 8, "num_v_heads": 16, "k_dim": 128, "v_dim": 128, "taps": 4, "dtype": torch.bfloat16}
MOE = {
    "num_experts": 513,
    "top_k": 11,
    "hidden_size": 2048,
    "intermediate_size": 256,
    "dtype": torch.bfloat16,
}
FLASH = {"num_heads": 8, "num_kv_heads": 1, "head_dim": 256, "dtype": torch.bfloat16}
CHECKS = [(check_gdn_prefill, GDN), (check_moe_prefill, MOE), (check_flash_prefill, FLASH)]
EVERY_CHECK = [*CHECKS, (check_even_prefill, FLASH)]


@pytest.mark.parametrize(("check", "shapes"), EVERY_CHECK)
def test_without_a_gpu_the_plain_path_stays(check: Any, shapes: dict[str, Any]) -> None:
    answer = check(**shapes, device=CPU)
    assert not answer.usable
    assert "CUDA" in answer.reason


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    for module in (gdn_prefill, moe_prefill):
        monkeypatch.setattr(module, "check_triton", lambda device: Answer(True))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    return torch.device("cuda")


@pytest.mark.parametrize(("check", "shapes"), CHECKS)
def test_real_shapes_are_taken(check: Any, shapes: dict[str, Any], on_gpu: torch.device) -> None:
    assert check(**shapes, device=on_gpu) == Answer(True)


@pytest.mark.parametrize(
    ("check", "shapes", "change", "word"),
    [
        (*CHECKS[0], {"dtype": torch.float32}, "float32"),
        (*CHECKS[0], {"taps": 17}, "17"),
        (*CHECKS[0], {"v_dim": 64}, "128 and 64"),
        (*CHECKS[0], {"k_dim": 48, "v_dim": 48}, "48 and 48"),
        (*CHECKS[0], {"num_v_heads": 12}, "12 on 8"),
        (*CHECKS[1], {"dtype": torch.float16}, "float16"),
        (*CHECKS[1], {"num_experts": 1025}, "1025"),
        (*CHECKS[1], {"top_k": 33}, "33"),
        (*CHECKS[1], {"hidden_size": 2056}, "2056"),
        (*CHECKS[1], {"intermediate_size": 24}, "24"),
        (*CHECKS[2], {"dtype": torch.float32}, "float32"),
        (*CHECKS[2], {"head_dim": 264}, "264"),
        (*CHECKS[2], {"num_kv_heads": 3}, "8 on 3"),
    ],
)
def test_other_shapes_are_refused_with_the_number(
    check: Any, shapes: dict[str, Any], change: dict[str, Any], word: str, on_gpu: torch.device
) -> None:
    answer = check(**{**shapes, **change}, device=on_gpu)
    assert not answer.usable
    assert word in answer.reason


def test_tiles_grow_with_the_tokens_of_an_expert() -> None:
    assert [choose_tiles(n, 256).tokens for n in (1, 48, 49, 104, 105, 1000)] == [64, 64, 128, 128, 192, 192]
    assert [choose_tiles(n, 256).down.whole for n in (104, 105)] == [False, True]
    wide = choose_tiles(105, 512).down
    assert not wide.whole
    with pytest.raises(ValueError, match="holds 512 values of a row"):
        down_launch(10, 2048, 512, replace(wide, whole=True))
    with pytest.raises(ValueError, match="tiles of as many tokens"):
        Tiles(Tile(64, 3, 256, 64, 8, 3), Tile(64, 2, 128, 64, 4, 2))


COMBINE = Launch("moe_prefill", "combine", (5, 1), {"N": 7, "D": 32, "K": 3, "BLOCK_D": 32})
COMBINED = COMBINE.kernel(["bfloat16", "int32", "bfloat16"], [])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(native.PREBUILT_VARIABLE, raising=False)
    return tmp_path


def test_a_kernel_is_compiled_once_and_said_so(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the real Triton, which needs no GPU to compile."""
    build = partial(triton_kernels.build, COMBINED, "9.0a")
    file = native.find_or_make(COMBINED.file_name("9.0a"), "moe_prefill", build)
    assert re.fullmatch(r"crossfuse: Triton compiled combine in \d+\.\d s\n", capsys.readouterr().err)
    assert native.find_or_make(COMBINED.file_name("9.0a"), "moe_prefill", build) == file
    assert capsys.readouterr().err == ""
    assert sorted(p.name for p in cache.iterdir()) == [file.name, "moe_prefill.lock"]
    made = json.loads(file.read_text())
    assert base64.b64decode(made["cubin"]).startswith(b"\x7fELF")
    assert (made["name"], made["threads"]) == ("combine", 128)
    assert made["unused"] >= 0


def test_a_launch_finds_its_function_once_for_its_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    ran: list[Any] = []

    def function(kernel: Any, device: torch.device) -> Any:
        found.append((kernel, device))
        return lambda *operands: ran.append(operands)

    monkeypatch.setattr(triton_kernels, "function", function)
    how = Launch("moe_prefill", "combine", (5, 1), {"N": 7})
    parts, experts = torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int32)
    for _ in range(2):
        launch(how, parts, experts, 3, 0.5)
    assert found == [(how.kernel(["bfloat16", "int32"], [3, 0.5]), CPU)]
    launch(how, parts, experts.long(), 3, 0.5)  # other types are another kernel
    assert [kernel.types for kernel, _ in found] == [
        ("*bf16", "*i32", "i32", "fp32"), ("*bf16", "*i64", "i32", "fp32")
    ]  # fmt: skip
    assert [operands[2:] for operands in ran] == [(3, 0.5, 5, 1)] * 3


def test_without_triton_the_error_says_how_to_get_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="pip install triton"):
        triton_kernels.build(COMBINED, "9.0a", cache)
    assert not any(cache.iterdir())


def test_a_file_is_named_by_all_that_its_code_depends_on() -> None:
    others = [
        replace(COMBINED, sizes=(("N", 8), *COMBINED.sizes[1:])),
        replace(COMBINED, warps=8),
        replace(COMBINED, registers=128),
        COMBINE.kernel(["bfloat16", "int64", "bfloat16"], []),
        COMBINE.kernel(["bfloat16", "int32", "bfloat16"], [1.0]),
    ]
    names = {kernel.file_name("9.0a") for kernel in (COMBINED, *others)} | {COMBINED.file_name("10.0a")}
    assert len(names) == len(others) + 2
    assert others[-1].scalars == "f"
    assert replace(COMBINE, grid=(9, 9)).kernel(["bfloat16", "int32", "bfloat16"], []) == COMBINED


def test_prebuild_knows_what_the_layers_run() -> None:
    """On the meta device: each choice of tiles and carries, with the shared expert among the others and without."""
    kernels = prefill_kernels(Qwen3NextConfig.from_hf(PRESETS["80b"]), tp=2)
    names = Counter(kernel.name for kernel in kernels)
    once = dict.fromkeys(("mix", "keep_inputs", "solve", "finish"), 1)
    twice = dict.fromkeys(("route", "count", "combine"), 2)
    assert names == once | twice | {"carry": 3, "scatter": 6, "gate_up": 6, "down": 3}
    assert {dict(k.sizes)["STRIDE"] for k in kernels if k.name == "mix"} == {2 * 8 * 128 + 2 * 16 * 128 + 32}
    assert {dict(k.sizes)["N"] for k in kernels if k.name == "combine"} == {512, 513}


def test_prebuild_compiles_them(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prebuild", "--arch", "9.0a", "--model", str(TINY), "--tp", "1", "--only", "gdn_prefill"]
    assert main([*command, "--out", str(cache / "kernels")]) == 0
    files = sorted((cache / "kernels").iterdir())
    names = ["carry", "carry", "finish", "keep_inputs", "mix", "solve"]  # wide and narrow
    assert [file.name.split("-")[1] for file in files] == names
    assert len(capsys.readouterr().out.splitlines()) == len(files)
    assert main([*command, "--out", str(cache / "kernels")]) == 0
    assert capsys.readouterr().err == ""  # what is there is not compiled again
