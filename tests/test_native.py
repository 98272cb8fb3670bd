"""Compiled kernels without a GPU: which library is found, what is said when there is none, what the kernels refuse."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm_ffi

from core_torch.__main__ import main
from core_torch.kernels import (
    add_norm,
    causal_conv,
    few_rows,
    flashinfer_modules,
    gated_delta_rule,
    gdn_decode,
    moe_decode,
    native,
    norm,
    norm_rope,
    paged_decode,
)
from core_torch.kernels.add_norm import check_add_norm
from core_torch.kernels.gdn_decode import check_gdn_decode, gdn_decode_plain
from core_torch.kernels.moe_decode import check_moe_decode
from core_torch.kernels.norm_rope import check_norm_rope
from core_torch.kernels.paged_decode import check_paged_decode
from core_torch.kernels.vocabulary import check_vocabulary

ARCH = "9.0a"
CPU = torch.device("cpu")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(prebuilt, cache): empty, and the only ones that are searched."""
    prebuilt, cache = tmp_path / "prebuilt", tmp_path / "cache"
    prebuilt.mkdir()
    cache.mkdir()
    monkeypatch.setenv(native.PREBUILT_VARIABLE, str(prebuilt))
    monkeypatch.setenv(native.CACHE_VARIABLE, str(cache))
    monkeypatch.setattr(native, "_loaded", {})
    return prebuilt, cache


def test_a_library_is_named_by_what_it_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {native.library_name(name, arch) for name in native.MODULES for arch in (ARCH, "10.0a")}
    assert len(names) == 2 * len(native.MODULES)
    sources = tmp_path / "csrc"
    shutil.copytree(native.CSRC, sources)
    monkeypatch.setattr(native, "CSRC", sources)
    assert {native.library_name(name, ARCH) for name in native.MODULES} < names
    header = sources / "device.cuh"
    header.write_text(header.read_text() + "\n")
    assert not {native.library_name(name, ARCH) for name in native.MODULES} & names


def test_an_unknown_module_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'gdn'.*gdn_decode, moe_decode, norm_rope, paged_decode"):
        native.library_name("gdn", ARCH)


