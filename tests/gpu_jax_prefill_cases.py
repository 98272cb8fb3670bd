"""What `test_gpu_jax_prefill.py` runs on GPUs, in a process of its own: see `gpu_jax_cases`.

Shapes of single kernels are those of one of two ranks of the 80B model: 8 key and 16 value heads of 128, 512 experts of
256, hidden 2048.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from core_torch.batch import Span
from core_torch.kernels import gdn_prefill as torch_gdn
from core_torch.kernels import moe_prefill as torch_moe
from jax_bridge import LLM, SamplingParams
from jax_bridge.kernels.gdn_prefill import gdn_prefill
from jax_bridge.kernels.moe_prefill import route_prefill, routed_experts_prefill
from tests.gpu_jax_cases import run_cases
from tests.gpu_jax_decode_cases import EPS, TINY, different, on_jax, randn
from tests.reference import relative_error

GPU = torch.device("cuda", 0)
LENGTHS = {"one": (1000,), "four": (130, 1, 64, 700), "many": (70,) * 20}
TOKENS = (300, 1000, 9000)  # 6, 20 and 176 an expert: each choice of tiles
PROMPT = list(range(5, 405))  # more than the kernels for few tokens take, and fused
NAMES = ("conv_weight", "a_log", "dt_bias", "norm_weight")


def gdn() -> dict[str, Any]:
    """Each sequence in two passes; what JAX and PyTorch give has the same bits, states too."""
    found = {}
    for name, lengths in LENGTHS.items():
        channels, value, slots = 2 * 8 * 128 + 16 * 128, 16 * 128, len(lengths) + 2
        weights = [
            randn(channels, 4) / 2,
            torch.rand(16, device=GPU) * 2,
            randn(16, dtype=torch.float32),
            randn(128),
        ]
        conv, state = (
            randn(slots, channels, 3),
            randn(slots, 16, 128, 128, dtype=torch.float32),
        )
        *caches, conv_weight, a_log, dt_bias, norm_weight = on_jax(conv, state, *weights)
        on_xla = conv_weight, a_log, dt_bias, norm_weight
        step = jax.jit(_gdn, donate_argnums=(1, 2))
        counts = []
        for start in (0, 1000):
            spans, first = [], 0
            for row, length in enumerate(lengths):
                spans.append(Span(first, length, start, row + 1))
                first += length
            projected = randn(first, channels + value + 32)
            chunks = torch_gdn.cut_into_chunks(spans, GPU)
            named = dict(zip(NAMES, weights, strict=True))
            out = torch_gdn.gdn_prefill(projected, conv, state, chunks, **named, eps=EPS)
            # More pieces than there are, as in a padded pass.
            spare = chunks.chunks.new_zeros(3, 4)
            tables = on_jax(chunks.sequences, torch.cat((chunks.chunks, spare)))
            got, *caches = step(*on_jax(projected), *caches, *tables, *on_xla)
            counts += different((got, *caches), (out, conv, state))
        found[name] = counts
    return found


def _gdn(projected: Any, conv: Any, state: Any, sequences: Any, pieces: Any, *weights: Any) -> Any:
    named = dict(zip(NAMES, weights, strict=True))
    return gdn_prefill(projected, conv, state, sequences, pieces, **named, eps=EPS, device=GPU)


def moe() -> dict[str, Any]:
    found = {}
    weights = randn(512, 512, 2048) / 45, randn(512, 2048, 256) / 16
    on_xla = on_jax(*weights)
    step = jax.jit(_moe)
    for T in TOKENS:
        x, logits = randn(T, 2048), randn(T, 512)
        nobody = torch.rand(T, 1, device=GPU) < 0.1
        scales, experts = torch_moe.route_prefill(logits, num_experts=512, top_k=10, normalize=True)
        kept = experts.masked_fill(nobody, -1)
        want: list[Tensor] = [scales, experts, torch_moe.routed_experts_prefill(x, scales, kept, *weights)]
        found[str(T)] = different(step(*on_jax(x, logits), jnp.asarray(nobody.cpu().numpy()), *on_xla), want)
    return found


def _moe(x: Any, logits: Any, nobody: Any, gate_up: Any, down: Any) -> Any:
    scales, experts = route_prefill(logits, top_k=10, normalize=True, device=GPU)
    kept = jnp.where(nobody, jnp.int32(-1), experts)
    return scales, experts, routed_experts_prefill(x, scales, kept, gate_up, down, device=GPU)


def engine_on_two() -> dict[str, Any]:
    """Text of the trained checkpoint on two GPUs of one process, reductions fused: all first calls are beside them."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, return_logits=True)
    with LLM(TINY, 2, device="cuda", max_model_len=512, max_step_tokens=512, fusion="off") as llm:
        plain = llm.generate([PROMPT], params)
    with LLM(TINY, 2, device="cuda", max_model_len=512, max_step_tokens=512, fusion="on") as llm:
        names = sorted(name for name, answer in llm.kernels.items() if answer.usable)
        (output,) = llm.generate([PROMPT], params)
    return {
        "kernels": names,
        "fused": output.reductions.fused,
        "error": relative_error(np.stack(output.logits or []), np.stack(plain[0].logits or [])),
    }


if __name__ == "__main__":
    run_cases(globals(), sys.argv[1], sys.argv[2:])
