"""The JAX kernels against the float64 references of the PyTorch kernels, at odd sizes, and the debts between layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from core_torch.kernels import attention as torch_attention
from core_torch.kernels import causal_conv as torch_conv
from core_torch.kernels import gated_delta_rule as torch_rule
from core_torch.kernels import moe as torch_moe
from core_torch.kernels import norm as torch_norm
from core_torch.kernels import rope as torch_rope
from jax_bridge.kernels import attention, causal_conv, gated_delta_rule, moe, norm, rope
from jax_bridge.partial_sum import DebtError, PartialSum, ReduceAxis

SIZES = (1, 3, 63, 67)
# Largest error over largest value. float32: rounding of sums of up to ~100 terms. bfloat16: 8 bits, a few roundings.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def randn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)


def on_torch(*arrays: Any) -> list[torch.Tensor]:
    """float64 is what the references compute in; bfloat16 values are exact in it."""
    return [torch.from_numpy(np.asarray(x, np.float64)) for x in arrays]


def assert_close(got: Any, want: torch.Tensor, dtype: str = "float32") -> None:
    wanted = want.double().numpy()
    error = np.abs(np.asarray(got, np.float64) - wanted).max() / np.abs(wanted).max()
    assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T", SIZES)
def test_norms(T: int, dtype: str) -> None:
    x, gate, weight = (jnp.asarray(randn(*s, seed=i), dtype) for i, s in enumerate(((T, 72), (T, 72), (72,))))
    x64, gate64, weight64 = on_torch(x, gate, weight)
    for bias in (0.0, 1.0):
        want = torch_norm.rms_norm_reference(x64, weight64, eps=1e-6, weight_bias=bias)
        assert_close(norm.rms_norm(x, weight, eps=1e-6, weight_bias=bias), want, dtype)
    want = torch_norm.gated_rms_norm_reference(x64, gate64, weight64, eps=1e-6)
    assert_close(norm.gated_rms_norm(x, gate, weight, eps=1e-6), want, dtype)


@pytest.mark.parametrize("rotary_dim", [8, 16, 32])
def test_rope(rotary_dim: int) -> None:
    x, positions = randn(63, 3, 32), np.arange(5, 68, dtype=np.int32)
    cos, sin = rope.rotary_cos_sin(jnp.asarray(positions), rotary_dim=rotary_dim, theta=1e4)
    (x64,) = on_torch(x)
    want = torch_rope.apply_rotary_reference(
        x64, torch.from_numpy(positions), rotary_dim=rotary_dim, theta=1e4
    )
    assert_close(rope.apply_rotary(jnp.asarray(x), cos, sin), want)


@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3)])
def test_paged_attention(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences with pages in any order; what lies past their ends, NaN too, and page 0 do not show."""
    (H, G), d, page_size, lengths = heads, 16, 8, (19, 5)
    tables = np.array([[5, 2, 7, 0], [3, 0, 0, 0]], np.int32)
    keys, values = (randn(2, 32, G, d, seed=i) for i in (1, 2))
    k_cache, v_cache = (jnp.full((8, page_size, G, d), np.nan, jnp.float32) for _ in range(2))
    for s, length in enumerate(lengths):
        at = np.arange(length)
        slots = jnp.asarray(tables[s][at // page_size] * page_size + at % page_size)
        k_cache, v_cache = attention.write_kv(
            jnp.asarray(keys[s, :length]), jnp.asarray(values[s, :length]), k_cache, v_cache, slots
        )
    counts = (11, 5)  # of the last tokens, in chunks of 12 rows
    q = randn(2, 12, H, d)
    starts = np.array([n - c for n, c in zip(lengths, counts, strict=True)], np.int32)
    sizes = jnp.asarray(np.array(lengths, np.int32))
    out = attention.prefill_attention(
        jnp.asarray(q),
        k_cache,
        v_cache,
        jnp.asarray(tables),
        starts=jnp.asarray(starts),
        lengths=sizes,
        scale=0.25,
    )
    monkeypatch.setattr(attention, "MAX_SCORES", 1)  # three rows at a time
    piecewise = attention.prefill_attention(
        jnp.asarray(q),
        k_cache,
        v_cache,
        jnp.asarray(tables),
        starts=jnp.asarray(starts),
        lengths=sizes,
        scale=0.25,
    )
    np.testing.assert_allclose(piecewise, out, rtol=1e-5, atol=1e-6)
    last = np.stack([q[s, counts[s] - 1] for s in range(2)])
    step = attention.decode_attention(
        jnp.asarray(last), k_cache, v_cache, jnp.asarray(tables), sizes, scale=0.25
    )
    for s, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        want = torch_attention.attention_reference(
            *on_torch(q[s, :count], keys[s, :length], values[s, :length]), scale=0.25
        )
        assert_close(out[s, :count], want)
        assert_close(step[s], want[-1])


@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("taps", [2, 4])
def test_causal_conv(T: int, taps: int) -> None:
    """A padded chunk and its state; steps one after another."""
    x, state, weight = randn(T, 12), randn(12, taps - 1, seed=1), randn(12, taps, seed=2)
    want, want_state = torch_conv.causal_conv_reference(*on_torch(x, state, weight))
    padded = jnp.pad(jnp.asarray(x), ((0, 5), (0, 0)), constant_values=9.0)[None]
    out, new = causal_conv.causal_conv(
        padded, jnp.asarray(state)[None], jnp.asarray(weight), jnp.full((1,), T, jnp.int32)
    )
    assert_close(out[0, :T], want)
    assert np.array_equal(new[0], want_state.numpy())
    row, stepped = causal_conv.causal_conv_step(
        jnp.asarray(x[:1]), jnp.asarray(state)[None], jnp.asarray(weight)
    )
    assert_close(row[0], want[0])
    assert np.array_equal(stepped[0, :, -1], x[0])


@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("chunk", [16, 64])
def test_gated_delta_rule(T: int, chunk: int) -> None:
    """Chunks with padding that leaves the state alone, then one step more."""
    H, HV, dk, dv = 2, 6, 8, 12
    q, k, v = randn(T + 1, H, dk), randn(T + 1, H, dk, seed=1), randn(T + 1, HV, dv, seed=2)
    a, b, state = 2 * randn(T + 1, HV, seed=3), randn(T + 1, HV, seed=4), randn(HV, dk, dv, seed=5)
    gates = randn(HV, seed=6), randn(HV, seed=7)
    g, beta = gated_delta_rule.gated_delta_gates(*map(jnp.asarray, (a, b, *gates)))
    want_gates = torch_rule.gated_delta_gates(*(x.float() for x in on_torch(a, b, *gates)))
    assert_close(g, want_gates[0])
    assert_close(beta, want_gates[1])
    want, want_state = torch_rule.gated_delta_rule_reference(*on_torch(q, k, v, g, beta, state))

    def padded(x: Any) -> jax.Array:
        return jnp.pad(jnp.asarray(x)[:T], ((0, 7), *((0, 0),) * (x.ndim - 1)))

    run = jax.jit(gated_delta_rule.chunk_gated_delta_rule, static_argnames="chunk")
    out, new = run(*(padded(x) for x in (q, k, v, g, beta)), jnp.asarray(state), chunk=chunk)
    assert_close(out[:T], want[:T])
    last = [jnp.asarray(x)[T:] for x in (q, k, v, g, beta)]
    out, new = gated_delta_rule.gated_delta_rule_step(*last, state=new[None])
    assert_close(out[0], want[T])
    assert_close(new[0], want_state)


@pytest.mark.parametrize("size", [1, 3, 16, 63, 64])
def test_inverse_of_unit_triangular(size: int) -> None:
    """What is on and above the diagonal does not matter; values like those of keys that are nearly parallel."""
    for system in (randn(3, size, size), np.full((3, size, size), 0.97, np.float32)):
        want = torch.linalg.inv(torch.tril(torch.from_numpy(system).double(), -1) + torch.eye(size).double())
        assert_close(gated_delta_rule.invert_unit_lower(jnp.asarray(system)), want)


@pytest.mark.parametrize(
    "T", [1, 2, 3, 67]
)  # two experts of eight each: from T = 5 on tokens are grouped by expert
def test_routed_experts(T: int) -> None:
    D, intermediate, N = 24, 10, 8
    x, logits = randn(T, D), randn(T, N, seed=1)
    gate_up, down = randn(N, 2 * intermediate, D, seed=2), randn(N, D, intermediate, seed=3)
    for normalize in (True, False):
        weights, experts = moe.route(jnp.asarray(logits), top_k=2, normalize=normalize)
        want_weights, want_experts = torch_moe.route(torch.from_numpy(logits), top_k=2, normalize=normalize)
        assert np.array_equal(experts, want_experts.numpy())
        assert_close(weights, want_weights)
        x64, weights64, gate_up64, down64 = on_torch(x, weights, gate_up, down)
        want = torch_moe.routed_experts_reference(x64, weights64, want_experts, gate_up64, down64)
        got = moe.routed_experts(jnp.asarray(x), weights, experts, jnp.asarray(gate_up), jnp.asarray(down))
        assert_close(got, want)


@pytest.mark.parametrize("T", [2, 67, 300])
def test_routed_experts_with_rows_of_none_and_crowded_ones(T: int) -> None:
    """All rows want expert 3, which takes several rounds; a third of the choices are of no expert."""
    D, intermediate, N, K = 24, 10, 8, 3
    x, gate_up, down = randn(T, D), randn(N, 2 * intermediate, D, seed=2), randn(N, D, intermediate, seed=3)
    rng = np.random.default_rng(T)
    experts = np.stack(
        (np.full(T, 3), rng.integers(4, N, T), np.where(np.arange(T) % 3, -1, 0)), axis=1
    ).astype(np.int32)
    weights = rng.random((T, K), np.float32)
    nobody = experts < 0
    x64, weights64, gate_up64, down64 = on_torch(x, np.where(nobody, 0, weights), gate_up, down)
    chosen = torch.from_numpy(np.where(nobody, 0, experts))
    want = torch_moe.routed_experts_reference(x64, weights64, chosen, gate_up64, down64)
    assert_close(moe.routed_experts(*map(jnp.asarray, (x, weights, experts, gate_up, down))), want)


def test_a_round_has_room_for_uneven_routing() -> None:
    assert [moe.round_rows(T * 10, 512) for T in (8, 512, 1024, 4096, 8192)] == [8, 16, 32, 128, 256]


@pytest.fixture
def _settled() -> Iterator[None]:
    yield
    PartialSum.open_debts = 0


@pytest.mark.usefixtures("_settled")
def test_debts_are_paid_once_and_to_their_own() -> None:
    attention_axis, mlp_axis = ReduceAxis("tp", 2, "attention"), ReduceAxis("tp", 2, "mlp")
    part = jnp.ones((2, 4), jnp.float32)
    both = PartialSum(part, mlp_axis) + PartialSum(part, mlp_axis)
    assert np.array_equal(both.take(), 2 * np.ones((2, 4)))
    with pytest.raises(DebtError, match="paid twice"):
        both.take()
    PartialSum.check_settled()
    with pytest.raises(DebtError, match="pay each to its own"):
        _ = PartialSum(part, attention_axis) + PartialSum(part, mlp_axis)
    with pytest.raises(DebtError, match="2 partial sums were never reduced"):
        PartialSum.check_settled()
