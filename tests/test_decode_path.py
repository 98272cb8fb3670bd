"""How the layers use their kernels, on CPU: plain torch stands in for each kernel, under its signature."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core_torch import LLM, SamplingParams
from core_torch.batch import Span
from core_torch.kernels import allreduce, moe, moe_prefill
from core_torch.kernels import attention as plain_attention
from core_torch.kernels.choice import KernelOptions, WarmsUp, describe
from core_torch.kernels.contract import add_rmsnorm
from core_torch.kernels.flash_prefill import Ragged
from core_torch.kernels.gdn_decode import gdn_decode_plain
from core_torch.kernels.gdn_prefill import Chunks, gdn_prefill_plain
from core_torch.kernels.moe_decode import Routing
from core_torch.kernels.moe_prefill import ChoiceParts
from core_torch.kernels.native import Answer
from core_torch.kernels.norm_rope import norm_rope_plain
from core_torch.kernels.vocabulary import embedding_rows_plain, largest_keys_plain
from core_torch.layers import attention, embedding, gated_delta_net, linear, mlp, norm
from tests import reference

TINY = Path(__file__).parent / "data/tiny-qwen3-next"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, return_logits=True)
PROMPTS = [[5, 6, 7, 8, 9], [3] * 21, [1, 2]]
NAMES = (
    "add_norm", "even_prefill", "few_rows", "flash_prefill", "gdn_decode", "gdn_prefill", "moe_decode", "moe_prefill",
    "norm_rope", "paged_decode", "vocabulary"
)  # fmt: skip
FEW = 8  # tokens that count as few here, so that the prefill of these prompts are many


def paged(q: Any, k: Any, v: Any, tables: Any, lengths: Any, *, scale: float, gate: Any) -> torch.Tensor:
    out = plain_attention.decode_attention(q, k, v, tables, lengths, scale=scale)
    return out * gate.sigmoid().view(out.shape)


def flash(q: Any, k: Any, v: Any, ragged: Ragged, *, scale: float, even: bool) -> torch.Tensor:
    """Each sequence on pages of one token, which are in the order that `ragged` says."""
    keys_of, values_of = (cache.flatten(0, 1)[:, None] for cache in (k, v))
    outs, queries, keys = [], ragged.query_ends.tolist(), ragged.key_ends.tolist()
    for (first, end), (from_key, to_key) in zip(pairwise(queries), pairwise(keys), strict=True):
        start = to_key - from_key - (end - first)
        table = ragged.key_rows[from_key:to_key]
        outs.append(
            plain_attention.prefill_attention(
                q[first:end], keys_of, values_of, table, start=start, scale=scale
            )
        )
    assert ragged.longest_query == max(b - a for a, b in pairwise(queries))
    assert ragged.longest_key == max(b - a for a, b in pairwise(keys))
    return torch.cat(outs)


def gdn_of_chunks(
    projected: Any, conv: Any, state: Any, chunks: Chunks, *, carry: Any = None, **weights: Any
) -> torch.Tensor:
    """The sequences that the table of chunks names."""
    pieces, found = [], []
    for first, rows, slot, goes_on, first_chunk in chunks.sequences.tolist():
        pieces.append(Span(first, rows, goes_on, slot))
        assert first_chunk == len(found)
        for at in range(0, rows, 64):
            found.append([first + at, min(64, rows - at), at, len(pieces) - 1])
    assert chunks.chunks.tolist() == found
    return gdn_prefill_plain(projected, conv, state, pieces, **weights)


def route(logits: torch.Tensor, *, num_experts: int, top_k: int, normalize: bool) -> Routing:
    assert logits.stride(1) == 1
    weights, experts = moe.route(logits[:, :num_experts], top_k=top_k, normalize=normalize)
    if logits.shape[1] > num_experts:
        weights = torch.cat((weights, logits[:, num_experts:].sigmoid()), dim=1)
        experts = torch.cat((experts, torch.full_like(experts[:, :1], num_experts)), dim=1)
    return Routing(weights, experts.int(), torch.zeros(1))


def experts(x: Any, weights: Any, experts: Any, gate_up: Any, down: Any, *, tiles: Any) -> torch.Tensor:
    assert gate_up.is_contiguous()
    assert down.is_contiguous()
    return moe.routed_experts(x, weights, experts.long(), gate_up, down)


def route_many(logits: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    routing = route(logits, **options)
    return routing.weights, routing.experts


def parts_of_many(
    x: Any, weights: Any, chosen: Any, gate_up: Any, down: Any, *, tiles: Any = None
) -> ChoiceParts:
    of_each = [
        experts(x, weights[:, k : k + 1], chosen[:, k : k + 1], gate_up, down, tiles=None)
        for k in range(chosen.shape[1])
    ]
    return ChoiceParts(torch.stack(of_each, dim=1).flatten(0, 1), chosen, len(down))


def combine(parts: torch.Tensor, chosen: torch.Tensor, *, num_experts: int) -> torch.Tensor:
    assert chosen.max() < num_experts
    return parts.unflatten(0, chosen.shape).sum(1)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Every kernel is usable, and counted."""
    calls: dict[str, int] = {}
    functions = {
        (allreduce, "add_norm"): add_rmsnorm,
        (norm, "add_norm"): add_rmsnorm,
        (embedding, "embedding_rows"): embedding_rows_plain,
        (embedding, "largest_keys"): largest_keys_plain,
        (linear, "few_rows"): torch.nn.functional.linear,
        (gated_delta_net, "gdn_decode"): gdn_decode_plain,
        (gated_delta_net, "gdn_prefill"): gdn_of_chunks,
        (attention, "norm_rope"): norm_rope_plain,
        (attention, "flash_prefill"): flash,
        (attention, "paged_decode_attention"): paged,
        (mlp, "route_decode"): route,
        (mlp, "routed_experts_decode"): experts,
        (mlp, "route_prefill"): route_many,
        (mlp, "expert_parts_prefill"): parts_of_many,
        (moe_prefill, "combine"): combine,
    }
    for (module, name), function in functions.items():

        def counted(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            assert all(weight.is_contiguous() for weight in kwargs.pop("ahead", ()))
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    monkeypatch.setattr(mlp, "MAX_TOKENS", FEW)
    ask = KernelOptions.ask
    monkeypatch.setattr(
        KernelOptions, "ask", lambda self, *a, **k: Answer(True) if self.compiled else ask(self, *a, **k)
    )
    return calls


def generate(folder: Path, **options: Any) -> tuple[Any, list[Any]]:
    with LLM(folder, max_model_len=64, **options) as llm:
        return llm.kernels, llm.generate(PROMPTS, GREEDY)


def equal_sizes(tmp_path: Path) -> Path:
    """A model whose shared expert has the routed ones' size, as the 80B model's has."""
    reference.CONFIGS["equal_experts"] = {"shared_expert_intermediate_size": 32}
    try:
        return reference.save_model(reference.make_model("equal_experts"), tmp_path, packed=False)
    finally:
        del reference.CONFIGS["equal_experts"]


@pytest.mark.parametrize("equal", [True, False])
def test_steps_run_in_kernels_and_give_the_plain_results(
    equal: bool, tmp_path: Path, stand_ins: dict[str, int]
) -> None:
    folder = equal_sizes(tmp_path) if equal else TINY
    answers, plain = generate(folder, dtype="float32", kernels="plain")
    assert not stand_ins
    assert all(a.reason == "kernels='plain' was asked for" for a in answers.values())
    answers, got = generate(folder, dtype="float32")
    assert answers == dict.fromkeys(NAMES, Answer(True))
    assert set(stand_ins) == {
        "add_norm", "few_rows", "gdn_decode", "norm_rope", "paged_decode_attention", "route_decode",
        "routed_experts_decode", "flash_prefill", "gdn_prefill", "route_prefill", "expert_parts_prefill",
        "combine",
    }  # fmt: skip
    for mine, want in zip(got, plain, strict=True):
        assert mine.token_ids == want.token_ids
        assert reference.relative_error(np.stack(mine.logits), np.stack(want.logits)) < 1e-5


def first_moe(llm: LLM) -> mlp.SparseMoE:
    assert llm._session is not None
    return next(m for m in llm._session.runner.model.modules() if isinstance(m, mlp.SparseMoE))


def test_what_is_compiled_on_its_first_call_can_be_called_ahead(stand_ins: dict[str, int]) -> None:
    with LLM(TINY, dtype="float32", max_model_len=64) as llm:
        assert llm._session is not None
        stand_ins.clear()
        warm = {type(m): m for m in llm._session.runner.model.modules() if isinstance(m, WarmsUp)}
        assert set(warm) == {gated_delta_net.GatedDeltaNet, mlp.SparseMoE}
        for layer in warm.values():
            layer.warm_up(torch.device("cpu"))
    assert stand_ins == {"gdn_prefill": 3, "route_prefill": 1, "expert_parts_prefill": 3, "combine": 3}


def test_the_shared_expert_lies_behind_the_routed_ones(tmp_path: Path) -> None:
    with LLM(equal_sizes(tmp_path)) as llm:
        layer = first_moe(llm)
        assert layer.router_weight is not None
        assert layer.experts.with_shared is not None
        gate_up, down = layer.experts.with_shared
        assert gate_up.data_ptr() == layer.experts.gate_up_proj.data_ptr()
        assert torch.equal(gate_up[-1], layer.shared_expert.gate_up_proj.weight)
        assert torch.equal(down[-1], layer.shared_expert.down_proj.weight)
        assert layer.router_weight.shape == (16, 64)  # 8 experts, the gate, zeros up to a multiple of 8
        assert torch.equal(layer.router_weight[8:9], layer.shared_expert_gate.weight)
        assert not layer.router_weight[9:].any()
    with LLM(TINY) as llm:
        assert first_moe(llm).experts.with_shared is None


def test_without_a_gpu_the_reason_is_told() -> None:
    with LLM(TINY, 2, max_model_len=64) as llm:  # through the worker's answer
        assert describe(llm.kernels) == (
            f"plain: {', '.join(NAMES)} (compiled kernels need a CUDA GPU, and this is cpu); "
            "plain: pair_allreduce (pair_allreduce is for groups of 2 ranks on SM90)"
        )
    with LLM(TINY, max_model_len=64, dtype="float32", max_num_seqs=4, num_pages=10) as llm:
        assert llm._session is not None
        assert llm._session.runner.memory == (
            "memory of rank 0: weights 0.0 GiB, 10 KV pages (160 tokens) 0.0 GiB, 4 states 0.0 GiB"
        )
    assert describe({"a": Answer(True), "b": Answer(False, "no")}) == "compiled: a; plain: b (no)"
    with pytest.raises(ValueError, match="kernels must be one of auto, plain"):
        LLM(TINY, kernels="fast")
