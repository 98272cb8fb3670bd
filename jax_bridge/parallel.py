"""The ranks of one run: the devices, their mesh, and the fusion that they agreed on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import torch

from jax_bridge.axes import AxisName, MeshAxis
from jax_bridge.communicator import Communicator
from jax_bridge.devices import Device
from jax_bridge.mesh import axis_of, make_mesh, refine
from jax_bridge.opening import fused_communicator
from jax_bridge.partial_sum import ReduceAxis
from jax_bridge.pieces import Pieces
from shared_config import FusionDecision, ParallelLayout

# XLA would keep float32 between fused operations where the program rounds to bfloat16, as PyTorch does round.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}
# On GPUs XLA would time kernels of its own for every product of every program, at every start, and might choose others
# each time. cuBLAS chooses by its own rules, as in PyTorch.
GPU_COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
MOE_SLICE = ("ep", "moe_tp")  # what owes the MoE's sums
HOST_DEVICES_FLAG = "xla_force_host_platform_device_count"


@dataclass(frozen=True)
class Parallel:
    """`attention` and `mlp` owe the layers' sums, `experts` hold blocks of experts, rows travel along `pieces`.
    `decision` is the one in force after start-up."""

    layout: ParallelLayout
    mesh: jax.sharding.Mesh
    decision: FusionDecision
    attention: ReduceAxis
    mlp: ReduceAxis
    experts: MeshAxis
    pieces: Pieces

    @property
    def heads(self) -> MeshAxis:
        """The ranks that a mixer's heads are spread over."""
        return self.attention.times(self.pieces.context)

    @property
    def platform(self) -> str:
        """ "cpu" or "gpu"."""
        return self.mesh.devices.flat[0].platform

    @property
    def torch_device(self) -> torch.device:
        """The first device of this process, as PyTorch knows it; a process has GPUs of one kind."""
        first = next(d for d in self.mesh.devices.flat if d.process_index == jax.process_index())
        return (
            torch.device("cuda", first.local_hardware_id) if self.platform == "gpu" else torch.device("cpu")
        )


def choose_devices(device: str, count: int) -> list[Device]:
    """`count` devices: GPUs for "cuda", virtual CPU devices for "cpu", for "auto" GPUs where there are any.

    Raises ValueError when there are too few.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu" or "cuda", got {device!r}')
    _ask_for_cpu_devices(count)
    # A kernel that CUDA loads at its first launch waits for the GPU, which may be waiting for a peer.
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    gpus = [d for d in jax.local_devices() if d.platform == "gpu"] if device != "cpu" else []
    if gpus or device == "cuda":
        if len(gpus) < count:
            raise ValueError(
                f"tensor_parallel_size={count} needs {count} GPUs, JAX sees {len(gpus)}; use fewer ranks or "
                'device="cpu"'
            )
        return gpus[:count]
    cpus = jax.local_devices(backend="cpu")
    if len(cpus) < count:
        raise ValueError(
            f"tensor_parallel_size={count} needs {count} CPU devices, JAX was started with {len(cpus)}; before its "
            f"first use set XLA_FLAGS=--{HOST_DEVICES_FLAG}={count}"
        )
    return cpus[:count]


def _ask_for_cpu_devices(count: int) -> None:
    """Have the CPU split into `count` devices, unless the user said how or JAX runs already."""
    asked: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]  (made at run time)
    if HOST_DEVICES_FLAG in os.environ.get("XLA_FLAGS", "") or asked >= count:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return  # too late to ask: the devices that there are get counted by the caller


@contextmanager
def open_parallel(
    decision: FusionDecision,
    layout: ParallelLayout,
    *,
    devices: list[Device],
    dtype: jnp.dtype,
    max_tokens: int | None = None,
) -> Iterator[Parallel]:
    """A mesh of `devices`, with fusion started where the decision allows it. Functions traced inside may fuse.

    `max_tokens` is the largest batch that can come, where that is below the decision's limit (smaller workspaces)."""
    factors = refine(layout)
    mesh = make_mesh(factors, devices)
    tp, moe = axis_of(factors, "tp"), axis_of(factors, *MOE_SLICE)
    names = [axis.name for axis in {tp: None, moe: None} if axis.size > 1]
    with ExitStack() as stack:
        comms = _open(stack, mesh, names, decision, dtype, max_tokens)
        decisions = [comm.decision for comm in comms.values()]
        refusal = next((other for other in decisions if not other.enabled), None)
        if refusal is not None and any(other.enabled for other in decisions):
            stack.close()  # a later group's failure stops the groups that have started, too
            comms = _open(stack, mesh, names, refusal, dtype, max_tokens)
        yield Parallel(
            layout=layout,
            mesh=mesh,
            decision=refusal or next(iter(decisions), decision),
            attention=ReduceAxis(tp.name, tp.size, "attention", comms.get(tp.name)),
            mlp=ReduceAxis(moe.name, moe.size, "mlp", comms.get(moe.name)),
            experts=axis_of(factors, "ep"),
            pieces=Pieces(
                layout,
                context=axis_of(factors, "cp"),
                data=axis_of(factors, "dp"),
                prefill=axis_of(factors, "dp", "cp", within=MOE_SLICE),
                decode=axis_of(factors, "dp", within=MOE_SLICE),
                everyone=axis_of(factors, "dp", "cp"),
            ),
        )


def _open(
    stack: ExitStack,
    mesh: jax.sharding.Mesh,
    names: list[AxisName],
    decision: FusionDecision,
    dtype: jnp.dtype,
    max_tokens: int | None,
) -> dict[AxisName, Communicator]:
    """One communicator for each kind of group; attention and the MoE share one where their groups are the same."""
    return {
        name: stack.enter_context(
            fused_communicator(mesh, name, decision.hidden_size, dtype, decision, max_tokens=max_tokens)
        )
        for name in names
    }
