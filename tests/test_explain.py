"""`python -m shared_config explain`: what it prints, what it answers in JSON, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared_config.__main__ import main
from shared_config.explain import SM_BY_GPU_NAME
from tests.test_config import HUB_CONFIG, hub_config

H100 = ["--gpu", "NVIDIA H100 80GB HBM3", "--flashinfer-version", "0.7.2"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_model(tmp_path, HUB_CONFIG)


def write_model(directory: Path, config: dict[str, Any]) -> str:
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["explain", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that bad input gets."""
    with pytest.raises(SystemExit) as caught:
        main(["explain", *arguments])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return captured.err


def rule(answer: dict[str, Any], name: str) -> dict[str, Any]:
    return next(result for result in answer["rules"] if result["name"] == name)


def test_yes_for_another_machine(capsys: pytest.CaptureFixture[str], model: str) -> None:
    answer = ask(capsys, "--model", model, "--tp", "2", *H100)
    assert answer["enabled"] is True
    assert (answer["backend"], answer["decided_by"], answer["warnings"]) == ("trtllm", "all rules", [])
    assert (answer["max_bytes"], answer["max_tokens"]) == (8 * 1024 * 1024, 8192)
    assert answer["pair"]["above"] == 2 * 1024 * 1024
    assert answer["hardware"]["sm"] == 90
    assert answer["groups"]["attn_tp"] == [[0, 1]]
    assert answer["refused"] == ""


@pytest.mark.parametrize(
    ("arguments", "decided_by"),
    [
        (["--deterministic"], "deterministic"),
        (["--fusion", "off"], "fusion"),
        (["--sm", "89"], "compute capability"),
        (["--tp", "1"], "tensor parallel"),
        (["--dp-attention"], "attention data parallel"),
        (["--dp", "2"], "attention data parallel"),
        (["--nnodes", "2"], "single node"),
        (["--gpu", "NVIDIA H20", "--flashinfer-version", "0.6.9"], "device ban"),
        (["--moe-a2a", "deepep"], "MoE all-to-all backend"),
        (["--flashinfer-version", "0.6.1"], "FlashInfer"),
        (["--backend", "mnnvl"], "multicast"),
        (["--backend", "mnnvl", "--allow-multicast"], "multicast"),
    ],
)
def test_no_is_an_answer_too(
    capsys: pytest.CaptureFixture[str], model: str, arguments: list[str], decided_by: str
) -> None:
    answer = ask(capsys, "--model", model, "--tp", "4", *H100, *arguments)
    assert (answer["enabled"], answer["backend"], answer["decided_by"]) == (False, "unfused", decided_by)
    assert decided_by in answer["reason"]
    assert not any(debt["fuses"] for debt in answer["debts"])


