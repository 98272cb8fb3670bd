"""Every layout against one rank, in float32 on real gloo ranks: prefill, chunked prefill, decode, fused and unfused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from core_torch import LLM
from shared_config import FusionRequest, ParallelLayout
from shared_config.results import Reductions, RequestOutput
from tests.layout_ranks import LayoutRun, params, run_layouts, session_spec
from tests.ranks import RankPool
from tests.reference import FULL, LINEAR, make_model, relative_error, save_model

Pools = Callable[[int], RankPool]
REFERENCE = FusionRequest(backend="reference")
TOLERANCE = 1e-4  # relative to the largest logit
MAX_TOKENS = 6
# Heads for eight shares, KV heads fewer than those; a dense MLP and a bias that one rank alone may add.
MODEL = {
    "num_hidden_layers": 3,
    "layer_types": [LINEAR, FULL, LINEAR],
    "mlp_only_layers": [1],
    "attention_bias": True,
    "num_attention_heads": 8,
    "head_dim": 16,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LAYERS = 3
SIZES = {"cp": "attn_cp_size", "dp": "attn_dp_size", "moe_dp": "moe_dp_size", "ep": "ep_size"}


def layout(world_size: int, **sizes: int) -> ParallelLayout:
    return ParallelLayout(world_size, **{SIZES[name]: size for name, size in sizes.items()})


LAYOUTS = {
    2: [
        layout(2, ep=2),
        layout(2, cp=2),
        layout(2, cp=2, ep=2),
        layout(2, cp=2, moe_dp=2),
        layout(2, dp=2),
        layout(2, moe_dp=2),
    ],
    4: [
        layout(4, ep=2),
        layout(4, cp=2),
        layout(4, cp=2, moe_dp=2),
        layout(4, cp=2, moe_dp=2, ep=2),
        layout(4, cp=4, moe_dp=2),
        layout(4, dp=2, ep=4),
        layout(4, dp=2, cp=2, ep=2),
    ],
    8: [
        layout(8, cp=2, moe_dp=2, ep=2),
        layout(8, cp=4, ep=8),
        layout(8, cp=8, moe_dp=8),
        layout(8, dp=2, cp=2, moe_dp=2, ep=2),
    ],
}


class Model:
    """A checkpoint, prompts, and what one rank makes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(save_model(make_model("base", **MODEL), folder, packed=False))
        rng = np.random.default_rng(0)
        # Chunks of 48 split the first prompt; 1 and 3 tokens are fewer than the ranks of a context-parallel group.
        self.prompts = [[int(t) for t in rng.integers(1, 131, n)] for n in (67, 5, 1, 3)]
        with LLM(self.folder, max_step_tokens=48, max_num_seqs=3, max_model_len=128) as llm:
            self.wanted = llm.generate(self.prompts, params(MAX_TOKENS))

    def error(self, outputs: list[RequestOutput]) -> float:
        """The largest relative error of any logits, infinite when other tokens were chosen."""
        worst = 0.0
        for got, want in zip(outputs, self.wanted, strict=True):
            if got.token_ids != want.token_ids:
                return float("inf")
            worst = max(worst, relative_error(np.stack(got.logits), np.stack(want.logits)))
        return worst

    def check(self, outputs: list[RequestOutput]) -> None:
        assert self.error(outputs) <= TOLERANCE
        for got, want in zip(outputs, self.wanted, strict=True):
            assert got.prompt_logprobs is not None
            assert want.prompt_logprobs is not None
            difference = np.abs(np.array(got.prompt_logprobs) - np.array(want.prompt_logprobs))
            assert difference.max(initial=0) <= 10 * TOLERANCE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("layouts"))


def per_pass(run: LayoutRun) -> Reductions:
    """What each pass must reduce, by the rules: every sum that is owed once, by the way its batch rule allows."""
    decision, fused, owed = run.decision, 0, 0
    sizes = {"attention": decision.layout.attn_tp_size, "mlp": decision.layout.moe_reduce_size}
    for side, size in sizes.items():
        if size > 1:
            owed += LAYERS
            fused += LAYERS * (run.fused and decision.fuses(1, side=side, itemsize=4).fuses)
    return Reductions(fused, owed - fused)


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_every_layout_agrees_with_one_rank(world_size: int, model: Model, ranks: Pools) -> None:
    """Fused where the rules allow it, and unfused; every rank has the same bits, and every sum is counted."""
    specs = [session_spec(model.folder, layout, REFERENCE) for layout in LAYOUTS[world_size]]
    by_rank = ranks(world_size).run(run_layouts, specs, model.prompts, MAX_TOKENS, timeout=200)
    seen = []
    for on_ranks in zip(*by_rank, strict=True):
        run = on_ranks[0]
        seen.append((run.decision.layout, run.fused))
        assert {other.digest for other in on_ranks} == {run.digest}, f"ranks differ under {seen[-1]}"
        model.check(run.outputs)
        each = per_pass(run)
        # The first prompt takes part in two prefill passes and in a pass for every further token.
        passes = 2 + MAX_TOKENS - 1
        wanted = Reductions(each.fused * passes, each.unfused * passes)
        assert run.outputs[0].reductions == wanted, seen[-1]
    for layout in LAYOUTS[world_size]:
        assert (layout, False) in seen
        owes = max(layout.attn_tp_size, layout.moe_reduce_size) > 1
        assert ((layout, True) in seen) == (owes and layout.attn_dp_size == 1)
