"""What the tests of the benchmark share: a result with made-up times, and parts that go wrong."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from bench.machine import Machine, Rates
from bench.result import SCHEMA_VERSION, KernelRow, KernelSpec, ModelRow, ModelSpec, OpRow, OpSpec, Result
from bench.stats import Timing
from shared_config import HardwareInfo
from shared_config.presets import PRESETS
from tests.fusion_ranks import decide


def timing(median_us: float, spread: float = 0.05) -> Timing:
    return Timing(median_us, median_us * (1 - spread), median_us * (1 + spread), 10)


def op_row(method: str, num_tokens: int, median_us: float, framework: str = "torch") -> OpRow:
    fused = method.startswith("fused")
    return OpRow(
        framework=framework,
        method=method,
        num_tokens=num_tokens,
        timing=timing(median_us),
        wire_bytes=num_tokens * 4096,
        floor_us=num_tokens * 4096 / 400e3,
        max_error=0.01,
        fused=50 if fused else 0,
        unfused=0 if fused else 50,
    )


def model_row(phase: str, fusion: str, batch: int, median_us: float, framework: str = "torch") -> ModelRow:
    return ModelRow(
        framework=framework,
        phase=phase,
        fusion=fusion,
        batch=batch,
        length=128,
        timing=timing(median_us),
        tokens_per_s=batch / median_us * 1e6,
        distinct_experts=75.0,
        floor_us=median_us / 3,
        communication_share=None if fusion == "none" else 0.2,
        fused=96 if fusion == "on" else 0,
        unfused=96 if fusion == "off" else 0,
    )


def model_spec(**changes: Any) -> ModelSpec:
    values: dict[str, Any] = {
        "frameworks": ("torch",),
        "tp": 2,
        "name": "80b, 48 layers",
        "hf_config": PRESETS["80b"],
        "load_format": "dummy",
        "dtype": "bfloat16",
        "device": "cuda",
        "batches": (1, 8),
        "lengths": (128,),
        "decode_steps": 4,
        "repeats": 2,
        "max_step_tokens": 256,
        "page_size": 16,
    }
    return ModelSpec(**(values | changes))


def kernel_row(kernel: str, num_tokens: int, median_us: float | None, **changes: Any) -> KernelRow:
    """At a quarter of what memory allows; None: it does not run here."""
    values: dict[str, Any] = {
        "kernel": kernel,
        "phase": "decode",
        "num_tokens": num_tokens,
        "length": None,
        "timing": None if median_us is None else timing(median_us),
        "plain": timing(100.0),
        "memory_bytes": num_tokens * 1_000_000,
        "flops": 0.0,
        "wire_bytes": 0,
        "floor_us": 10.0 if median_us is None else median_us / 4,
        "apart": None if median_us is None else 0.002,
    }
    return KernelRow(**(values | changes))


def kernel_spec(**changes: Any) -> KernelSpec:
    values: dict[str, Any] = {
        "tp": 2,
        "name": "80b",
        "hf_config": PRESETS["80b"],
        "dtype": "bfloat16",
        "device": "cuda",
        "batches": (1, 8),
        "lengths": (1024,),
        "repeats": 20,
        "max_step_tokens": 8192,
        "page_size": 16,
    }
    return KernelSpec(**(values | changes))


def result(
    *,
    op: tuple[OpRow, ...] | None = None,
    model: tuple[ModelRow, ...] | None = None,
    kernels: tuple[KernelRow, ...] = (),
) -> Result:
    """Two GPUs; fused is twice as fast at 8 tokens and slower at 4096."""
    if op is None:
        op = tuple(
            op_row(method, num_tokens, us)
            for method, times in {"fused": (4.0, 100.0), "allreduce_norm": (8.0, 90.0)}.items()
            for num_tokens, us in zip((8, 4096), times, strict=True)
        )
    if model is None:
        model = (
            *(model_row("decode", fusion, 8, us) for fusion, us in (("on", 5000.0), ("off", 5500.0))),
            model_row("decode", "none", 8, 90_000.0, "transformers"),
            model_row("prefill", "on", 8, 60_000.0),
        )
    machine = Machine(
        hardware=HardwareInfo(device="cuda", gpu_name="NVIDIA H200", sm=90, num_gpus=2, p2p=True),
        cpu="x86_64",
        cores=32,
        memory_bytes=150_000_000_000,
        python="3.12.3",
        versions={"torch": "2.11.0", "jax": "0.11.2", "flashinfer": "0.7.2.post1"},
        flags={"NCCL_NVLS_ENABLE": "0"},
        rates=Rates(4.3e12, 788e12, 450e9),
    )
    return Result(
        schema_version=SCHEMA_VERSION,
        created="2026-01-01T00:00:00+00:00",
        revision="0123456789ab",
        machine=machine,
        decisions={"torch op": decide(2)},
        notes=("transformers not run",),
        op_spec=OpSpec(("torch",), 2, (8, 4096), 2048, "bfloat16", "cuda", 96, 10),
        op=op,
        model_spec=model_spec(),
        model=model,
        kernel_spec=kernel_spec() if kernels else None,
        kernels=kernels,
    )


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """A part of `bench.launch` that goes wrong on rank 1 as it is told to; the other ranks wait for it. A `folder` gets
    a file named by each rank's process."""
    if "folder" in spec:
        Path(spec["folder"], str(os.getpid())).touch()
    if os.environ["RANK"] == "1":
        if spec["rank_1"] == "raises":
            raise ValueError("no such model")
        if spec["rank_1"] == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
    if spec["rank_1"] != "answers":
        time.sleep(60)
    return {"rank": os.environ["RANK"], "world_size": os.environ["WORLD_SIZE"], "given": spec}