def test_who_owes_what_to_whom(capsys: pytest.CaptureFixture[str], model: str) -> None:
    layout = ["--tp", "8", "--cp", "2", "--moe-dp", "2", "--ep", "2"]
    answer = ask(capsys, "--model", model, *layout, *H100)
    attention, mlp = answer["debts"]
    assert attention["groups"] == mlp["groups"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert (attention["fuses"], mlp["fuses"]) == (True, True)
    assert answer["groups"]["attn_cp"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert answer["groups"]["moe_ep"] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert [exchange["group"] for exchange in answer["exchanges"]] == ["attn_cp", "pieces"]


def test_what_a_moe_over_several_attention_pieces_gathers(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    answer = ask(capsys, "--model", model, "--tp", "2", "--cp", "2", *H100)
    attention, mlp = answer["debts"]
    assert attention["paid_by"].startswith("nobody")
    assert mlp["paid_by"].startswith("all-reduce at once")
    assert "attn_cp_size 2 is above moe_dp_size 1" in mlp["reason"]
    between = {exchange["group"]: exchange["groups"] for exchange in answer["exchanges"]}
    assert between == {"attn_cp": [[0, 1]], "prefill_gather": [[0, 1]], "pieces": [[0, 1]]}
    assert main(["explain", "--model", model, "--tp", "4", "--dp", "2", *H100]) == 0
    assert "decode_gather" in capsys.readouterr().out


def test_attention_data_parallel_without_a_number_is_one_copy_per_rank(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    answer = ask(capsys, "--model", model, "--tp", "8", "--cp", "2", "--dp-attention", *H100)
    assert rule(answer, "attention data parallel")["value"] == 4
    assert answer["groups"]["attn_tp"] == [[rank] for rank in range(8)]


def test_fusion_on_shows_what_would_be_refused(capsys: pytest.CaptureFixture[str], model: str) -> None:
    answer = ask(
        capsys, "--model", model, "--tp", "4", "--fusion", "on", *H100, "--sm", "80", "--nnodes", "2"
    )
    assert answer["enabled"] is False
    assert "compute capability (80)" in answer["refused"]
    assert "single node (2)" in answer["refused"]
    assert main(["explain", "--model", model, "--fusion", "on", *H100]) == 0
    assert "refused: a run would stop with" in capsys.readouterr().out


def test_deterministic_and_on_warn(capsys: pytest.CaptureFixture[str], model: str) -> None:
    answer = ask(capsys, "--model", model, "--tp", "2", "--fusion", "on", "--deterministic", *H100)
    assert answer["decided_by"] == "deterministic"
    assert answer["refused"] == ""
    assert "deterministic=True overrides fusion='on'" in answer["warnings"][0]


def test_the_reference_backend_needs_no_machine(capsys: pytest.CaptureFixture[str], model: str) -> None:
    answer = ask(capsys, "--model", model, "--tp", "2", "--backend", "reference", "--sm", "80")
    assert (answer["enabled"], answer["backend"]) == (True, "reference")


def test_other_architectures_are_answered_from_their_facts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096}
    answer = ask(capsys, "--model", write_model(tmp_path, llama), "--tp", "2", *H100)
    assert answer["decided_by"] == "architecture"
    nested = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": {"hidden_size": 4096, "dtype": "float32"},
    }
    answer = ask(capsys, "--model", write_model(tmp_path, nested), "--tp", "2", *H100)
    assert answer["enabled"] is True
    assert rule(answer, "row alignment")["value"] == 4096 * 4


def test_this_machine_is_probed_without_options(capsys: pytest.CaptureFixture[str], model: str) -> None:
    torch = pytest.importorskip("torch")
    answer = ask(capsys, "--model", model, "--tp", "2")
    assert answer["hardware"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("gpu", "sm"),
    [
        ("NVIDIA H20-3e", 90),
        ("NVIDIA H200 NVL", 90),
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA L40S", 89),
        ("NVIDIA GB300", 103),
        ("nvidia geforce rtx 5090", 120),
    ],
)
def test_a_known_gpu_needs_no_sm(capsys: pytest.CaptureFixture[str], model: str, gpu: str, sm: int) -> None:
    assert ask(capsys, "--model", model, "--gpu", gpu)["hardware"]["sm"] == sm
    assert all(name == name.upper() for name in SM_BY_GPU_NAME)


@pytest.mark.parametrize(
    ("config", "arguments", "named"),
    [
        ({}, ["--tp", "3"], "num_attention_heads 16 is not divisible by the attention-TP size 3"),
        ({}, ["--tp", "4", "--cp", "3"], "tp_size 4 is not divisible by"),
        ({}, ["--tp", "0"], "tp_size must be an integer of at least 1, got 0"),
        ({}, ["--tp", "2", "--cp", "0"], "attn_cp_size must be an integer of at least 1, got 0"),
        ({}, ["--tp", "two"], "argument --tp: invalid int value: 'two'"),
        ({}, ["--fusion", "maybe"], "argument --fusion: invalid choice: 'maybe'"),
        ({}, ["--gpu", "Voodoo 2"], "the compute capability of --gpu 'Voodoo 2' is not known: add --sm"),
        ({}, ["--flashinfer-version", "newest"], "--flashinfer-version must be like 0.7.2, got 'newest'"),
        ({}, ["--colour"], "unrecognized arguments: --colour"),
        ({"hidden_act": "gelu"}, [], "hidden_act 'gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, [], "rope_scaling asks for rope_type 'yarn'"),
        ({"vocab_size": ...}, [], "required key(s) vocab_size"),
        ({"model_type": "llama", "hidden_size": ...}, [], "required key(s) hidden_size"),
        ({"model_type": "llama", "torch_dtype": "int4"}, [], "dtype 'int4' is not supported"),
        ({"model_type": "llama", "hidden_size": "wide"}, [], "hidden_size must be an integer"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: dict, arguments: list[str], named: str
) -> None:
    directory = write_model(tmp_path, hub_config(**config))
    assert named in refuse(capsys, "--model", directory, *arguments)


def test_a_missing_or_broken_model_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no model config at" in refuse(capsys, "--model", str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"hidden_size": \n')
    assert "is not valid JSON" in refuse(capsys, "--model", str(tmp_path))
    assert "--model" in refuse(capsys)


def test_the_table_has_every_rule_within_100_columns(capsys: pytest.CaptureFixture[str], model: str) -> None:
    names = [r["name"] for r in ask(capsys, "--model", model, "--tp", "4", "--cp", "2", *H100)["rules"]]
    assert main(["explain", "--model", model, "--tp", "4", "--cp", "2", *H100]) == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert all(any(line.startswith(name + " ") for line in lines) for name in names)
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in output, "no escape codes without a terminal"
    assert output.isascii()
    assert "[0, 1] [2, 3]" in output
    assert "post_attention_layernorm" in output
    assert lines[-1].startswith("FUSED: ")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shared_config", *arguments], capture_output=True, text=True, timeout=120
    )


def test_as_a_command(model: str) -> None:
    run = command("explain", "--model", model, "--tp", "2", "--json", *H100)
    assert (run.returncode, run.stderr) == (0, "")
    assert json.loads(run.stdout)["enabled"] is True
    bad = command("explain", "--model", "/nowhere")
    assert (bad.returncode, bad.stdout, len(bad.stderr.splitlines())) == (2, "", 1)
    assert command().returncode == 2
