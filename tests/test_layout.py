"""Groups of the parallel layout, checked by hand and by what must hold for every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shared_config import ParallelLayout, Qwen3NextConfig, RankGroups
from shared_config.layout import GROUP_NAMES, RankPlace
from tests.test_config import HUB_CONFIG

CONFIG = Qwen3NextConfig.from_hf(HUB_CONFIG)


def test_one_rank() -> None:
    layout = ParallelLayout()
    assert layout.world_size == 1
    assert layout.groups(0) == RankGroups((0,), (0,), (0,), (0,), (0,))
    assert layout.moe_reduce(0) == (0,)


def test_context_parallel_groups_are_strided() -> None:
    layout = ParallelLayout(tp_size=4, attn_cp_size=2)
    assert layout.all_groups("attn_tp") == ((0, 1), (2, 3))
    assert layout.all_groups("attn_cp") == ((0, 2), (1, 3))
    assert layout.all_groups("moe_reduce") == layout.all_groups("world") == ((0, 1, 2, 3),)
    assert layout.groups(3).attn_cp == (1, 3)


def test_expert_parallel_groups_are_strided() -> None:
    layout = ParallelLayout(tp_size=4, ep_size=2)
    assert layout.all_groups("moe_tp") == ((0, 1), (2, 3))
    assert layout.all_groups("moe_ep") == ((0, 2), (1, 3))
    assert layout.all_groups("attn_tp") == layout.all_groups("moe_reduce") == ((0, 1, 2, 3),)


def test_attention_and_moe_cut_the_same_ranks_differently() -> None:
    layout = ParallelLayout(tp_size=16, attn_cp_size=2, attn_dp_size=2, moe_dp_size=2, ep_size=4, nnodes=2)
    assert (layout.attn_tp_size, layout.moe_tp_size, layout.moe_reduce_size) == (4, 2, 8)
    assert layout.groups(13) == RankGroups(
        world=tuple(range(16)),
        attn_tp=(12, 13, 14, 15),
        attn_cp=(9, 13),
        moe_tp=(12, 13),
        moe_ep=(9, 11, 13, 15),
    )
    assert layout.moe_reduce(13) == tuple(range(8, 16))
    assert layout.place(13) == RankPlace(dp=1, cp=1, tp=1, moe_dp=1, ep=2, moe_tp=1)
    assert layout.pieces(13) == (1, 5, 9, 13)


def test_a_moe_slice_gathers_its_attention_pieces() -> None:
    """Context-parallel ranks hold different rows in prefill alone, data-parallel ranks always."""
    layout = ParallelLayout(tp_size=8, attn_cp_size=2, attn_dp_size=2)
    assert layout.pieces_per_slice == 4
    assert layout.all_groups("prefill_gather") == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert layout.all_groups("decode_gather") == ((0, 4), (1, 5), (2, 6), (3, 7))
    sliced = ParallelLayout(tp_size=8, attn_cp_size=2, attn_dp_size=2, moe_dp_size=2)
    assert sliced.all_groups("prefill_gather") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert sliced.all_groups("decode_gather") == tuple((rank,) for rank in range(8))
    within = ParallelLayout(tp_size=4, moe_dp_size=2)  # two slices in one piece: both have its rows
    assert (within.pieces_per_slice, within.gather(3, prefill=True)) == (1, (3,))


SIZES = st.sampled_from([1, 2, 3, 4])


@settings(max_examples=100, deadline=None)
@given(cp=SIZES, attn_dp=SIZES, moe_dp=SIZES, ep=SIZES, tp_factor=st.sampled_from([1, 2, 3, 6, 12]))
def test_groups_partition_the_world(cp: int, attn_dp: int, moe_dp: int, ep: int, tp_factor: int) -> None:
    tp_size = cp * attn_dp * tp_factor
    assume(tp_size % (moe_dp * ep) == 0)
    attn_tp, moe_reduce = tp_factor, tp_size // moe_dp
    assume(moe_reduce % attn_tp == 0 or attn_tp % moe_reduce == 0)
    pieces = max(1, moe_reduce // attn_tp)
    assume(pieces % cp == 0 or cp % pieces == 0)
    layout = ParallelLayout(tp_size, cp, attn_dp, moe_dp, ep)
    sizes = {
        "world": tp_size,
        "attn_tp": layout.attn_tp_size,
        "attn_cp": cp,
        "moe_tp": layout.moe_tp_size,
        "moe_ep": ep,
        "moe_reduce": layout.moe_tp_size * ep,
        "pieces": cp * attn_dp,
        "prefill_gather": pieces,
        "decode_gather": max(1, pieces // cp),
    }
    for name in GROUP_NAMES:
        groups = layout.all_groups(name)
        assert sorted(rank for group in groups for rank in group) == list(range(tp_size))
        assert {len(group) for group in groups} == {sizes[name]}
    for rank in range(tp_size):
        groups = layout.groups(rank)
        assert all(rank in group for group in vars(groups).values())
        # A debt of the MoE is exactly its tensor- and expert-parallel ranks: none twice, none left out.
        members = {r for peer in groups.moe_ep for r in layout.groups(peer).moe_tp}
        assert layout.moe_reduce(rank) == tuple(sorted(members))
        place = layout.place(rank)
        assert rank == (place.dp * cp + place.cp) * attn_tp + place.tp
        assert rank == (place.moe_dp * ep + place.ep) * layout.moe_tp_size + place.moe_tp
        # A slice's debt covers every piece that it gathers.
        assert set(layout.gather(rank, prefill=True)) <= set(layout.moe_reduce(rank))


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"tp_size": 4, "attn_cp_size": 3}, "tp_size 4 is not divisible by attn_cp_size . attn_dp_size = 3"),
        ({"tp_size": 4, "attn_cp_size": 4, "attn_dp_size": 2}, "tp_size 4 .* = 8"),
        ({"tp_size": 6, "ep_size": 4}, "tp_size 6 is not divisible by ep_size . moe_dp_size = 4"),
        ({"tp_size": 2, "moe_dp_size": 4}, "tp_size 2 .* = 4"),
        ({"tp_size": 4, "nnodes": 3}, "tp_size 4 is not divisible by nnodes = 3"),
        (
            {"tp_size": 6, "attn_cp_size": 2, "moe_dp_size": 3},
            "attention-TP size 3 and the MoE-TP x EP size 2",
        ),
        (
            {"tp_size": 6, "attn_cp_size": 2, "attn_dp_size": 3, "moe_dp_size": 2},
            "number of attention pieces in a MoE slice 3 and the attn_cp_size 2",
        ),
        ({"tp_size": 0}, "tp_size must be an integer of at least 1, got 0"),
        ({"ep_size": 1.0}, "ep_size must be an integer of at least 1, got 1.0"),
        ({"nnodes": True}, "nnodes must be an integer of at least 1, got True"),
    ],
)
def test_impossible_layouts_name_both_numbers(sizes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ParallelLayout(**sizes)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    layout = ParallelLayout(tp_size=4)
    with pytest.raises(ValueError, match=rf"rank must be from 0 to 3 \(tp_size 4\), got {rank}"):
        layout.groups(rank)
    with pytest.raises(ValueError, match="rank must be"):
        layout.moe_reduce(rank)


def test_an_unknown_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name must be one of world, .*, got 'dp'"):
        ParallelLayout().all_groups("dp")


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8, 16])
def test_the_80b_model_splits(tp_size: int) -> None:
    ParallelLayout(tp_size).validate(CONFIG)  # 2 KV heads: split at 2, replicated from 4 on


@pytest.mark.parametrize(
    ("changes", "layout", "named"),
    [
        ({}, {"tp_size": 3}, "num_attention_heads 16 is not divisible by the attention-TP size 3"),
        (
            {"num_attention_heads": 32},
            {"tp_size": 32},
            "linear_num_key_heads 16 is not divisible by the attention-TP size 32",
        ),
        (
            {},
            {"tp_size": 32, "attn_cp_size": 2},
            "num_attention_heads 16 is not divisible by the attention-TP x CP size 32",
        ),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 3, "linear_num_key_heads": 2},
            {"tp_size": 2},
            "num_key_value_heads 3 and the attention-TP size 2 do not divide one another",
        ),
        (
            {"num_experts": 10},
            {"tp_size": 4, "ep_size": 4},
            "num_experts 10 is not divisible by the ep_size 4",
        ),
        (
            {"moe_intermediate_size": 6},
            {"tp_size": 4},
            "moe_intermediate_size 6 is not divisible by the MoE-TP size 4",
        ),
        (
            {"shared_expert_intermediate_size": 6},
            {"tp_size": 4, "ep_size": 4},
            "shared_expert_intermediate_size 6 is not divisible by the MoE-TP x EP size 4",
        ),
        (
            {"intermediate_size": 6, "mlp_only_layers": (0,)},
            {"tp_size": 4},
            "intermediate_size 6 is not divisible by the MoE-TP x EP size 4",
        ),
    ],
)
def test_a_model_that_does_not_split_names_both_numbers(changes: dict, layout: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ParallelLayout(**layout).validate(replace(CONFIG, **changes))


def test_sizes_that_no_layer_uses_are_not_checked() -> None:
    ParallelLayout(tp_size=4).validate(replace(CONFIG, intermediate_size=6))
    ParallelLayout(tp_size=4).validate(replace(CONFIG, num_experts=0, moe_intermediate_size=6))
