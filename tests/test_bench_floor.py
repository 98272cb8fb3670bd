"""The roofline's arithmetic against cases worked out by hand."""

from __future__ import annotations

import pytest

from bench.floor import Chunk, Work, decode_chunks, floor_us, step_work
from bench.machine import Rates
from shared_config import Qwen3NextConfig
from shared_config.presets import PRESETS, with_layers

H200 = Rates(memory_bytes_per_s=4.3e12, flops_per_s=788e12, link_bytes_per_s=450e9)
BIG = Qwen3NextConfig.from_hf(PRESETS["80b"])


@pytest.mark.parametrize(
    ("batch", "distinct_experts", "gigabytes", "memory_ms"),
    [
        (1, 10, 3.70, 0.86),
        (8, 75, 14.1, 3.28),
        (32, 240, 41.2, 9.57),
        (64, 367, 63.3, 14.7),
        (128, 471, 84.7, 19.7),
    ],
)
def test_decode_of_80b_on_two_gpus(
    batch: int, distinct_experts: int, gigabytes: float, memory_ms: float
) -> None:
    work = step_work(BIG, tp=2, chunks=decode_chunks(batch, 1024), distinct_experts=distinct_experts)
    assert sum(part.memory_bytes for part in work.values()) / 1e9 == pytest.approx(gigabytes, rel=0.005)
    wire_ms = work["all-reduce"].wire_bytes / 450e9 * 1e3
    assert floor_us(work, H200) / 1e3 == pytest.approx(memory_ms + wire_ms, rel=0.01)


def test_prefill_of_80b_on_two_gpus() -> None:
    """8,192 tokens: projections at the GPU's peak, all experts read once, 96 messages of 32 MiB."""
    work = step_work(BIG, tp=2, chunks=(Chunk(0, 8192),), distinct_experts=512)
    milliseconds = {name: part.seconds(H200) * 1e3 for name, part in work.items()}
    assert milliseconds["projections"] == pytest.approx(18.6, rel=0.01)
    assert milliseconds["experts"] == pytest.approx(18.0, rel=0.01)
    assert milliseconds["all-reduce"] == pytest.approx(96 * 2**25 / 450e9 * 1e3)
    # Two products of [8192 x 256] with a triangle of keys, for 8 heads in 12 layers.
    pairs = 8192 * 8193 / 2
    assert work["attention"].flops == 2 * 2 * 256 * 8 * 12 * pairs


def small(**changes: object) -> Qwen3NextConfig:
    """Numbers small enough to multiply by hand."""
    config = PRESETS["80b"] | {
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "hidden_size": 10,
        "vocab_size": 7, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 3, "linear_value_head_dim": 5,
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 4, "shared_expert_intermediate_size": 8,
    }  # fmt: skip
    return Qwen3NextConfig.from_hf(config | changes)


def test_every_part_of_a_small_model_by_hand() -> None:
    """Two ranks, bfloat16, two sequences of 3 tokens, one of them behind 5 others; 4 of 6 experts touched."""
    work = step_work(small(), tp=2, chunks=(Chunk(0, 3), Chunk(5, 3)), distinct_experts=4)
    attention = 10 * (2 * 8 * 2) + 10 * (1 * 8 * 2) + 2 * 8 * 10  # q with gate, k and v of one head, output
    linear = 10 * (3 + 3 + 10 + 10 + 2 + 2) + (3 + 3 + 10) * 4 + 10 * 10  # q k v z b a, taps, output
    dense = 2 * (6 * 10 + 3 * 4 * 10 + 10)  # router, half of the shared expert, its gate
    weights = attention + linear + dense
    assert work["projections"] == Work(memory_bytes=2 * weights, flops=2 * 6 * weights)
    expert = 3 * 2 * 10
    assert work["experts"] == Work(memory_bytes=2 * 4 * expert * 2, flops=2 * 2 * 6 * 2 * expert)
    # 3 + 8 rows of k and v (8 elements each); 6 + 15 + 6 pairs for 2 heads.
    assert work["attention"] == Work(memory_bytes=11 * 2 * 8 * 2, flops=4 * (6 + 21) * 2 * 8)
    state, conv = 2 * 3 * 5, 16 * 3
    assert work["gated delta net"] == Work(
        memory_bytes=3 * (state * 4 + conv * 2), flops=6 * (6 * state + 2 * 16 * 4)
    )
    assert work["head"] == Work(memory_bytes=4 * 10 * 2, flops=2 * 2 * 4 * 10)  # 4 of the 7 padded rows
    assert work["all-reduce"] == Work(wire_bytes=2 * 2 * (6 * 10 * 2))  # 2 (N - 1) / N = 1 message each


def test_one_rank_sends_nothing_and_holds_everything() -> None:
    one = step_work(small(), tp=1, chunks=decode_chunks(1, 4), distinct_experts=2)
    two = step_work(small(), tp=2, chunks=decode_chunks(1, 4), distinct_experts=2)
    assert one["all-reduce"].wire_bytes == 0
    assert one["experts"].memory_bytes == 2 * two["experts"].memory_bytes


def test_key_value_heads_are_replicated_where_there_are_fewer_than_ranks() -> None:
    two = step_work(small(), tp=2, chunks=decode_chunks(1, 4), distinct_experts=2)
    four = step_work(small(), tp=4, chunks=decode_chunks(1, 4), distinct_experts=2)
    assert four["attention"].memory_bytes == two["attention"].memory_bytes
    assert four["all-reduce"].wire_bytes == pytest.approx(1.5 * two["all-reduce"].wire_bytes)


def test_dense_layers_have_no_experts() -> None:
    work = step_work(small(mlp_only_layers=[0, 1]), tp=2, chunks=decode_chunks(1, 4), distinct_experts=0)
    assert work["experts"] == Work()


def test_a_part_takes_the_longer_of_its_limits_and_then_the_wire() -> None:
    rates = Rates(memory_bytes_per_s=100.0, flops_per_s=1000.0, link_bytes_per_s=10.0)
    assert Work(memory_bytes=200, flops=1000, wire_bytes=5).seconds(rates) == 2.5
    assert Work(memory_bytes=10, flops=3000).seconds(rates) == 3.0
    no_link = Rates(100.0, 1000.0, None)
    assert Work(memory_bytes=200, wire_bytes=5).seconds(no_link) == 2.0
    assert Work(memory_bytes=200).seconds(no_link.shared_by(2)) == 4.0


def test_presets_are_cut_to_their_first_layers() -> None:
    cut = Qwen3NextConfig.from_hf(with_layers(PRESETS["80b"], 5))
    assert cut.layer_types == BIG.layer_types[:5]
    assert with_layers({"num_hidden_layers": 2, "layer_types": ["a", "b"]}, 1)["layer_types"] == ["a"]
    with pytest.raises(ValueError, match="from 1 to num_hidden_layers = 48, got 49"):
        with_layers(PRESETS["80b"], 49)
