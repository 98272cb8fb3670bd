"""Shapes that need no download: with random weights they take the time of the real model."""

from __future__ import annotations

from typing import Any

# https://huggingface.co/Qwen/Qwen3-Next-80B-A3B-Instruct, config.json
PRESETS: dict[str, dict[str, Any]] = {
    "80b": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000000,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    }
}


def with_layers(config: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """The first `layers` layers of a config; all of them for None. Raises ValueError beyond its depth."""
    depth = config["num_hidden_layers"]
    if layers is None:
        return config
    if not 1 <= layers <= depth:
        raise ValueError(f"layers must be from 1 to num_hidden_layers = {depth}, got {layers}")
    cut = config | {"num_hidden_layers": layers}
    if config.get("layer_types"):
        cut["layer_types"] = config["layer_types"][:layers]
    return cut
