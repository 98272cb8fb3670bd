"""Runs the parts of a benchmark, each in its own processes, and adds the floors that need more than one of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.codec import from_plain, to_plain
from bench.floor import Chunk, Work, decode_chunks, floor_us, step_work
from bench.launch import PartError, run_part
from bench.machine import Machine, Rates
from bench.result import (
    KernelPart,
    KernelRow,
    KernelSpec,
    ModelPart,
    ModelRow,
    ModelSpec,
    OpPart,
    OpRow,
    OpSpec,
)
from shared_config import FusionDecision, ParallelLayout, Qwen3NextConfig
from shared_config.checkpoint import plan_checkpoint
from shared_config.limits import PAIR_SIZE
from shared_config.model import read_hf_config
from shared_config.presets import PRESETS, with_layers

OP_TIMEOUT_S = 300.0
MODEL_TIMEOUT_S = 900.0
PEER_MEMORY_SHARE = 0.8  # of one device, for the peer's weights


def probe_machine(device: str, dtype: str, tp: int) -> Machine:
    """Raises ValueError where `device` ("auto", "cpu", "cuda") cannot run `tp` ranks."""
    spec = {"device": device, "dtype": dtype}
    machine = from_plain(Machine, run_part("bench.machine", spec, timeout_s=OP_TIMEOUT_S))
    found = machine.hardware
    if device == "cuda" and found.device == "cpu":
        raise ValueError("--device cuda, but torch sees no GPU")
    if found.device == "cuda" and found.num_gpus < tp:
        raise ValueError(
            f"--tp {tp} needs {tp} GPUs, this machine has {found.num_gpus}; use fewer ranks or --device cpu"
        )
    return machine


def measure_op(spec: OpSpec, machine: Machine) -> tuple[list[OpRow], dict[str, FusionDecision]]:
    """All frameworks' rows with their link floors, and the fusion decision of each."""
    rows, decisions = [], {}
    for framework in spec.frameworks:
        answer = run_part(
            f"bench.{framework}_op",
            to_plain(spec),
            world_size=spec.tp if framework == "torch" else 1,
            timeout_s=OP_TIMEOUT_S,
            env=part_environment(framework, spec.device, spec.tp),
        )
        part = from_plain(OpPart, answer)
        rows += part.rows
        decisions[f"{framework} op"] = part.decision
    link = machine.rates.link_bytes_per_s
    if link is not None:
        rows = [replace(row, floor_us=row.wire_bytes / link * 1e6) for row in rows]
    return rows, decisions


def model_config(model: Path | None, preset: str | None, layers: int | None) -> tuple[str, dict[str, Any]]:
    """(name, Hugging Face config) of a checkpoint folder or of a preset, cut to `layers`."""
    if (model is None) == (preset is None):
        raise ValueError("give --model or --preset, not both")
    if model is not None:
        if layers is not None:
            raise ValueError("--layers cuts a preset; a checkpoint has the layers that it has")
        return model.resolve().name, read_hf_config(model)
    assert preset is not None
    config = with_layers(PRESETS[preset], layers)
    return f"{preset}, {config['num_hidden_layers']} layers", config


def measure_model(
    spec: ModelSpec, folder: str, machine: Machine
) -> tuple[list[ModelRow], dict[str, FusionDecision], list[str]]:
    """All frameworks' rows with their floors, the fusion decision of each, and notes on what is missing
    and what ran.

    Only the peer may be missing: a failure of torch or jax is raised as PartError.
    """
    ParallelLayout(tp_size=spec.tp).validate(spec.config)
    rows: list[ModelRow] = []
    decisions, notes = {}, []
    for framework in spec.frameworks:
        peer = framework == "transformers"
        refusal = peer_refusal(spec, machine) if peer else ""
        if refusal:
            notes.append(refusal)
            continue
        try:
            answer = run_part(
                f"bench.{framework}_model",
                {"spec": to_plain(spec), "folder": folder},
                world_size=spec.tp if framework == "torch" else 1,
                timeout_s=MODEL_TIMEOUT_S,
                env=part_environment(framework, spec.device, spec.tp),
            )
        except PartError as error:
            if not peer:
                raise
            notes.append(f"transformers failed: {str(error).strip().splitlines()[-1]}")
            continue
        part = from_plain(ModelPart, answer)
        rows += part.rows
        notes += [f"{framework}: {note}" for note in part.notes]
        if part.decision is not None:
            decisions[f"{framework} model"] = part.decision
    return with_floors(rows, spec, machine), decisions, notes


