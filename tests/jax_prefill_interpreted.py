"""The kernels of prefill behind XLA's custom calls on a CPU: Triton's interpreter runs them on XLA's memory.

`TRITON_INTERPRET=1 python -m tests.jax_prefill_interpreted CHECKPOINT`: prints one JSON line, which
`test_jax_prefill_path.py` judges.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import tvm_ffi

from core_torch.kernels import triton_kernels
from core_torch.kernels.choice import KernelOptions
from core_torch.kernels.native import Answer
from core_torch.kernels.triton_kernels import Kernel
from jax_bridge import LLM, SamplingParams
from jax_bridge.kernels import compiled
from jax_bridge.kernels import moe_prefill as jax_moe
from tests.jax_stand_ins import on_memory_of
from tests.reference import relative_error
from tests.triton_interpreter import correct_bfloat16

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7, 8, 9] * 15, [3] * 11, [1, 2]]
GREEDY = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, return_logits=True)
calls: Counter[str] = Counter()
one_at_a_time = threading.Lock()  # the interpreter keeps its place in globals, XLA calls from many threads


def interpreted(
    kernel: Kernel,
    device: torch.device,
    num_operands: int,
    order: tuple[int, ...],
    same: tuple[int, ...],
) -> Any:
    """As `triton_kernels.function`."""
    assert device == CPU
    program = getattr(importlib.import_module(f"{triton_kernels.JIT}.{kernel.module}"), kernel.name)

    def run(*values: Any) -> None:
        calls[kernel.name] += 1
        arrays, (*scalars, x, y) = values[:num_operands], values[num_operands:]
        for first, second in zip(same[::2], same[1::2], strict=True):
            assert arrays[first].data_ptr() == arrays[second].data_ptr()
        tensors = [on_memory_of(arrays[place]) for place in order]
        assert len(scalars) == len(kernel.scalars)
        with one_at_a_time, torch.inference_mode():
            program[(x, y)](*tensors, *scalars, **dict(kernel.sizes))

    return tvm_ffi.convert(run)


def routing() -> list[float]:
    """Experts with ids outside, against the plain path in float64: relative errors of kernel and bfloat16."""
    rng = np.random.default_rng(0)
    T, N, D, I, K = 40, 8, 64, 32, 3  # noqa: E741
    x, logits, gate_up, down = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((T, D), (T, N), (N, 2 * I, D), (N, D, I))
    )
    bf16 = [jnp.asarray(value, jnp.bfloat16) for value in (x, logits, gate_up / 8, down / 6)]
    weights, experts = jax_moe.route_prefill(bf16[1], top_k=K, normalize=True, device=CPU)
    experts = jnp.where(jnp.arange(T)[:, None] % 5 == 0, jnp.int32(-1), experts)
    got = jax_moe.routed_experts_prefill(bf16[0], weights, experts, *bf16[2:], device=CPU)
    x64, _, gate_up64, down64 = (np.asarray(value, np.float64) for value in bf16)
    want = np.zeros((T, D))
    for t, k in np.ndindex(T, K):
        n = int(experts[t, k])
        if n >= 0:
            gate, up = np.split(gate_up64[n] @ x64[t], 2)
            want[t] += float(weights[t, k]) * (down64[n] @ (gate / (1 + np.exp(-gate)) * up))
    return [relative_error(np.asarray(got, np.float64), want), float(np.abs(np.asarray(got[::5])).max())]


def generate(folder: Path, **options: Any) -> tuple[Any, list[Any]]:
    with LLM(
        folder, 2, device="cpu", dtype="bfloat16", max_model_len=128, max_step_tokens=64, **options
    ) as llm:
        return llm.kernels, llm.generate(PROMPTS, GREEDY)


def main(folder: str) -> None:
    correct_bfloat16()
    triton_kernels.function = interpreted
    ask = KernelOptions.ask
    compiled.JaxKernelOptions.ask = lambda self, name, *a, **k: (
        Answer(True) if name in triton_kernels.MODULES and self.compiled else ask(self, name, *a, **k)
    )
    errors = routing()
    _, plain = generate(Path(folder), kernels="plain")
    calls.clear()
    answers, got = generate(Path(folder))
    differences = [
        relative_error(np.stack(mine.logits), np.stack(theirs.logits))
        for mine, theirs in zip(got, plain, strict=True)
    ]
    usable = sorted(name for name, answer in answers.items() if answer.usable)
    print(json.dumps({"experts": errors, "engine": differences, "usable": usable, "calls": calls}))


if __name__ == "__main__":
    main(*sys.argv[1:])
