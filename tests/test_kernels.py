"""Each kernel of the model against its float64 reference, at odd sizes."""

from __future__ import annotations

import pytest
import torch

from core_torch.kernels import attention, causal_conv, gated_delta_rule, moe, norm, rope

SIZES = (1, 3, 63, 67, 130)
# Largest error over largest value. float32: rounding of sums of up to ~100 terms. bfloat16: 8 bits, a few roundings.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    error = ((got.double() - want).abs().max() / want.abs().max()).item()
    assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T", SIZES)
def test_rms_norm(T: int, dtype: torch.dtype) -> None:
    x, weight = randn(T, 72, dtype=dtype) * 3, randn(72, dtype=dtype) * 0.1
    for bias in (0.0, 1.0):
        want = norm.rms_norm_reference(x, weight, eps=1e-6, weight_bias=bias)
        assert_close(norm.rms_norm(x, weight, eps=1e-6, weight_bias=bias), want, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gated_rms_norm(dtype: torch.dtype) -> None:
    x, gate, weight = (
        randn(67, 4, 24, dtype=dtype),
        randn(67, 4, 24, seed=1, dtype=dtype),
        randn(24, dtype=dtype),
    )
    want = norm.gated_rms_norm_reference(x, gate, weight, eps=1e-6)
    assert_close(norm.gated_rms_norm(x, gate, weight, eps=1e-6), want, dtype)


@pytest.mark.parametrize("rotary_dim", [8, 16, 32])
def test_rope(rotary_dim: int) -> None:
    x, positions = randn(63, 3, 32), torch.arange(5, 68)
    cos, sin = rope.rotary_cos_sin(positions, rotary_dim=rotary_dim, theta=1e4)
    want = rope.apply_rotary_reference(x, positions, rotary_dim=rotary_dim, theta=1e4)
    assert_close(rope.apply_rotary(x, cos, sin), want, torch.float32)


@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("taps", [2, 4])
def test_causal_conv(T: int, taps: int) -> None:
    x, state, weight = randn(T, 12), randn(12, taps - 1, seed=1), randn(12, taps, seed=2)
    want, want_state = causal_conv.causal_conv_reference(x, state, weight)
    out, new = causal_conv.causal_conv(x, state, weight)
    assert_close(out, want, torch.float32)
    assert torch.equal(new.double(), want_state)
    stepped, rows = state[None], []
    for token in x:
        row, stepped = causal_conv.causal_conv_step(token[None], stepped, weight)
        rows.append(row)
    assert_close(torch.cat(rows), want, torch.float32)
    assert torch.equal(stepped[0].double(), want_state)


Five = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def each(inputs: Five, rows: slice) -> Five:
    q, k, v, g, beta = (x[rows] for x in inputs)
    return q, k, v, g, beta


def delta_inputs(T: int, H: int, HV: int, dk: int, dv: int) -> Five:
    a, b = randn(T, HV, seed=3) * 2, randn(T, HV, seed=4)
    g, beta = gated_delta_rule.gated_delta_gates(a, b, randn(HV, seed=5), randn(HV, seed=6))
    return randn(T, H, dk), randn(T, H, dk, seed=1), randn(T, HV, dv, seed=2), g, beta


@pytest.mark.parametrize(("H", "HV", "dk", "dv"), [(2, 2, 8, 8), (2, 6, 8, 12), (1, 4, 16, 8)])
@pytest.mark.parametrize("T", SIZES)
def test_gated_delta_rule(T: int, H: int, HV: int, dk: int, dv: int) -> None:
    inputs, state = delta_inputs(T, H, HV, dk, dv), randn(HV, dk, dv, seed=7)
    want, want_state = gated_delta_rule.gated_delta_rule_reference(*inputs, state)
    out, new = gated_delta_rule.chunk_gated_delta_rule(*inputs, state)
    assert_close(out, want, torch.float32)
    assert_close(new, want_state, torch.float32)
    stepped, rows = state[None], []
    for t in range(T):
        row, stepped = gated_delta_rule.gated_delta_rule_step(*each(inputs, slice(t, t + 1)), stepped)
        rows.append(row)
    assert_close(torch.cat(rows), want, torch.float32)
    assert_close(stepped[0], want_state, torch.float32)


def test_gated_delta_rule_in_two_pieces() -> None:
    inputs, state = delta_inputs(150, 2, 4, 8, 8), randn(4, 8, 8)
    whole, final = gated_delta_rule.chunk_gated_delta_rule(*inputs, state)
    first, middle = gated_delta_rule.chunk_gated_delta_rule(*each(inputs, slice(67)), state)
    second, end = gated_delta_rule.chunk_gated_delta_rule(*each(inputs, slice(67, None)), middle)
    assert_close(torch.cat((first, second)), whole.double(), torch.float32)
    assert_close(end, final.double(), torch.float32)


def paged(length: int, G: int, d: int, page: int) -> tuple[torch.Tensor, ...]:
    """(k, v, k_cache, v_cache, page table) of one sequence in shuffled pages of a NaN-filled cache."""
    pages = -(-length // page)
    table = torch.randperm(pages + 3, generator=torch.Generator().manual_seed(0))[:pages] + 1
    k, v = randn(length, G, d, seed=8), randn(length, G, d, seed=9)
    k_cache, v_cache = torch.full((2, pages + 4, page, G, d), float("nan"))
    slots = torch.tensor([int(table[p // page]) * page + p % page for p in range(length)])
    attention.write_kv(k, v, k_cache, v_cache, slots)
    return k, v, k_cache, v_cache, table


@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("length", "T"), [(1, 1), (3, 3), (67, 67), (67, 4), (130, 63)])
def test_prefill_attention(H: int, G: int, length: int, T: int) -> None:
    k, v, k_cache, v_cache, table = paged(length, G, 16, 8)
    q = randn(T, H, 16)
    want = attention.attention_reference(q, k, v, scale=0.25)
    got = attention.prefill_attention(q, k_cache, v_cache, table, start=length - T, scale=0.25)
    assert_close(got, want, torch.float32)


@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (6, 1)])
def test_decode_attention_reads_only_what_is_valid(H: int, G: int) -> None:
    lengths, page = (1, 67, 130), 8
    width = -(-max(lengths) // page)
    tables, caches, rows = [], [], []
    offset = 0
    for length in lengths:
        k, v, k_cache, v_cache, table = paged(length, G, 16, page)
        q = randn(1, H, 16, seed=length)
        rows.append((q, attention.attention_reference(q, k, v, scale=0.25)))
        tables.append(torch.nn.functional.pad(table + offset, (0, width - len(table)), value=0))
        caches.append((k_cache, v_cache))
        offset += k_cache.shape[0]
    k_cache, v_cache = (torch.cat(c) for c in zip(*caches, strict=True))
    got = attention.decode_attention(
        torch.cat([q for q, _ in rows]),
        k_cache.nan_to_num(1e4),
        v_cache,  # stale values may be NaN; stale keys are masked after the product, so they must be finite
        torch.stack(tables),
        torch.tensor(lengths),
        scale=0.25,
    )
    assert_close(got, torch.cat([want for _, want in rows]), torch.float32)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("T", SIZES)
def test_routed_experts(T: int, normalize: bool) -> None:
    x, logits = randn(T, 24), randn(T, 7, seed=1)
    gate_up, down = randn(7, 20, 24, seed=2) / 5, randn(7, 24, 10, seed=3) / 3
    weights, experts = moe.route(logits, top_k=3, normalize=normalize)
    probabilities = logits.double().softmax(-1)
    assert torch.equal(experts, probabilities.topk(3).indices)
    want = probabilities.gather(1, experts)
    want = want / want.sum(-1, keepdim=True) if normalize else want
    assert_close(weights, want, torch.float32)
    got = moe.routed_experts(x, weights, experts, gate_up, down)
    assert_close(got, moe.routed_experts_reference(x, weights, experts, gate_up, down), torch.float32)
