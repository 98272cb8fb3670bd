"""transformers' Qwen3-Next as the reference: tiny configurations, random weights, checkpoints of both kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

LINEAR, FULL = "linear_attention", "full_attention"

BASE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "eos_token_id": 0,
}

# Each differs from BASE in what its name says; together they cover the architecture's options.
CONFIGS: dict[str, dict[str, Any]] = {
    "base": {},
    "attention_only": {"layer_types": [FULL] * 3, "num_hidden_layers": 3},
    "linear_only": {"layer_types": [LINEAR] * 3, "num_hidden_layers": 3},
    "attention_first": {"layer_types": [FULL, LINEAR, FULL, LINEAR]},
    "dense_layers": {"mlp_only_layers": [0, 2]},
    "sparse_step": {"decoder_sparse_step": 3},
    "equal_linear_heads": {
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 24,
    },
    "many_value_heads": {"linear_num_key_heads": 4, "linear_num_value_heads": 16, "linear_key_head_dim": 24},
    "multi_head": {"num_key_value_heads": 4, "head_dim": 48},
    "single_kv_head": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "full_rotary": {"partial_rotary_factor": 1.0, "rope_theta": 1e6},
    "half_rotary": {"partial_rotary_factor": 0.5},
    "raw_router": {"norm_topk_prob": False, "num_experts_per_tok": 1},
    "tied": {"tie_word_embeddings": True},
    "odd_sizes": {"vocab_size": 97, "hidden_size": 72, "linear_conv_kernel_dim": 3, "num_experts": 5},
    "attention_bias": {"attention_bias": True},
}


def make_model(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """transformers' model of CONFIGS[name] with `changes` in float32 on CPU, every weight random (no norm at zero)."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(seed)
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**(BASE | CONFIGS[name] | changes))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("A_log"):
                parameter.uniform_(-2.0, 1.0, generator=generator)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            else:
                fan_in = parameter.shape[-1] if "conv1d" not in key else 4
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 * fan_in**-0.5)
    return model


def save_model(model: Any, folder: Path, *, packed: bool, shards: int = 1) -> Path:
    """Save as a Hugging Face checkpoint: experts packed, or a tensor each as on the hub; in one file or several."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict()
    config["architectures"], config["dtype"] = ["Qwen3NextForCausalLM"], "float32"
    (folder / "config.json").write_text(json.dumps(config))
    tensors: dict[str, torch.Tensor] = {}
    for key, value in model.state_dict().items():
        value = value.detach().clone().contiguous()
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if packed or ".mlp.experts." not in key:
            tensors[key] = value
            continue
        prefix = key.rsplit(".", 1)[0]
        for n, expert in enumerate(value):
            if key.endswith("gate_up_proj"):
                gate, up = expert.chunk(2)
                tensors[f"{prefix}.{n}.gate_proj.weight"] = gate.contiguous()
                tensors[f"{prefix}.{n}.up_proj.weight"] = up.contiguous()
            else:
                tensors[f"{prefix}.{n}.down_proj.weight"] = expert.contiguous()
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@torch.no_grad()
def logits_of(model: Any, token_ids: list[int]) -> np.ndarray:
    """[tokens, vocabulary], one pass over the whole sequence."""
    return model(torch.tensor([token_ids]), use_cache=False).logits[0].float().numpy()


@torch.no_grad()
def greedy(model: Any, prompt: list[int], steps: int) -> tuple[list[int], np.ndarray]:
    """(tokens, the logits [steps, vocabulary] that they were chosen from), with transformers' own cache.

    Its cache cannot run without an attention layer; then each step is a pass over everything so far.
    """
    if FULL not in model.config.layer_types:
        tokens = list(prompt)
        for _ in range(steps):
            tokens.append(int(logits_of(model, tokens)[-1].argmax()))
        return tokens[len(prompt) :], logits_of(model, tokens)[len(prompt) - 1 : -1]
    out = model(torch.tensor([prompt]), use_cache=True)
    tokens, rows = [], []
    for _ in range(steps):
        row = out.logits[0, -1].float()
        rows.append(row.numpy())
        tokens.append(int(row.argmax()))
        out = model(torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    return tokens, np.stack(rows)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """max |got - want| over max |want|: for logits, whose scale is common to a row."""
    return float(np.abs(got - want).max() / np.abs(want).max())