def peer_refusal(spec: ModelSpec, machine: Machine) -> str:
    """Why transformers cannot run this model on one device of the machine, or ""."""
    bytes_needed = weight_bytes(spec.config)
    allowed = PEER_MEMORY_SHARE * machine.memory_bytes
    if bytes_needed <= allowed:
        return ""
    return (
        f"transformers not run: {bytes_needed / 1e9:.0f} GB of weights do not fit into one device's "
        f"{machine.memory_bytes / 1e9:.0f} GB"
    )


def weight_bytes(config: Qwen3NextConfig) -> int:
    """Of the whole model, on one rank."""
    total = 0
    for shape in plan_checkpoint(config).parameters.values():
        elements = 1
        for size in shape:
            elements *= size
        total += elements * config.itemsize
    return total


def with_floors(rows: Sequence[ModelRow], spec: ModelSpec, machine: Machine) -> list[ModelRow]:
    """The rows with the least time that their model, batch and experts need on this machine."""
    found = []
    for row in rows:
        tp = 1 if row.framework == "transformers" else spec.tp
        rates = machine.rates.shared_by(tp) if spec.device == "cpu" else machine.rates
        chunks = (
            (Chunk(0, row.length),) * row.batch
            if row.phase == "prefill"
            else decode_chunks(row.batch, row.length + spec.steps_per_cell // 2)
        )
        work = step_work(spec.config, tp=tp, chunks=chunks, distinct_experts=row.distinct_experts)
        found.append(replace(row, floor_us=floor_us(work, rates)))
    return found


def measure_kernels(spec: KernelSpec, machine: Machine) -> tuple[list[KernelRow], list[str]]:
    """All rows with their floors, and notes on which kernels run here, and on what is missing."""
    ParallelLayout(tp_size=spec.tp).validate(spec.config)
    refusal = pair_refusal(spec, machine)
    rows: list[KernelRow] = []
    notes: list[str] = []
    for module, ranks in {"bench.torch_kernels": 1, "bench.torch_pair": PAIR_SIZE}.items():
        if ranks == PAIR_SIZE and refusal:
            notes.append(refusal)
            continue
        env = part_environment("torch", spec.device, ranks)
        answer = run_part(module, to_plain(spec), world_size=ranks, timeout_s=MODEL_TIMEOUT_S, env=env)
        part = from_plain(KernelPart, answer)
        rows += [replace(row, floor_us=kernel_floor_us(row, machine.rates)) for row in part.rows]
        notes += part.notes
    return rows, notes


def pair_refusal(spec: KernelSpec, machine: Machine) -> str:
    """Why the kernels that two ranks run together are not measured, or ""."""
    if spec.tp != PAIR_SIZE:
        return f"pair_allreduce not measured: it is for {PAIR_SIZE} ranks, and --tp is {spec.tp}"
    if spec.device == "cuda" and machine.hardware.num_gpus < PAIR_SIZE:
        return f"pair_allreduce not measured: it needs {PAIR_SIZE} GPUs, this machine has {machine.hardware.num_gpus}"
    return ""


def kernel_floor_us(row: KernelRow, rates: Rates) -> float:
    """One kernel can read, compute and send at the same time."""
    alone = Work(memory_bytes=row.memory_bytes, flops=row.flops)
    return 1e6 * max(alone.seconds(rates), Work(wire_bytes=row.wire_bytes).seconds(rates))


def part_environment(framework: str, device: str, tp: int) -> dict[str, str]:
    """What a part's processes need beyond this one's environment."""
    quiet = {"KINETO_LOG_LEVEL": "99", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":  # ranks and virtual devices share the cores instead of fighting for them
        ranks = tp if framework == "torch" else 1
        # XLA has a thread for each device; ranks that wait for one another hold theirs, and work needs more.
        return quiet | {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 * tp}",
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
    # A kernel that is loaded on first use waits for the devices, and there a fused kernel waits for its peer.
    return quiet | ({"CUDA_MODULE_LOADING": "EAGER"} if framework == "jax" else {})
