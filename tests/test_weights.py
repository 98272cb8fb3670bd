"""Checkpoint plans and loading: every tensor of the real model claimed once, and errors that name the tensor."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from core_torch import LLM, SamplingParams
from core_torch.models.qwen3_next import Qwen3Next
from core_torch.pieces import Pieces
from shared_config import ParallelLayout, Qwen3NextConfig
from shared_config.checkpoint import CheckpointPlan, check_names, plan_checkpoint, plan_rank, vocab_share
from shared_config.checkpoint_files import CheckpointFiles
from tests.reference import make_model, save_model

# Qwen3-Next-80B-A3B's config.json, the keys that decide shapes.
REAL: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000000,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def volume(box: tuple[slice, ...]) -> int:
    return math.prod(s.stop - s.start for s in box)


@pytest.fixture(scope="module")
def hf_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' model at the real size, on the meta device."""
    from transformers import Qwen3NextConfig as HFConfig
    from transformers import Qwen3NextForCausalLM

    with torch.device("meta"):
        model = Qwen3NextForCausalLM(HFConfig(**{k: v for k, v in REAL.items() if k != "architectures"}))
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def hub_shapes(packed: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The hub's layout of the same model: a tensor per expert, gate and up apart."""
    shapes: dict[str, tuple[int, ...]] = {"mtp.fc.weight": (2048, 4096)}
    for name, shape in packed.items():
        prefix, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for n in range(shape[0]):
                shapes[f"{prefix}.{n}.gate_proj.weight"] = (shape[1] // 2, shape[2])
                shapes[f"{prefix}.{n}.up_proj.weight"] = (shape[1] // 2, shape[2])
        elif kind == "down_proj":
            shapes |= {f"{prefix}.{n}.down_proj.weight": shape[1:] for n in range(shape[0])}
        else:
            shapes[name] = shape
    return shapes


def claims(plans: list[CheckpointPlan]) -> dict[str, Counter[tuple[tuple[int, int], ...]]]:
    """For each stored tensor, which boxes the ranks read of it and how often."""
    found: dict[str, Counter[tuple[tuple[int, int], ...]]] = {}
    for plan in plans:
        for piece in plan.pieces:
            box = tuple((s.start, s.stop) for s in piece.source_box)
            found.setdefault(piece.source, Counter())[box] += 1
    return found


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("packed", [True, False])
def test_real_model_is_claimed_exactly_once(
    tp: int, packed: bool, hf_shapes: dict[str, tuple[int, ...]]
) -> None:
    config = Qwen3NextConfig.from_hf(REAL)
    stored = hf_shapes if packed else hub_shapes(hf_shapes)
    plans = [plan_checkpoint(config, attn_rank=r, attn_size=tp, packed=packed) for r in range(tp)]
    for plan in plans:
        check_names(plan, stored, tied=False)
        assert plan.parameters == plans[0].parameters
        filled = Counter[str]()
        for piece in plan.pieces:
            assert volume(piece.source_box) == volume(piece.parameter_box)
            filled[piece.parameter] += volume(piece.parameter_box)
        vocabulary = {"embed_tokens.weight", "lm_head.weight"}  # may end in padding rows
        assert all(filled[n] == math.prod(s) for n, s in plan.parameters.items() if n not in vocabulary)
    for name, boxes in claims(plans).items():
        repeats = set(boxes.values())
        assert len(repeats) == 1, f"{name} is read unevenly"
        times = repeats.pop()  # replicated tensors and KV heads: by several ranks, each of them whole
        assert sum(math.prod(b - a for a, b in box) for box in boxes) == math.prod(stored[name]), name
        assert times in {1, tp, max(1, tp // config.num_key_value_heads)}


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(4, attn_cp_size=2, moe_dp_size=2, ep_size=2),
        ParallelLayout(8, attn_cp_size=2, attn_dp_size=2, ep_size=4),
        ParallelLayout(8, attn_cp_size=8, moe_dp_size=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_layout_reads_every_number_of_the_real_model_equally_often(
    layout: ParallelLayout, packed: bool, hf_shapes: dict[str, tuple[int, ...]]
) -> None:
    """Experts once a MoE slice, single heads once a DP rank, projections once an attention piece."""
    config = Qwen3NextConfig.from_hf(REAL | {"num_hidden_layers": 4})
    shapes = {n: s for n, s in hf_shapes.items() if ".layers." not in n or int(n.split(".")[2]) < 4}
    stored = shapes if packed else hub_shapes(shapes)
    plans = [plan_rank(config, layout, rank, packed=packed) for rank in range(layout.tp_size)]
    pieces = layout.attn_cp_size * layout.attn_dp_size
    kv_copies = max(1, layout.attn_tp_size // config.num_key_value_heads)
    for plan in plans:
        check_names(plan, stored, tied=False)
        assert plan.parameters == plans[0].parameters
    for name, boxes in claims(plans).items():
        expected = {
            ".experts.": layout.moe_dp_size,
            "shared_expert.": layout.moe_dp_size,
            "conv1d": layout.attn_dp_size,
            "A_log": layout.attn_dp_size,
            "dt_bias": layout.attn_dp_size,
            "k_proj": pieces * kv_copies,
            "v_proj": pieces * kv_copies,
        }
        whole = {box: times for box, times in boxes.items() if times == layout.tp_size}
        times = next((n for part, n in expected.items() if part in name), pieces)
        if not whole:  # not a tensor that every rank holds
            assert set(boxes.values()) == {times}, name
        assert sum(math.prod(b - a for a, b in box) for box in boxes) == math.prod(stored[name]), name


def test_ranks_share_the_contents_of_a_parameter_exactly_when_they_read_the_same() -> None:
    """Dummy weights are seeded by it."""
    layout = ParallelLayout(8, attn_cp_size=2, attn_dp_size=2, ep_size=2)
    config = Qwen3NextConfig.from_hf(REAL | {"num_hidden_layers": 4, "num_experts": 16})
    plans = [plan_rank(config, layout, rank) for rank in range(8)]
    contents = [plan.contents() for plan in plans]
    read = [{n: [p for p in plan.pieces if p.parameter == n] for n in plan.parameters} for plan in plans]
    for name in plans[0].parameters:
        for a, b in itertools.combinations(range(8), 2):
            assert (contents[a][name] == contents[b][name]) == (read[a][name] == read[b][name]), name


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_model_at_the_real_size_has_the_planned_parameters(tp: int) -> None:
    """On the meta device: what the layers hold is what the plan fills, on the first and the last rank."""
    config = Qwen3NextConfig.from_hf(REAL)
    for rank in {0, tp - 1}:
        group: Any = SimpleNamespace(rank=rank, size=tp)
        alone: Any = SimpleNamespace(rank=0, size=1)
        pieces = Pieces(ParallelLayout(tp), alone, alone, alone, alone, alone)
        with torch.device("meta"):
            model = Qwen3Next(config, group, group, pieces)
        plan = plan_checkpoint(config, attn_rank=rank, attn_size=tp)
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == plan.parameters


def test_vocabulary_shares_cover_odd_sizes() -> None:
    for vocab, size in ((97, 4), (5, 4), (151936, 8), (3, 4)):
        shares = [vocab_share(vocab, rank, size) for rank in range(size)]
        assert [i for rows, _ in shares for i in rows] == list(range(vocab))
        assert all(len(rows) <= padded for rows, padded in shares)


def test_sizes_that_do_not_divide_name_both_numbers() -> None:
    config = Qwen3NextConfig.from_hf(REAL | {"moe_intermediate_size": 500})
    with pytest.raises(ValueError, match=r"moe_intermediate_size = 500 does not divide by 8"):
        plan_checkpoint(config, attn_rank=0, attn_size=8)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_model(make_model("base"), tmp_path / "model", packed=False)


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def expect_error(folder: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LLM(folder)


def test_missing_tensor_is_named(checkpoint: Path) -> None:
    edit(checkpoint, lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    expect_error(checkpoint, r"1 missing: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight")


def test_unexpected_tensors_are_named_and_the_list_is_short(checkpoint: Path) -> None:
    edit(checkpoint, lambda t: t.update({f"model.extra.{i}": torch.zeros(1) for i in range(9)}))
    expect_error(checkpoint, r"9 unexpected: model\.extra\.0.*and 4 more")


def test_misshapen_tensor_is_named_with_both_shapes(checkpoint: Path) -> None:
    edit(checkpoint, lambda t: t.update({"model.norm.weight": torch.zeros(63)}))
    expect_error(checkpoint, r"1 misshapen: model\.norm\.weight \(has \[63\], the config says \[64\]\)")


def test_multi_token_prediction_tensors_are_recognised(checkpoint: Path) -> None:
    edit(checkpoint, lambda t: t.update({"mtp.fc.weight": torch.zeros(2, 2)}))
    with LLM(checkpoint) as llm:
        assert llm.generate([5, 6], SamplingParams(temperature=0, max_tokens=2))[0].finished


def test_absent_files_are_named(tmp_path: Path) -> None:
    folder = save_model(make_model("base"), tmp_path / "model", packed=True, shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        CheckpointFiles(folder, "pt")
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        CheckpointFiles(tmp_path, "np")


def test_dummy_weights_need_no_files_and_keep_activations_alive(tmp_path: Path) -> None:
    model = make_model("base")
    config = model.config.to_dict() | {"architectures": ["Qwen3NextForCausalLM"], "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    params = SamplingParams(temperature=0, max_tokens=4, return_logits=True, ignore_eos=True)
    runs = []
    for _ in range(2):
        with LLM(tmp_path, load_format="dummy") as llm:
            runs.append(np.stack(llm.generate([[1, 2, 3]], params)[0].logits))
    assert np.array_equal(*runs)
    assert np.isfinite(runs[0]).all()
    assert 0.1 < runs[0].std() < 10
