"""Every layout against one rank, in float32 on real gloo ranks: prefill, chunked prefill, decode, fused and unfused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from core_torch import LLM
from core_torch.__main__ import main
from core_torch.kernels.moe import route, routed_experts, routed_experts_reference
from shared_config import (
    FlashInferInfo,
    FusionDecision,
    FusionRequest,
    HardwareInfo,
    ModelFacts,
    ParallelLayout,
    resolve_fusion,
)
from shared_config.results import Reductions, RequestOutput
from tests.layout_ranks import (
    layout_fault,
    params,
    run_layouts,
    session_spec,
    start_groups,
    trade,
)
from tests.ranks import RankError, RankPool
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
TINY = Path(__file__).parent / "data/tiny-qwen3-next"
SIZES = {"cp": "attn_cp_size", "dp": "attn_dp_size", "moe_dp": "moe_dp_size", "ep": "ep_size"}


def layout(world_size: int, **sizes: int) -> ParallelLayout:
    return ParallelLayout(world_size, **{SIZES[name]: size for name, size in sizes.items()})


def decide(layout: ParallelLayout) -> FusionDecision:
    model, hardware = ModelFacts("Qwen3NextForCausalLM", 64), HardwareInfo(device="cpu")
    return resolve_fusion(model, layout, hardware, FlashInferInfo(), REFERENCE)


# By world size; for each layout what a pass of three layers reduces (fused, unfused) where it may fuse.
LAYOUTS = {
    2: {
        layout(2, ep=2): Reductions(6, 0),
        layout(2, cp=2): Reductions(0, 3),  # attention has one rank; attn_cp_size is above moe_dp_size
        layout(2, cp=2, ep=2): Reductions(0, 3),
        layout(2, cp=2, moe_dp=2): Reductions(0, 0),
        layout(2, dp=2): Reductions(0, 3),
        layout(2, moe_dp=2): Reductions(3, 0),
    },
    4: {
        layout(4, ep=2): Reductions(6, 0),
        layout(4, cp=2): Reductions(3, 3),
        layout(4, cp=2, moe_dp=2): Reductions(6, 0),
        layout(4, cp=2, moe_dp=2, ep=2): Reductions(6, 0),
        layout(4, cp=4, moe_dp=2): Reductions(0, 3),
        layout(4, dp=2, ep=4): Reductions(0, 6),
        layout(4, dp=2, cp=2, ep=2): Reductions(0, 3),
    },
    8: {
        layout(8): Reductions(6, 0),  # each KV head on several ranks
        layout(8, cp=2, moe_dp=2, ep=2): Reductions(6, 0),
        layout(8, cp=4, ep=8): Reductions(3, 3),
        layout(8, cp=4, moe_dp=2, ep=2): Reductions(3, 3),  # a slice has half of the pieces
        layout(8, cp=8, moe_dp=8): Reductions(0, 0),
        layout(8, dp=2, cp=2, moe_dp=2, ep=2): Reductions(0, 6),
    },
}


class Model:
    """A checkpoint, prompts, and what one rank makes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(save_model(make_model("base", **MODEL), folder, packed=False))
        rng = np.random.default_rng(0)
        # Chunks of 48 split the first prompt; 1 and 3 tokens are fewer than the ranks of a context-parallel group.
        self.prompts = [[int(t) for t in rng.integers(1, 131, n)] for n in (67, 5, 1, 3)]
        with LLM(self.folder, max_step_tokens=48, max_num_seqs=3, max_model_len=128) as llm:
            self.wanted = llm.generate(self.prompts, params(MAX_TOKENS, len(self.prompts)))

    def error(self, outputs: list[RequestOutput]) -> float:
        """The largest relative error of any logits, infinite when other tokens were chosen."""
        worst = 0.0
        for got, want in zip(outputs, self.wanted, strict=False):
            if got.token_ids != want.token_ids:
                return float("inf")
            worst = max(worst, relative_error(np.stack(got.logits), np.stack(want.logits)))
        return worst

    def check(self, outputs: list[RequestOutput]) -> None:
        assert self.error(outputs) <= TOLERANCE
        got, want = (np.array(of[1].prompt_logprobs) for of in (outputs, self.wanted))
        assert np.abs(got - want).max() <= 10 * TOLERANCE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_every_layout_agrees_with_one_rank(world_size: int, model: Model, ranks: Pools) -> None:
    """Fused where the rules allow it, and unfused; every rank has the same bits, and every sum is counted."""
    layouts = LAYOUTS[world_size]
    specs = [session_spec(model.folder, layout, REFERENCE) for layout in layouts]
    by_rank = ranks(world_size).run(run_layouts, specs, model.prompts, MAX_TOKENS, timeout=200)
    seen = []
    for on_ranks in zip(*by_rank, strict=True):
        run = on_ranks[0]
        seen.append((run.decision.layout, run.fused))
        assert {other.digest for other in on_ranks} == {run.digest}, f"ranks differ under {seen[-1]}"
        model.check(run.outputs)
        each = layouts[run.decision.layout]
        if not run.fused:
            each = Reductions(0, each.fused + each.unfused)
        # The first prompt takes part in two prefill passes and in a pass for every further token.
        passes = 2 + MAX_TOKENS - 1
        wanted = Reductions(each.fused * passes, each.unfused * passes)
        assert run.outputs[0].reductions == wanted, seen[-1]
    for layout in layouts:
        assert (layout, False) in seen
        owes = max(layout.attn_tp_size, layout.moe_reduce_size) > 1
        assert ((layout, True) in seen) == (owes and layout.attn_dp_size == 1)


