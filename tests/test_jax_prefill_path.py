"""The kernels of prefill as custom calls, without a GPU: how they are lowered, and an engine that runs on them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from core_torch.kernels import triton_kernels
from jax_bridge.batch import build_batch
from jax_bridge.kernels import triton_kernels as calls
from jax_bridge.kernels.attention import fresh_attention, prefill_attention
from jax_bridge.kernels.gdn_prefill import gdn_prefill
from shared_config.sampling import SamplingParams
from shared_config.scheduler import Chunk, Sequence, Step
from tests import reference

pytestmark = pytest.mark.timeout(280)

GPU = torch.device("cuda", 0)
T, H, HV, DIM, TAPS, SLOTS = 80, 2, 4, 16, 4, 5
CHANNELS = (2 * H + HV) * DIM
BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32


def shape(*sizes: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def gdn(projected, conv, state, sequences, chunks, conv_weight, a_log, dt_bias, norm_weight):
    weights = {"conv_weight": conv_weight, "a_log": a_log, "dt_bias": dt_bias, "norm_weight": norm_weight}
    return gdn_prefill(projected, conv, state, sequences, chunks, **weights, eps=1e-6, device=GPU)


GDN = (
    shape(T, CHANNELS + HV * DIM + 2 * HV),
    shape(SLOTS, CHANNELS, TAPS - 1),
    shape(SLOTS, HV, DIM, DIM, dtype=F32),
    shape(3, 5, dtype=I32),
    shape(4, 2, dtype=I32),
    shape(CHANNELS, TAPS),
    shape(HV, dtype=F32),
    shape(HV, dtype=F32),
    shape(DIM),
)


def test_lowered_calls_name_their_kernels_and_alias_what_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(triton_kernels, "function", lambda *what: made.append(what))
    monkeypatch.setattr(calls, "register", lambda *what, platform: None)
    calls._target.cache_clear()
    text = jax.jit(gdn).trace(*GDN).lower(lowering_platforms=("cuda",)).as_text()
    calls._target.cache_clear()
    found = re.findall(r"custom_call @crossfuse\.gpu\.gdn_prefill\.(\w+)\.\w{12}\(", text)
    assert found == ["mix", "keep_inputs", "solve", "carry", "finish"]
    aliases = re.findall(r"output_tuple_indices = \[(\d*)\],\s*operand_index = (\d+)", text)
    # keep_inputs overwrites conv; carry the values and the state, behind what each chunk begins with.
    assert aliases == [("", "1"), ("0", "3"), ("2", "4")]
    orders = {kernel.name: order for kernel, _, _, order, _ in made}
    assert orders["mix"] == (0, 1, 2, 3, 4, 7, 8, 9, 5, 6)  # three results between the weights and the tables
    assert orders["keep_inputs"] == (0, 1, 2)  # and not `mixed`, which only has to be there
    assert orders["carry"] == (0, 1, 2, 3, 7, 4, 5)
    assert {kernel.name: same for kernel, *_, same in made if same} == {
        "keep_inputs": (1, 4),
        "carry": (3, 6, 4, 8),
    }


def sequence(index: int, length: int, slot: int) -> Sequence:
    return Sequence(
        index, list(range(length)), SamplingParams(max_tokens=1), pages=[1, 2, 3, 4, 5, 6], slot=slot
    )


def test_padding_is_one_more_sequence_and_spare_pieces_do_nothing() -> None:
    first, second = sequence(0, 70, 2), sequence(1, 13, 1)
    spans = build_batch(
        Step(True, (Chunk(first, 0, 70, True), Chunk(second, 3, 10, True))), page_size=16
    ).spans
    assert spans is not None
    assert not spans.fresh
    assert np.asarray(spans.sequences).tolist() == [[0, 70, 2, 0, 0], [70, 10, 1, 1, 2], [80, 48, 0, 0, 3]]
    assert np.asarray(spans.pieces).tolist() == [
        [0, 64, 0, 0],
        [64, 6, 64, 0],
        [70, 10, 0, 1],
        [80, 48, 0, 2],
        [0, 0, 0, 0],
    ]
    again = build_batch(Step(True, (Chunk(first, 0, 64, False),)), page_size=16).spans
    assert again is not None
    assert again.fresh
    assert np.asarray(again.sequences).tolist() == [[0, 64, 2, 0, 0], [64, 0, 0, 0, 1]]
    assert np.asarray(again.pieces).tolist() == [[0, 64, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_fresh_attention_is_what_the_pages_would_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN is asked with the arguments that, in XLA's own attention, give what the paged path gives."""
    asked: list[Any] = []
    attention = jax.nn.dot_product_attention

    def xla(*operands: Any, implementation: str, **options: Any) -> jax.Array:
        asked.append(implementation)
        return attention(*operands, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", xla)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 32, heads, 16)), F32) for heads in (4, 2, 2))
    counts = jnp.asarray([32, 5], I32)
    got = fresh_attention(q, k, v, counts, scale=0.25)
    keys, values = (x.reshape(4, 16, 2, 16) for x in (k, v))
    tables, starts = jnp.asarray([[0, 1], [2, 3]], I32), jnp.zeros(2, I32)
    want = prefill_attention(q, keys, values, tables, starts=starts, lengths=counts, scale=0.25)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1, :5], want[1, :5], rtol=1e-5, atol=1e-5)
    assert asked == ["cudnn"]


def test_an_engine_on_interpreted_kernels(tmp_path: Path) -> None:
    """Routing, experts and Gated DeltaNet in chunks of prompts, in the order and on the buffers that XLA chooses."""
    model = reference.make_model("base", layer_types=[reference.LINEAR], num_hidden_layers=1)
    folder = reference.save_model(model, tmp_path / "model", packed=False)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.jax_prefill_interpreted", str(folder)]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    error, of_nobody = found["experts"]
    assert error < 2**-6
    assert of_nobody == 0
    assert max(found["engine"]) < 2**-4, found  # two bfloat16 paths
    assert found["usable"] == ["gdn_prefill", "moe_prefill"]
    assert set(found["calls"]) == {
        "mix", "keep_inputs", "solve", "carry", "finish",
        "route", "count", "scatter", "gate_up", "down", "combine",
    }  # fmt: skip
