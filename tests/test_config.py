"""Qwen3NextConfig against the hub's config.json, transformers' own, and every way to get one wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest

from shared_config import Qwen3NextConfig
from shared_config.model import REQUIRED_KEYS

# Qwen/Qwen3-Next-80B-A3B-Instruct's config.json, in the older spelling that the hub still serves.
HUB_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def hub_config(**changes: Any) -> dict[str, Any]:
    """The hub's config with keys replaced; a change to `...` removes the key."""
    return {key: value for key, value in (HUB_CONFIG | changes).items() if value is not ...}


def test_the_hub_config() -> None:
    config = Qwen3NextConfig.from_hf(HUB_CONFIG)
    assert config.architecture == "Qwen3NextForCausalLM"
    assert (config.rope_theta, config.partial_rotary_factor, config.rotary_dim) == (10000000, 0.25, 64)
    assert (config.key_dim, config.value_dim, config.conv_dim) == (2048, 4096, 8192)
    assert (config.dtype, config.itemsize) == ("bfloat16", 2)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (151643, (151645,), None)
    assert config.layer_types[:4] == ("linear_attention",) * 3 + ("full_attention",)
    assert config.layer_types.count("full_attention") == 12
    assert all(config.is_moe_layer(layer) for layer in range(48))


def test_a_directory_is_read_like_its_dict(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIG))
    assert Qwen3NextConfig.from_hf(tmp_path) == Qwen3NextConfig.from_hf(str(tmp_path))
    assert Qwen3NextConfig.from_hf(tmp_path) == Qwen3NextConfig.from_hf(HUB_CONFIG)


def test_every_field_agrees_with_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    values = HUB_CONFIG | {"mlp_only_layers": [1, 2], "eos_token_id": [5, 6], "pad_token_id": 7}
    theirs = transformers.Qwen3NextConfig(**values)
    ours = Qwen3NextConfig.from_hf(values)
    assert Qwen3NextConfig.from_hf(theirs.to_dict()) == ours, (
        "transformers saves another spelling of the same"
    )
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.partial_rotary_factor == theirs.rope_parameters["partial_rotary_factor"]
    renamed = {"architecture", "eos_token_ids", "dtype", "rope_theta", "partial_rotary_factor"}
    compared = [field.name for field in fields(ours) if field.name not in renamed]
    for name in compared:
        value = getattr(ours, name)
        assert (list(value) if isinstance(value, tuple) else value) == getattr(theirs, name), name
    assert len(compared) > 30


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    ours = Qwen3NextConfig.from_hf({key: HUB_CONFIG[key] for key in REQUIRED_KEYS})
    theirs = Qwen3NextConfig.from_hf(
        transformers.Qwen3NextConfig(**{k: HUB_CONFIG[k] for k in REQUIRED_KEYS}).to_dict()
    )
    assert ours == theirs


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_theta": 5e5}, "partial_rotary_factor": 0.5},
        {"rope_scaling": {"type": "default", "rope_theta": 5e5}, "partial_rotary_factor": 0.5},
        # the nested dict wins, as in transformers
        {
            "rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
            "rope_theta": 1.0,
            "partial_rotary_factor": 1.0,
        },
    ],
)
def test_both_spellings_of_rope(rope: dict) -> None:
    config = Qwen3NextConfig.from_hf(hub_config(**({"rope_theta": ..., "partial_rotary_factor": ...} | rope)))
    assert (config.rope_theta, config.partial_rotary_factor, config.rotary_dim) == (5e5, 0.5, 128)


def test_layer_types_or_an_interval() -> None:
    types = ["full_attention", "linear_attention", "linear_attention"]
    explicit = Qwen3NextConfig.from_hf(hub_config(num_hidden_layers=3, layer_types=types))
    assert explicit.layer_types == tuple(types), "layer_types wins over full_attention_interval"
    interval = Qwen3NextConfig.from_hf(hub_config(num_hidden_layers=5, full_attention_interval=2))
    assert [kind == "full_attention" for kind in interval.layer_types] == [False, True, False, True, False]
    neither = Qwen3NextConfig.from_hf(hub_config(num_hidden_layers=8, full_attention_interval=...))
    assert [i for i, kind in enumerate(neither.layer_types) if kind == "full_attention"] == [3, 7]


