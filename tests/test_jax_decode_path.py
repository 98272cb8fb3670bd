"""The compiled decode kernels as custom calls, without a GPU: how they are lowered, and an engine that runs on them.

On CPU plain torch stands in for each kernel, behind the same C++ adaptor, with XLA's buffers and order of calls.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import PartitionSpec as P

from core_torch.kernels import vocabulary
from core_torch.kernels.choice import KernelOptions, describe
from core_torch.kernels.native import Answer
from jax_bridge import LLM, SamplingParams, runner
from jax_bridge.kernels import compiled
from jax_bridge.kernels.add_norm import add_norm
from jax_bridge.kernels.few_rows import few_rows
from jax_bridge.kernels.gdn_decode import gdn_decode, gdn_decode_plain
from jax_bridge.kernels.moe_decode import route_decode, routed_experts_decode
from jax_bridge.kernels.norm import rms_norm
from jax_bridge.kernels.norm_rope import norm_rope
from jax_bridge.kernels.paged_decode import paged_decode_attention
from jax_bridge.kernels.vocabulary import largest_keys, largest_keys_plain
from jax_bridge.layers.embedding import ParallelHead
from jax_bridge.layers.linear import Linear
from jax_bridge.partial_sum import ReduceAxis
from tests import reference
from tests.jax_stand_ins import StandIns

pytestmark = pytest.mark.timeout(120)

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, return_logits=True)
PROMPTS = [[5, 6, 7, 8, 9], [3] * 11, [1, 2]]
NAMES = ("add_norm", "few_rows", "gdn_decode", "moe_decode", "norm_rope", "paged_decode", "vocabulary")
OF_PREFILL = ("fresh_prefill", "gdn_prefill", "moe_prefill")
B, H, G, D, EXPERTS = 3, 4, 2, 64, 8
BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32


def shape(*sizes: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def gdn(projected, conv, state, slots, conv_weight, a_log, dt_bias, norm_weight, decode=gdn_decode):
    weights = {"conv_weight": conv_weight, "a_log": a_log, "dt_bias": dt_bias, "norm_weight": norm_weight}
    return decode(projected, conv, state, slots, **weights, eps=1e-6)


GDN = (
    shape(B, 64 + 32 + 8),
    shape(9, 64, 3),
    shape(9, 4, 8, 8, dtype=F32),
    shape(B, dtype=I32),
    shape(64, 4),
    shape(4, dtype=F32),
    shape(4, dtype=F32),
    shape(8),
)


def rope(projected, positions, slots, q_weight, k_weight, k_cache, v_cache):
    return norm_rope(
        projected, positions, slots, k_cache, v_cache, q_weight=q_weight, k_weight=k_weight, num_heads=H,
        rotary_dim=16, theta=10_000_000, eps=1e-6, weight_bias=1.0,
    )  # fmt: skip


ROPE = (
    shape(B, 2 * (H + G) * D),
    shape(B, dtype=I32),
    shape(B, dtype=I32),
    shape(D),
    shape(D),
    shape(5, 16, G, D),
    shape(5, 16, G, D),
)


def lowered(function: Any, *operands: Any) -> str:
    """For GPUs, on a machine without one."""
    return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def calls_in(text: str) -> list[str]:
    return re.findall(r"stablehlo.custom_call @crossfuse\.gpu\.(\w+)", text)


class TestLowering:
    def test_what_changes_in_place_is_aliased(self) -> None:
        text = lowered(gdn, *GDN)
        assert calls_in(text) == ["gdn_decode"]
        assert "-> (tensor<3x32xbf16>, tensor<9x64x3xbf16>, tensor<9x4x8x8xf32>)" in text
        assert self.aliases(text) == [(1, 1), (2, 2)]
        assert "units_per_block = 1 : i64" in text
        text = lowered(rope, *ROPE)
        assert calls_in(text) == ["norm_rope"]
        assert "-> (tensor<3x4x64xbf16>, tensor<5x16x2x64xbf16>, tensor<5x16x2x64xbf16>)" in text
        assert self.aliases(text) == [(1, 5), (2, 6)]
        assert "theta = 1.000000e+07 : f64" in text

    @staticmethod
    def aliases(text: str) -> list[tuple[int, int]]:
        """(result, operand)"""
        found = re.findall(r"output_tuple_indices = \[(\d+)\],\s*operand_index = (\d+)", text)
        return [(int(result), int(operand)) for result, operand in found]

    def test_scratch_is_a_result(self) -> None:
        def attend(q, k, v, tables, lengths, projected):
            return paged_decode_attention(q, k, v, tables, lengths, projected, scale=0.125)

        operands = (
            shape(B, H, D), shape(5, 16, G, D), shape(5, 16, G, D), shape(B, 9, dtype=I32), shape(B, dtype=I32),
            ROPE[0],
        )  # fmt: skip
        text = lowered(attend, *operands)
        assert calls_in(text) == ["paged_decode"]
        # nine pages of 16 are three blocks of 64 tokens; eight rows for a KV head's query heads
        assert "-> (tensor<3x2x3x8x64xf32>, tensor<3x2x3x8x2xf32>, tensor<3x4x64xbf16>)" in text
        assert not self.aliases(text)

    def test_a_norm_with_and_without_a_residual(self) -> None:
        text = lowered(lambda x, r, w: add_norm(x, r, w, 1e-6, 1.0), shape(B, D), shape(B, D), shape(D))
        assert calls_in(text) == ["add_norm"]
        assert "-> (tensor<3x64xbf16>, tensor<3x64xbf16>)" in text
        assert "weight_bias = 1.000000e+00 : f64" in text
        text = lowered(lambda x, w: add_norm(x, None, w, 1e-6, 1.0), shape(B, D), shape(D))
        assert calls_in(text) == ["norm"]
        assert "-> tensor<3x64xbf16>" in text

    def test_a_key_is_two_numbers(self) -> None:
        text = lowered(largest_keys, shape(B, 75))
        assert calls_in(text) == ["vocabulary_argmax"]
        assert "-> tensor<3x2xi32>" in text

    def test_products_of_few_rows(self) -> None:
        text = lowered(few_rows, shape(B, D), shape(72, D))
        assert calls_in(text) == ["few_rows"]
        assert "-> tensor<3x72xbf16>" in text
        assert "launch_with_pdl = 1 : i64" in text

    @pytest.mark.parametrize(
        ("rows", "outputs", "compiled"),
        [(32, 1024, True), (33, 1, False), (16, 1025, True), (17, 1025, False)],
    )
    def test_products_of_many_rows_are_left_to_xla(self, rows: int, outputs: int, compiled: bool) -> None:
        def product(x, weight):
            layer = Linear(D, outputs)
            layer.weight, layer.compiled = nnx.Param(weight), Answer(True)
            return layer(x)

        text = lowered(product, shape(rows, D), shape(outputs, D))
        assert (calls_in(text) == ["few_rows"]) == compiled

    @pytest.mark.parametrize("routed", [True, False])
    def test_experts(self, routed: bool) -> None:
        def experts(x, logits, gate_up, down):
            routing = route_decode(logits, top_k=2, normalize=True)
            tiles = routing.tiles if routed else None
            return routed_experts_decode(x, routing.weights, routing.experts, gate_up, down, tiles=tiles)

        operands = shape(B, D), shape(B, EXPERTS), shape(EXPERTS, 32, D), shape(EXPERTS, D, 16)
        text = lowered(experts, *operands)
        assert calls_in(text) == ["moe_route", *(() if routed else ("moe_group",)), "moe_decode"]
        assert "-> (tensor<3x2xbf16>, tensor<3x2xi32>, tensor<7x16xi32>)" in text
        assert "-> (tensor<6x16xbf16>, tensor<6x64xf32>, tensor<3x64xbf16>)" in text
        assert f"num_experts = {EXPERTS} : i64" in text
        assert "normalize = 1 : i64" in text


@pytest.fixture(scope="module")
def stand_ins() -> StandIns:
    return StandIns()


def random(spec: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    if spec.dtype == I32:
        return jnp.arange(1, spec.size + 1, dtype=I32)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(spec.shape), F32)


@pytest.mark.usefixtures("stand_ins")
class TestInPlace:
    def test_donated_caches_are_not_copied(self) -> None:
        step = jax.jit(gdn, donate_argnums=(1, 2))
        operands = [random(spec, seed) for seed, spec in enumerate(GDN)]
        want = gdn(*operands, decode=gdn_decode_plain)
        assert " copy(" not in str(step.lower(*operands).compile().as_text())
        caches = [operands[index].unsafe_buffer_pointer() for index in (1, 2)]
        got = step(*operands)
        assert [cache.unsafe_buffer_pointer() for cache in got[1:]] == caches
        for mine, plain in zip(got, want, strict=True):
            np.testing.assert_allclose(mine, plain, rtol=1e-4, atol=1e-5)

    def test_what_is_kept_is_copied_first(self) -> None:
        operands = [random(spec, seed) for seed, spec in enumerate(GDN)]
        before = [np.array(operand) for operand in operands]
        jax.block_until_ready(jax.jit(gdn)(*operands))
        for operand, value in zip(operands, before, strict=True):
            np.testing.assert_array_equal(operand, value)


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch, stand_ins: StandIns) -> StandIns:
    """Every kernel of decode is usable, and its stand-in counted."""
    ask = KernelOptions.ask

    def answer(self: KernelOptions, name: str, *args: Any, **shapes: Any) -> Answer:
        return Answer(True) if self.compiled and name in NAMES else ask(self, name, *args, **shapes)

    monkeypatch.setattr(compiled.JaxKernelOptions, "ask", answer)
    monkeypatch.setattr(runner, "open_kernels", lambda modules, device: None)
    # The stand-ins are registered for CPUs under the names that GPUs have.
    stand_ins.calls.clear()
    return stand_ins


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reference.CONFIGS["two_layers"] = {
        "layer_types": [reference.LINEAR, reference.FULL],
        "num_hidden_layers": 2,
    }
    try:
        model = reference.make_model("two_layers")
        return reference.save_model(model, tmp_path_factory.mktemp("model"), packed=False)
    finally:
        del reference.CONFIGS["two_layers"]


def test_a_norm_gets_its_operands_in_order(usable: StandIns) -> None:
    x, residual, weight = (random(shape(*sizes), seed) for seed, sizes in enumerate([(B, D), (B, D), (D,)]))
    for stream in (residual, None):
        got = jax.jit(lambda s: add_norm(x, s, weight, 1e-6, 1.0))(stream)
        summed = x if stream is None else x + stream
        np.testing.assert_allclose(got[0], summed, rtol=1e-6)
        np.testing.assert_allclose(
            got[1], rms_norm(summed, weight, eps=1e-6, weight_bias=1.0), rtol=1e-5, atol=1e-6
        )
    assert usable.calls == {"add_norm": 1, "norm": 1}


@pytest.mark.parametrize(("vocab_size", "ranks"), [(64, 4), (61, 4), (9, 4), (61, 1)])
@pytest.mark.parametrize("compiled", [True, False])
def test_best_tokens_of_a_vocabulary_over_ranks(
    vocab_size: int, ranks: int, compiled: bool, usable: StandIns
) -> None:
    """Ties between ranks and within one, both zeros, infinities; padding, which may be a whole rank, never wins."""
    rows = -(-vocab_size // ranks)
    logits = np.random.default_rng(0).standard_normal((6, ranks * rows)).astype(np.float32)
    logits[0] = -1
    logits[1, 3 :: rows // 2] = 7
    logits[2] = -np.abs(logits[2])
    logits[2, [vocab_size - 1, 3]] = 0.0, -0.0
    logits[3] = -np.inf
    logits[4, 5] = np.inf
    logits[:, vocab_size:] = 9
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:ranks]), ("tp",))

    def best(local):
        head = ParallelHead(vocab_size, D, ReduceAxis("tp", ranks, "attention"), None)
        head.compiled = Answer(compiled)
        return head.argmax(local)

    run = jax.jit(jax.shard_map(best, mesh=mesh, in_specs=P(None, "tp"), out_specs=P()))
    np.testing.assert_array_equal(run(logits), logits[:, :vocab_size].argmax(-1))
    assert usable.calls["vocabulary_argmax"] == (ranks if compiled else 0)


def test_keys_are_those_of_torch() -> None:
    logits = np.random.default_rng(1).standard_normal((5, 40)).astype(np.float32)
    logits[1], logits[2] = -0.0, -np.abs(logits[2])
    want = vocabulary.largest_keys_plain(torch.from_numpy(logits), first=0)
    np.testing.assert_array_equal(largest_keys_plain(jnp.asarray(logits)), want.view(torch.int32).view(5, 2))


def generate(folder: Path, ranks: int, **options: Any) -> tuple[Any, list[Any], list[Any]]:
    """The answers, and what single steps and a loop give."""
    with LLM(folder, ranks, device="cpu", dtype="float32", max_model_len=64, **options) as llm:
        looped = llm.generate(PROMPTS, dataclasses.replace(GREEDY, return_logits=False))
        return llm.kernels, llm.generate(PROMPTS, GREEDY), looped


@pytest.mark.parametrize("ranks", [1, 2])
def test_decode_runs_in_kernels_and_gives_the_plain_results(
    ranks: int, folder: Path, usable: StandIns
) -> None:
    answers, plain, _ = generate(folder, ranks, kernels="plain")
    assert not usable.calls
    assert all(a.reason == "kernels='plain' was asked for" for a in answers.values())
    answers, got, looped = generate(folder, ranks)
    assert {name for name, answer in answers.items() if answer.usable} == set(NAMES)
    assert set(usable.calls) == set(compiled.TARGETS) - {"moe_group"}
    for mine, loops, want in zip(got, looped, plain, strict=True):
        assert mine.token_ids == loops.token_ids == want.token_ids
        assert reference.relative_error(np.stack(mine.logits), np.stack(want.logits)) < 1e-5


def test_without_a_gpu_the_reason_is_told(folder: Path) -> None:
    with LLM(folder, device="cpu", max_model_len=64) as llm:
        assert describe(llm.kernels) == (
            f"plain: {', '.join(sorted(NAMES + OF_PREFILL))} (compiled kernels need a CUDA GPU, and this is cpu)"
        )
