"""Where the JAX engine's parameters come from: live PyTorch tensors, a checkpoint, or chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from core_torch.kernels.allreduce import ReduceGroup
from core_torch.kernels.comm import SingleComm
from core_torch.models.qwen3_next import Qwen3Next as TorchModel
from core_torch.pieces import Peers, Pieces
from core_torch.weights import load_checkpoint, materialize
from jax_bridge import LLM, SamplingParams
from jax_bridge.runner import ModelRunner
from jax_bridge.weights import named_parameters
from shared_config import (
    FlashInferInfo,
    FusionRequest,
    HardwareInfo,
    ParallelLayout,
    Qwen3NextConfig,
    resolve_fusion,
)
from tests.reference import make_model, save_model

PROMPT = list(range(1, 12))
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SMALL: dict[str, Any] = {"device": "cpu", "max_model_len": 64, "max_num_seqs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("attention_only"), tmp_path_factory.mktemp("checkpoint"), packed=True)


def torch_ranks(
    folder: Path, size: int, dtype: torch.dtype = torch.float32, **sizes: int
) -> list[dict[str, torch.Tensor]]:
    """The parameters of each rank of a PyTorch model, all in this process; they only hold weights."""
    config = Qwen3NextConfig.from_hf(folder)
    layout = ParallelLayout(tp_size=size, **sizes)
    decision = resolve_fusion(config, layout, HardwareInfo(), FlashInferInfo(), FusionRequest())
    ranks = []
    for rank in range(size):
        group: Any = object()  # nothing is reduced
        attention, mlp, nobody = (
            ReduceGroup(side, side, ranks, ranks.index(rank), group, SingleComm(), decision)
            for side, ranks in (
                ("attention", layout.group("attn_tp", rank)),
                ("mlp", layout.group("moe_reduce", rank)),
                ("mlp", (rank,)),
            )
        )
        context = layout.group("attn_cp", rank)
        peers = Peers(
            context, context.index(rank), None
        )  # nobody talks, and only `context` says what a rank holds
        with torch.device("meta"):
            model = TorchModel(config, attention, mlp, Pieces(layout, peers, peers, peers, peers, nobody))
        materialize(model, dtype, torch.device("cpu"))
        load_checkpoint(model, folder, progress=False)
        ranks.append({name: parameter.detach() for name, parameter in model.named_parameters()})
    return ranks


def runner_of(llm: LLM) -> ModelRunner:
    assert llm._session is not None
    return llm._session.runner


def arrays(llm: LLM) -> dict[str, jax.Array]:
    return {
        name: parameter.get_value() for name, parameter in named_parameters(runner_of(llm).parameters).items()
    }


def test_live_torch_shards_are_used_in_place(folder: Path) -> None:
    """The same memory, and a write by PyTorch shows: the weights are held once."""
    ranks = torch_ranks(folder, 1)
    with LLM.from_torch(folder, ranks, **SMALL) as llm:
        for name, array in arrays(llm).items():
            assert array.unsafe_buffer_pointer() == ranks[0][name].data_ptr(), name
        before = llm.generate(PROMPT, GREEDY)[0].token_ids
        ranks[0]["lm_head.weight"].neg_()
        assert llm.generate(PROMPT, GREEDY)[0].token_ids != before
    with LLM(folder, **SMALL) as llm:
        assert llm.generate(PROMPT, GREEDY)[0].token_ids == before


@pytest.mark.parametrize(
    ("checkpoint", "tp", "sizes"),
    [
        ("attention_only", 2, {}),
        ("base", 4, {"attn_cp_size": 2, "ep_size": 2}),
        ("base", 4, {"attn_cp_size": 4, "moe_dp_size": 2}),  # fewer KV heads than ranks
        ("base", 8, {"attn_dp_size": 2, "attn_cp_size": 2, "ep_size": 2, "moe_dp_size": 2}),
    ],
)
def test_torch_ranks_are_the_checkpoints_shards(
    checkpoint: str, tp: int, sizes: dict[str, Any], tmp_path: Path
) -> None:
    """Rank by rank PyTorch holds what JAX has read from the checkpoint for that device, under any layout."""
    folder = save_model(make_model(checkpoint), tmp_path / checkpoint, packed=checkpoint == "base")
    ranks = torch_ranks(folder, tp, **sizes)
    with (
        LLM(folder, tp, **SMALL, **sizes) as loaded,
        LLM.from_torch(folder, ranks, **SMALL, **sizes) as shared,
    ):
        assert arrays(loaded).keys() == ranks[0].keys()
        for name, array in arrays(loaded).items():
            other = arrays(shared)[name]
            assert array.sharding == other.sharding
            for rank, (a, b) in enumerate(
                zip(array.addressable_shards, other.addressable_shards, strict=True)
            ):
                assert np.array_equal(a.data, ranks[rank][name].numpy()), name
                assert np.array_equal(a.data, b.data), name


def test_torch_shards_are_checked(folder: Path) -> None:
    ranks = torch_ranks(folder, 1)
    incomplete = dict(ranks[0])
    del incomplete["layers.1.mixer.q_norm.weight"]
    with pytest.raises(ValueError, match=r"ranks\[0\] lacks 'layers.1.mixer.q_norm.weight'"):
        LLM.from_torch(folder, [incomplete], **SMALL)
    misshapen = ranks[0] | {"norm.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"'norm.weight'\] is float32 \(3,\), expected float32 \(64,\)"):
        LLM.from_torch(folder, [misshapen], **SMALL)
    narrow = ranks[0] | {"norm.weight": torch.zeros(64, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match=r"is bfloat16 \(64,\), expected float32 \(64,\)"):
        LLM.from_torch(folder, [narrow], **SMALL)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is missing"):
        LLM.from_torch(folder, [], **SMALL)


def test_dummy_weights_have_their_shapes_and_scales(folder: Path) -> None:
    with LLM(folder, 2, dtype="bfloat16", load_format="dummy", **SMALL) as llm:
        values = arrays(llm)
        output = llm.generate(PROMPT, GREEDY)[0]
    ranks = torch_ranks(folder, 2, torch.bfloat16)
    for name, array in values.items():
        shard = array.addressable_shards[0].data
        assert (shard.shape, str(shard.dtype)) == (
            tuple(ranks[0][name].shape),
            str(ranks[0][name].dtype).removeprefix("torch."),
        )
        assert np.isfinite(np.asarray(array, np.float32)).all()
    weight = np.asarray(values["layers.0.mixer.in_proj.weight"], np.float32)
    assert weight.std() == pytest.approx(64**-0.5, rel=0.05)
    gates = [np.asarray(s.data, np.float32) for s in values["layers.0.mlp.gate.weight"].addressable_shards]
    assert np.array_equal(gates[0], gates[1])  # every rank routes alike
    assert len(set(output.token_ids)) > 1


def test_missing_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    broken = save_model(make_model("attention_only"), tmp_path / "broken", packed=False)
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.3.up_proj.weight"):
        LLM(broken, **SMALL)
    (broken / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*.safetensors file"):
        LLM(broken, **SMALL)