@pytest.mark.parametrize(
    ("changes", "moe_layers"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"mlp_only_layers": [0, 3]}, [1, 2, 4]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [3]),
        ({"mlp_only_layers": None}, [0, 1, 2, 3, 4]),
        ({"num_experts": 0}, []),
    ],
)
def test_which_layers_have_the_moe(changes: dict, moe_layers: list[int]) -> None:
    config = Qwen3NextConfig.from_hf(hub_config(num_hidden_layers=5, **changes))
    assert [layer for layer in range(5) if config.is_moe_layer(layer)] == moe_layers


@pytest.mark.parametrize("dtype", ["float16", "torch.float16"])
def test_both_spellings_of_the_dtype(dtype: str) -> None:
    assert Qwen3NextConfig.from_hf(hub_config(torch_dtype=dtype)).dtype == "float16"
    assert Qwen3NextConfig.from_hf(hub_config(dtype=dtype)).dtype == "float16", "dtype is the newer key"


@pytest.mark.parametrize("key", REQUIRED_KEYS)
@pytest.mark.parametrize("absent", [..., None], ids=["missing", "null"])
def test_a_missing_required_key_is_named(key: str, absent: Any) -> None:
    with pytest.raises(ValueError, match=rf"lacks the required key\(s\) {key}$"):
        Qwen3NextConfig.from_hf(hub_config(**{key: absent}))


def test_all_missing_keys_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"required key\(s\) vocab_size, hidden_size, intermediate_size"):
        Qwen3NextConfig.from_hf({})


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("spelling", ["rope_type", "type"])
@pytest.mark.parametrize("kind", ["yarn", "linear", "llama3", "dynamic"])
def test_rope_scaling_is_refused_by_its_key(key: str, spelling: str, kind: str) -> None:
    with pytest.raises(ValueError, match=f"{key} asks for rope_type '{kind}', which is not implemented"):
        Qwen3NextConfig.from_hf(hub_config(**{key: {spelling: kind, "factor": 4.0}}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported: use 'silu'"),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is not supported"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, but num_hidden_layers is 48"),
        ({"layer_types": ["sliding_attention"] * 48}, "layer_types 'sliding_attention' is not supported"),
        ({"full_attention_interval": 0}, "full_attention_interval must be an integer of at least 1, got 0"),
        ({"num_hidden_layers": "48"}, "num_hidden_layers must be an integer of at least 1, got '48'"),
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1, got 0"),
        ({"vocab_size": True}, "vocab_size must be an integer of at least 1, got True"),
        ({"mlp_only_layers": ["0"]}, "mlp_only_layers must be an integer of at least 0, got '0'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a number above 0, got -1.0"),
        ({"rope_theta": "1e7"}, "rope_theta must be a number above 0, got '1e7'"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object or null, got 'yarn'"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false, got 1"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads must be a multiple of num_key_value_heads, got 16 and 3",
        ),
        ({"linear_num_value_heads": 24}, "linear_num_value_heads must be a multiple of .*, got 24 and 16"),
        ({"num_experts": 8}, "num_experts_per_tok is 10, but there are only 8 experts"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5 of head_dim 256 rotates 384 elements"),
        ({"head_dim": 100, "partial_rotary_factor": 0.25}, "rotates 25 elements"),
        ({"architectures": "Qwen3NextForCausalLM"}, "architectures must be a list of class names"),
    ],
)
def test_a_value_that_is_not_supported_is_refused_by_its_key(changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Qwen3NextConfig.from_hf(hub_config(**changes))


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"give a directory that holds a config\.json"):
        Qwen3NextConfig.from_hf(tmp_path)


@pytest.mark.parametrize(("text", "named"), [("{", "is not valid JSON"), ("[]", "must hold a JSON object")])
def test_a_broken_config(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=named):
        Qwen3NextConfig.from_hf(tmp_path)


def test_a_config_is_frozen_and_replaceable() -> None:
    config = Qwen3NextConfig.from_hf(HUB_CONFIG)
    with pytest.raises(FrozenInstanceError):
        config.hidden_size = 1  # type: ignore[misc]  # the point of the test
    with pytest.raises(ValueError, match="hidden_size"):
        replace(config, hidden_size=-1)


def test_importing_shared_config_imports_no_framework() -> None:
    code = "import sys, shared_config; print(sorted({'torch', 'jax', 'flashinfer'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"