def test_prebuilt_comes_before_cached(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    prebuilt, cache = folders
    file = native.library_name("gdn_decode", ARCH)
    assert native.find("gdn_decode", ARCH) is None
    (cache / file).touch()
    assert native.find("gdn_decode", ARCH) == cache / file
    (prebuilt / file).touch()
    assert native.find("gdn_decode", ARCH) == prebuilt / file
    monkeypatch.delenv(native.PREBUILT_VARIABLE)
    assert native.find("gdn_decode", ARCH) == cache / file


class Compiler:
    """Stands in for TVM-FFI's: writes an empty library, or fails."""

    def __init__(self, error: str = "") -> None:
        self.calls: list[dict[str, Any]] = []
        self.error = error

    def build(self, name: str, *, sources: list[str], build_directory: str, backend: str) -> str:
        self.calls.append({"name": name, "arch": os.environ["TVM_FFI_CUDA_ARCH_LIST"], "sources": sources})
        if self.error:
            raise RuntimeError(self.error)
        built = Path(build_directory) / f"{name}.so"
        built.touch()
        return str(built)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    stand_in = Compiler()
    monkeypatch.delenv("TVM_FFI_CUDA_ARCH_LIST", raising=False)
    real = native.require_tvm_ffi

    def require(module: str = "tvm_ffi") -> Any:
        return stand_in if module == "tvm_ffi.cpp" else real(module)

    monkeypatch.setattr(native, "require_tvm_ffi", require)
    monkeypatch.setattr(real(), "load_module", lambda path: f"module {path}")
    return stand_in


def test_a_missing_library_is_compiled_once_and_said_so(
    folders: tuple[Path, Path], compiler: Compiler, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = folders[1]
    module = native._load("moe_decode", ARCH)
    assert native._load("moe_decode", ARCH) is module
    assert [call["arch"] for call in compiler.calls] == [ARCH]
    assert Path(compiler.calls[0]["sources"][0]).is_file()
    said = capsys.readouterr().err
    assert f"compiling moe_decode for SM 9.0a into {cache}" in said
    assert "compiled moe_decode in 0 s" in said
    native._loaded.clear()
    assert native._load("moe_decode", ARCH) == module  # another process finds it
    assert len(compiler.calls) == 1
    assert capsys.readouterr().err == ""
    assert sorted(p.name for p in cache.iterdir()) == [
        native.library_name("moe_decode", ARCH),
        "moe_decode.lock",
    ]


def test_a_failed_build_leaves_nothing_and_says_why(folders: tuple[Path, Path], compiler: Compiler) -> None:
    compiler.error = "nvcc: no such file"
    with pytest.raises(RuntimeError, match="nvcc: no such file"):
        native._load("gdn_decode", ARCH)
    assert native.find("gdn_decode", ARCH) is None
    assert "TVM_FFI_CUDA_ARCH_LIST" not in os.environ
    assert main(["prebuild", "--arch", ARCH, "--only", "gdn_decode"]) == 1


def test_prebuild_puts_libraries_where_they_are_found(
    folders: tuple[Path, Path], compiler: Compiler, capsys: pytest.CaptureFixture[str]
) -> None:
    prebuilt, _ = folders
    command = ["prebuild", "--arch", ARCH, "--out", str(prebuilt)]
    command += [word for name in native.MODULES for word in ("--only", name)]
    assert main(command) == 0
    assert all(
        native.find(name, ARCH) == prebuilt / native.library_name(name, ARCH) for name in native.MODULES
    )
    assert len(capsys.readouterr().out.splitlines()) == len(native.MODULES)
    assert main(command) == 0
    assert len(compiler.calls) == len(native.MODULES)  # what is there is not built again


needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists(), reason="needs nvcc"
)


@needs_nvcc
@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("add_norm", ["add_norm"]),
        ("cubin", ["load"]),
        ("few_rows", ["few_rows"]),
        ("gdn_decode", ["gdn_decode", "gdn_decode_ahead"]),
        ("moe_decode", ["moe_route", "moe_group", "moe_decode", "moe_decode_ahead"]),
        ("norm_rope", ["norm_rope"]),
        ("paged_decode", ["paged_decode", "paged_decode_ahead"]),
        ("vocabulary", ["vocabulary_rows", "vocabulary_argmax"]),
    ],
)
def test_prebuild_compiles(folders: tuple[Path, Path], name: str, functions: list[str]) -> None:
    """With the real compiler, and the library loads where there is no GPU."""
    assert main(["prebuild", "--arch", ARCH, "--out", str(folders[0]), "--only", name]) == 0
    module = native._load(name, ARCH)
    assert all(callable(getattr(module, function)) for function in functions)


@needs_nvcc
def test_one_function_serves_short_and_long_reductions(folders: tuple[Path, Path]) -> None:
    """It has FlashInfer's parameters: up to a limit FlashInfer's own function gets them, above it they are read."""
    test_prebuild_compiles(folders, "pair_allreduce", ["pair_allreduce", "pair_or"])
    module, calls = native._load("pair_allreduce", ARCH), []
    buffers, state = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    flashinfer = tvm_ffi.convert(lambda *given: calls.append(given))
    both = module.pair_or(flashinfer, *map(tvm_ffi.from_dlpack, (buffers, state)), 0, 16, 4)

    def given(num_tokens: int, pattern: int) -> list[Any]:
        rows, weight, table = torch.zeros(num_tokens, 8), torch.zeros(8), torch.arange(3)
        x, w, t = map(tvm_ffi.from_dlpack, (rows.bfloat16(), weight.bfloat16(), table))
        norms = [None, x, x, x, None, None, w, 1e-6, None, None, None, 1.0]
        return [
            x,
            2,
            0,
            num_tokens,
            8,
            t,
            True,
            True,
            True,
            True,
            pattern,
            *([x, *[None] * 11], norms)[pattern > 0],
        ]

    for num_tokens, pattern in ((4, 1), (3, 0)):
        both(*given(num_tokens, pattern))
    assert [(call[3], call[10], len(call)) for call in calls] == [(4, 1, 23), (3, 0, 23)]
    for num_tokens, pattern in ((5, 1), (16, 0)):  # its own kernel's first check
        with pytest.raises(ValueError, match="must be on one CUDA device"):
            both(*given(num_tokens, pattern))
    with pytest.raises(ValueError, match="pattern 7 takes at most 4 tokens, got 5"):
        both(*given(5, 7))
    with pytest.raises(TypeError, match="takes 23 parameters, got 22"):
        both(*given(4, 1)[:-1])
    assert len(calls) == 2