PIECES, SLICES, EXPERTS = layout(4, cp=2), layout(4, cp=2, moe_dp=2), layout(4, ep=2)


@pytest.mark.parametrize(
    ("fault", "layout", "error"),
    [
        ("attention's sum over the MoE group", PIECES, ""),
        ("the MoE's sum over the attention group", PIECES, ""),
        ("the experts' sum over the attention group", PIECES, "pay each to its own"),
        ("the gather is forgotten", PIECES, ""),
        ("another piece's rows are taken", PIECES, ""),
        ("paid twice", PIECES, ""),
        ("paid twice by the norm", SLICES, "it would be paid twice"),
        ("paid never", PIECES, ""),
        ("paid never by the norm", SLICES, ""),
        ("a debt is dropped", SLICES, "were never reduced"),
        ("every rank has the first experts", EXPERTS, ""),
        ("the shared expert is summed by every rank", EXPERTS, ""),
        ("pieces arrive in another order", SLICES, ""),
        ("heads come back in another order", SLICES, ""),
    ],
)
def test_a_layout_that_is_wrong_is_found(
    fault: str, layout: ParallelLayout, error: str, model: Model, ranks: Pools
) -> None:
    """By an error where types can tell, else by logits that are far off."""
    specs = [session_spec(model.folder, layout, REFERENCE)]
    wrong = functools.partial(layout_fault, fault)
    run = functools.partial(ranks(4).run, run_layouts, specs, model.prompts[:1], MAX_TOKENS, wrong)
    if error:
        with pytest.raises(RankError, match=error):
            run()
    else:
        assert model.error(run()[0][0].outputs) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        (EXPERTS, [[(0, 1, 2, 3)]] * 4),  # attention and MoE share one
        (PIECES, [[(0, 1), (0, 1, 2, 3)]] * 2 + [[(2, 3), (0, 1, 2, 3)]] * 2),
        (SLICES, [[(0, 1)]] * 2 + [[(2, 3)]] * 2),
        (layout(4, cp=4), [[(0, 1, 2, 3)]] * 4),
        (layout(4, cp=4, moe_dp=4), [[]] * 4),
        (layout(4, dp=2), [[]] * 4),
    ],
    ids=str,
)
def test_each_group_of_several_ranks_has_one_workspace_and_one_self_test(
    layout: ParallelLayout, groups: list[list[tuple[int, ...]]], ranks: Pools
) -> None:
    for started, wanted in zip(ranks(4).run(start_groups, decide(layout)), groups, strict=True):
        assert started.tested == wanted
        assert started.shared == (bool(wanted) and layout.attn_tp_size == layout.moe_reduce_size)
        assert started.enabled == bool(wanted)
        assert started.all_closed


def test_a_group_that_fails_stops_those_that_have_started(ranks: Pools) -> None:
    """The MoE's group fails on one rank, after attention's groups were up: nothing fuses anywhere, and all know why."""
    for started in ranks(4).run(start_groups, decide(PIECES), 3, (0, 1, 2, 3)):
        assert not started.enabled
        assert started.reason == "creating the workspace failed on rank 3 (RuntimeError: injected)"
        assert len(started.tested) == 1
        assert started.all_closed


def test_ranks_that_are_not_neighbours_trade_rows(ranks: Pools) -> None:
    """Groups [0, 2] and [1, 3]: a rank's place among its peers is not its global rank."""
    for rank, got in enumerate(ranks(4).run(trade, PIECES)):
        first, second = rank % 2, rank % 2 + 2
        mine = rank // 2
        assert got["ranks"] == (first, second)
        assert got["place"] == mine
        assert got["gathered"] == [[first] * 2, [second] * 2]
        assert got["traded"] == [[first, mine], [second, mine]]
        assert got["summed"] == [float(first + second)] * 2


def test_a_model_that_a_layout_cannot_cut_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="num_attention_heads 8 is not divisible by the attention-TP x CP"):
        LLM(model.folder, 16, attn_cp_size=2)


def test_generate_command_takes_a_layout(capfd: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", str(TINY), "--tp", "2", "--device", "cpu", "--prompt", "def "]
    assert main([*command, "--cp", "2", "--max-tokens", "4"]) == 0
    assert "reductions: 0 fused, 32 unfused" in capfd.readouterr().out  # 8 layers, the MoE's alone, 4 passes
    assert main([*command, "--ep", "3"]) == 2
    assert "tp_size 2 is not divisible by ep_size * moe_dp_size = 3" in capfd.readouterr().err


@pytest.mark.parametrize("ep_size", [2, 4])
@pytest.mark.parametrize("num_tokens", [1, 3, 67])
def test_blocks_of_experts_add_up(ep_size: int, num_tokens: int) -> None:
    """Each block for all rows, others' experts masked, against float64; a block that nobody chose gives zeros."""
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 16, generator=generator)
    gate_up, down = torch.randn(8, 24, 16, generator=generator), torch.randn(8, 16, 12, generator=generator)
    weights, experts = route(torch.randn(num_tokens, 8, generator=generator), top_k=3, normalize=True)
    size = 8 // ep_size
    parts = [
        routed_experts(x, weights, experts, gate_up[n : n + size], down[n : n + size], first=n)
        for n in range(0, 8, size)
    ]
    want = routed_experts_reference(x, weights, experts, gate_up, down)
    assert torch.allclose(sum(parts[1:], parts[0]).double(), want, atol=1e-4)
    nobody = routed_experts(x, weights, experts, gate_up, down, first=8)
    assert not nobody.any()
