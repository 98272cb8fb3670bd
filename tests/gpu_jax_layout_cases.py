"""What `test_gpu_jax_layouts.py` runs on GPUs, in a process of its own: cases as in `gpu_jax_cases`."""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_bridge
from jax_bridge import LLM, SamplingParams
from jax_bridge.axes import axes_of
from shared_config import FusionRequest, ModelFacts, ParallelLayout, resolve_fusion
from tests.gpu_jax_cases import flashinfer, hardware, run_cases
from tests.reference import relative_error

TINY = Path(__file__).parent / "data/tiny-qwen3-next"
PROMPTS = ["x = 1\n" * 40, "class Stack:\n    def __init__(self):", "for i in range("]
CHUNK = 96  # splits the first prompt
TOKENS = 12
EPS = 1e-6


def generate(tp: int, **options: Any) -> tuple[LLM, list[Any]]:
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, return_logits=True)
    limits = {"max_model_len": 512, "max_step_tokens": CHUNK, "max_num_seqs": 4, "dtype": "float32"}
    with LLM(TINY, tp, device="cuda", **limits, **options) as llm:
        return llm, llm.generate(PROMPTS, params)


def layout(tp: int, **sizes: int) -> dict[str, Any]:
    """One layout against one GPU, in float32."""
    _, truth = generate(1)
    llm, outputs = generate(tp, **sizes)
    pairs = list(zip(outputs, truth, strict=True))
    reductions = outputs[0].reductions
    return {
        "fused": [llm.fusion.enabled, llm.fusion.backend, llm.fusion.reason],
        "reductions": [reductions.fused, reductions.unfused],
        "passes": -(-len(outputs[0].prompt_token_ids) // CHUNK) + TOKENS - 1,
        "same_tokens": all(got.token_ids == want.token_ids for got, want in pairs),
        "error": max(relative_error(np.stack(got.logits), np.stack(want.logits)) for got, want in pairs),
    }


ep2 = functools.partial(layout, 2, ep_size=2)
cp2 = functools.partial(layout, 2, attn_cp_size=2)
moe_dp2 = functools.partial(layout, 2, moe_dp_size=2)
dp2_ep2 = functools.partial(layout, 2, attn_dp_size=2, ep_size=2)
tp4 = functools.partial(layout, 4)
tp4_cp2 = functools.partial(layout, 4, attn_cp_size=2)
tp4_cp2_moe_dp2 = functools.partial(layout, 4, attn_cp_size=2, moe_dp_size=2)


def groups_of_four() -> dict[str, Any]:
    """The op over each axis of 2 x 2 GPUs, and over both, with all three communicators open: errors against float64."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("cp", "tp"))
    rng = np.random.default_rng(0)
    partial, residual = rng.standard_normal((2, 2, 67, 2048)), rng.standard_normal((2, 2, 67, 2048))
    weight = rng.standard_normal(2048) * 0.1
    model = ModelFacts("Qwen3NextForCausalLM", 2048, 4)
    request = FusionRequest(mode="on", max_bytes=128 * 2048 * 4)
    seen: dict[str, Any] = {}
    for axis_name in ("cp", "tp", ("cp", "tp")):
        axes = axes_of(axis_name)
        decision = resolve_fusion(
            model, ParallelLayout(tp_size=2 ** len(axes)), hardware(), flashinfer(), request
        )
        own = P(*(name if name not in axes else None for name in mesh.axis_names))
        shared = residual[tuple(slice(1) if name in axes else slice(None) for name in mesh.axis_names)]

        def step(x: jax.Array, r: jax.Array, w: jax.Array, axis_name: Any = axis_name) -> jax.Array:
            op = jax_bridge.allreduce_residual_rmsnorm
            return op(x[0, 0], r[0, 0], w, axis_name=axis_name, eps=EPS)[1][None, None]

        run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P("cp", "tp"), own, P()), out_specs=own))
        operands = [jnp.asarray(x, jnp.float32) for x in (partial, shared, weight)]
        with jax_bridge.fused_communicator(mesh, axis_name, 2048, jnp.float32, decision) as comm:
            counts = jax_bridge.explain(run, *operands).counts
            got = np.asarray(jax.block_until_ready(run(*operands)), np.float64)
        total = shared + partial.sum(tuple(mesh.axis_names.index(name) for name in axes), keepdims=True)
        want = total / np.sqrt((total**2).mean(-1, keepdims=True) + EPS) * (1 + weight)
        seen["x".join(axes)] = {
            "groups": 4 // math.prod(mesh.shape[name] for name in axes),
            "fused": [comm.decision.enabled, counts.fused],
            "error": float(np.abs(got - want).max()),
        }
    return seen


if __name__ == "__main__":
    run_cases(globals(), sys.argv[1], sys.argv[2:])