def test_a_kernel_that_cannot_be_had_is_not_used(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "device_arch", lambda device: ARCH)
    monkeypatch.setattr(native, "cuda_home", lambda: str(folders[1]))
    answer = native.check_library("gdn_decode", CPU)
    assert not answer.usable
    assert "prebuild --arch 9.0a" in answer.reason
    (folders[0] / native.library_name("gdn_decode", ARCH)).touch()
    assert native.check_library("gdn_decode", CPU).usable


def test_flashinfer_loads_a_prebuilt_module(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("flashinfer")
    from flashinfer.jit import env

    monkeypatch.setattr(env, "FLASHINFER_AOT_DIR", folders[1] / "nothing")
    monkeypatch.setattr(env, "FLASHINFER_JIT_DIR", folders[1] / "nothing")
    assert flashinfer_modules.use_prebuilt("trtllm_comm", ARCH) is None
    assert "FlashInfer compiles trtllm_comm for SM 9.0a" in capsys.readouterr().err
    library = flashinfer_modules.library(folders[0], "trtllm_comm", ARCH)
    library.parent.mkdir(parents=True)
    library.touch()
    assert flashinfer_modules.use_prebuilt("trtllm_comm", "10.0a") is None
    capsys.readouterr()
    assert flashinfer_modules.use_prebuilt("trtllm_comm", ARCH) == library
    assert env.get_aot_path("trtllm_comm") == library
    assert capsys.readouterr().err == ""


GDN = {"num_k_heads": 8, "num_v_heads": 16, "k_dim": 128, "v_dim": 128, "taps": 4, "dtype": torch.bfloat16}
MOE = {
    "num_experts": 512,
    "top_k": 10,
    "hidden_size": 2048,
    "intermediate_size": 256,
    "dtype": torch.bfloat16,
}
PAGED = {"num_heads": 8, "num_kv_heads": 1, "head_dim": 256, "max_num_seqs": 64, "dtype": torch.bfloat16}
ROPE = {"head_dim": 256, "rotary_dim": 64, "dtype": torch.bfloat16}
WIDTH = {"hidden_size": 2048, "dtype": torch.bfloat16}
CHECKS = [
    (check_gdn_decode, GDN),
    (check_moe_decode, MOE),
    (check_paged_decode, PAGED),
    (check_norm_rope, ROPE),
    (check_add_norm, WIDTH),
    (check_vocabulary, WIDTH),
]


@pytest.mark.parametrize(("check", "shapes"), CHECKS)
def test_without_a_gpu_the_plain_path_stays(check: Any, shapes: dict[str, Any]) -> None:
    answer = check(**shapes, device=CPU)
    assert not answer.usable
    assert "CUDA" in answer.reason


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((8, 9), "need SM90 or newer, this GPU is SM89"),
        ((9, 0), ""),
        ((10, 0), ""),
        ((12, 0), "227 KiB of shared memory a block, and SM120 has 99"),
    ],
)
def test_gpus_that_are_taken(
    capability: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    answer = native.check_device(torch.device("cuda", 0))
    assert answer.usable == (reason == "")
    assert reason in answer.reason


@pytest.mark.parametrize(("check", "shapes"), CHECKS)
def test_real_shapes_are_taken(check: Any, shapes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "check_device", lambda device: native.Answer(True))
    assert check(**shapes, device=CPU) == native.Answer(True)


@pytest.mark.parametrize(
    ("check", "shapes", "change", "word"),
    [
        (*CHECKS[0], {"dtype": torch.float32}, "float32"),
        (*CHECKS[0], {"taps": 3}, "3"),
        (*CHECKS[0], {"k_dim": 136}, "136"),
        (*CHECKS[0], {"k_dim": 36}, "36"),
        (*CHECKS[0], {"v_dim": 264}, "264"),
        (*CHECKS[0], {"num_v_heads": 12}, "12"),
        (*CHECKS[0], {"num_v_heads": 8 * 16}, "2048"),
        (*CHECKS[1], {"dtype": torch.float16}, "float16"),
        (*CHECKS[1], {"num_experts": 1025}, "1025"),
        (*CHECKS[1], {"top_k": 33}, "33"),
        (*CHECKS[1], {"hidden_size": 2044}, "2044"),
        (*CHECKS[1], {"intermediate_size": 12}, "12"),
        (*CHECKS[2], {"dtype": torch.float32}, "float32"),
        (*CHECKS[2], {"head_dim": 96}, "96"),
        (*CHECKS[2], {"num_heads": 9}, "9"),
        (*CHECKS[2], {"max_num_seqs": 1025}, "1025"),
        (*CHECKS[3], {"dtype": torch.float32}, "float32"),
        (*CHECKS[3], {"head_dim": 264}, "264"),
        (*CHECKS[3], {"rotary_dim": 24}, "24"),
        (*CHECKS[4], {"dtype": torch.float16}, "float16"),
        (*CHECKS[4], {"hidden_size": 2044}, "2044"),
        (*CHECKS[4], {"hidden_size": 8200}, "8200"),
        (*CHECKS[5], {"dtype": torch.float32}, "float32"),
        (*CHECKS[5], {"hidden_size": 2044}, "2044"),
    ],
)
def test_other_shapes_are_refused_with_the_number(
    check: Any, shapes: dict[str, Any], change: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "check_device", lambda device: native.Answer(True))
    answer = check(**{**shapes, **change}, device=CPU)
    assert not answer.usable
    assert re.search(word, answer.reason), answer.reason


@pytest.mark.parametrize(
    ("source", "constant", "value"),
    [
        ("add_norm", "kMaxDim", add_norm.MAX_DIM),
        ("few_rows", "kMaxRows", few_rows.MAX_ROWS),
        ("gdn_decode", "kMaxKeyDim", gdn_decode.MAX_K_DIM),
        ("gdn_decode", "kMaxValueDim", gdn_decode.MAX_V_DIM),
        ("gdn_decode", "kTaps", gdn_decode.TAPS),
        ("gdn_decode", "kUnitColumns", gdn_decode.UNIT_COLUMNS),
        ("gdn_decode", "kMaxClusterUnits", gdn_decode.MAX_UNITS),
        ("moe_route", "kMaxExperts", moe_decode.MAX_EXPERTS),
        ("moe_route", "kRecord", moe_decode.RECORD),
        ("norm_rope", "kMaxDim", norm_rope.MAX_DIM),
        ("paged_decode", "kMaxGroup", paged_decode.MAX_GROUP),
        ("paged_decode", "kMaxSequences", paged_decode.MAX_SEQUENCES),
        ("paged_decode", "kMaxSplits", paged_decode.MAX_SPLITS),
    ],
)
def test_the_limits_are_the_sources(source: str, constant: str, value: int) -> None:
    """The Python side repeats some constants of the CUDA sources."""
    assert re.search(rf"\b{constant} = {value}[,;]", (native.CSRC / f"{source}.cuh").read_text())


@pytest.mark.parametrize(("H", "HV", "dk", "dv"), [(2, 4, 8, 8), (1, 3, 16, 8)])
def test_gdn_decode_plain(H: int, HV: int, dk: int, dv: int) -> None:
    """Against float64, with a padding row; states of other slots stay."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    channels, slots = 2 * H * dk + HV * dv, torch.tensor([3, 1, 0])
    projected = randn(3, channels + HV * dv + 2 * HV)
    conv, state = randn(5, channels, 3), randn(5, HV, dk, dv)
    weights = {
        "conv_weight": randn(channels, 4),
        "a_log": randn(HV),
        "dt_bias": randn(HV),
        "norm_weight": randn(dv),
    }
    new_conv, new_state = conv.clone(), state.clone()
    out = gdn_decode_plain(projected, new_conv, new_state, slots, **weights, eps=1e-6)
    for row, slot in ((0, 3), (1, 1)):
        qkv, z, b, a = projected[row].double().split([channels, HV * dv, HV, HV])
        mixed, want_conv = causal_conv.causal_conv_reference(qkv[None], conv[slot], weights["conv_weight"])
        q, k, v = mixed.split([H * dk, H * dk, HV * dv], dim=-1)
        g, beta = gated_delta_rule.gated_delta_gates(a, b, weights["a_log"], weights["dt_bias"])
        want, want_state = gated_delta_rule.gated_delta_rule_reference(
            q.view(1, H, dk), k.view(1, H, dk), v.view(1, HV, dv), g[None], beta[None], state[slot]
        )
        want = norm.gated_rms_norm_reference(want[0], z.view(HV, dv), weights["norm_weight"], eps=1e-6)
        assert torch.allclose(out[row].double(), want.flatten(), rtol=1e-4, atol=1e-5)
        assert torch.allclose(new_state[slot].double(), want_state, rtol=1e-4, atol=1e-5)
        assert torch.allclose(new_conv[slot].double(), want_conv, rtol=1e-6)
    assert torch.equal(new_state[[2, 4]], state[[2, 4]])
    assert torch.equal(new_conv[[2, 4]], conv[[2, 4]])
