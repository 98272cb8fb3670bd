"""Opening a communicator: agree on what is opened, make and test the workspaces, make the transport.

Every step that can fail on one rank only is voted on (`core_torch.kernels.startup`), so that all ranks of the mesh
end with the same decision.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.typing import DTypeLike

from core_torch.kernels.comm import CommBackend
from core_torch.kernels.startup import start_fusion
from core_torch.kernels.workspace import Workspace
from jax_bridge import communicator
from jax_bridge.axes import AxisName, in_mesh_order
from jax_bridge.communicator import Communicator
from jax_bridge.devices import AxisGroups, LocalRank, mesh_comms, on_threads
from jax_bridge.packages import require_cupy, require_jax_tvm_ffi
from jax_bridge.transports.base import Transport
from shared_config import FlashInferInfo, FusionDecision, FusionError, FusionWarning, probe_flashinfer

TRANSPORTS = ("ffi", "cupy")
MESH_RULE = "JAX mesh"
# The kernel's parameters are passed by position, as FlashInfer 0.7.2 has them; these came last.
NEWEST_OP_PARAMS = frozenset({"block_quant_group_size", "weight_bias"})

_serials = itertools.count()


@dataclass(frozen=True)
class _Started:
    """What one rank's start-up came to."""

    communicator_id: int
    decision: FusionDecision
    workspace: Workspace | None


@contextlib.contextmanager
def fused_communicator(
    mesh: jax.sharding.Mesh,
    axis_name: AxisName,
    hidden_size: int,
    dtype: DTypeLike,
    decision: FusionDecision,
    *,
    transport: str = "ffi",
    max_tokens: int | None = None,
    timeout_s: float = 60.0,
) -> Iterator[Communicator]:
    """Workspaces for reductions over `axis_name` of `[..., hidden_size]` arrays of `dtype`, for a `with` block.

    `axis_name` is an axis, or a tuple of axes over which a group stretches; there is one group per combination of the
    mesh's other axes. Communicators of other axes of the mesh may be open beside it: a call finds the one of its own.
    All processes of the mesh open the same ones, together and in the same order.

    Functions that are traced inside the block fuse where `decision` says so; jitted functions are traced anew
    when they enter or leave it. A function compiled ahead of time inside the block must not run after it, and
    nothing may still be running when it ends. One communicator belongs to one Python thread that dispatches
    (`one_at_a_time`). On CPU, wait for results at least every 32 calls, as with `psum`: XLA there stalls with more in
    flight. On GPUs, keep XLA's preallocation (`XLA_PYTHON_CLIENT_MEM_FRACTION` leaves room for others) and set
    `CUDA_MODULE_LOADING=EAGER`.

    `transport` is "ffi" (a C++ custom call) or "cupy" (CuPy, no compiler); on CPU the `reference` backend always
    takes the C++ rendezvous. `max_tokens` makes the workspace smaller than the decision's limit. `timeout_s`
    bounds every wait for another rank: at start-up, on CPU inside each call, and on GPUs where the host threads of a
    process meet at a launch outside CUDA graphs; one that waits there in vain says so on stderr and launches.

    Raises ValueError for arguments that do not fit each other, FusionError where the decision's mode is "on" and
    it cannot be met, CommError when a rank ends, ImportError (with the command) for a missing package.
    """
    axis_name = in_mesh_order(axis_name, mesh.axis_names)
    groups = AxisGroups.of(mesh, axis_name)
    dtype = jnp.dtype(dtype)
    _check_arguments(groups, axis_name, hidden_size, dtype, decision, transport)
    flashinfer = probe_flashinfer() if decision.enabled and groups.platform == "gpu" else FlashInferInfo()
    decision = _fit_to_mesh(decision, groups, axis_name, flashinfer)
    if decision.enabled:
        _require_packages(groups, transport)
    comms = mesh_comms(groups, timeout_s)
    local = groups.local_ranks()
    identity = (axis_name, dict(mesh.shape), hidden_size, dtype.name, transport, max_tokens)

    def start(seat: int) -> _Started:
        comm = comms[seat]
        communicator_id = _agree_on_id(comm, identity)
        rank = local[seat]
        here = _one_host(decision, comm, groups.axis_size)
        on_gpu = here.enabled and here.backend != "reference"
        if on_gpu:
            torch.cuda.set_device(rank.ordinal)

        def rendezvous() -> Any:
            from jax_bridge.transports.rendezvous import RendezvousBuffers

            return RendezvousBuffers(communicator_id, rank.group, rank.rank, groups.axis_size, timeout_s)

        in_force, workspace = start_fusion(
            here,
            comm.Split(rank.group, rank.rank),
            hidden_size=hidden_size,
            dtype=getattr(torch, dtype.name),
            device=torch.device("cuda", rank.ordinal) if on_gpu else torch.device("cpu"),
            flashinfer=flashinfer,
            all_ranks=comm,
            max_tokens=max_tokens,
            make_buffers=rendezvous if here.backend == "reference" else None,
        )
        return _Started(communicator_id, in_force, workspace)

    started = on_threads(start, len(local), comms[0].abort)
    decision = started[0].decision
    if decision.decided_by == MESH_RULE and jax.process_index() == 0:
        warnings.warn(FusionWarning(f"fusion is off on all ranks: {decision.reason}"), stacklevel=3)
    workspaces = [rank.workspace for rank in started if rank.workspace is not None]
    opened = None
    try:
        if workspaces:
            opened = _make_transport(
                transport, started[0].communicator_id, mesh, axis_name, local, workspaces, timeout_s
            )
        comm = Communicator(
            id=started[0].communicator_id,
            serial=next(_serials),
            mesh=mesh,
            axis_name=axis_name,
            hidden_size=hidden_size,
            dtype=dtype,
            decision=decision,
            max_tokens=workspaces[0].max_tokens if workspaces else 0,
            _transport=opened,
        )
        with communicator.registered(comm):
            yield comm
    finally:
        _close(groups, local, opened, workspaces)


def _check_arguments(
    groups: AxisGroups,
    axis_name: AxisName,
    hidden_size: int,
    dtype: jnp.dtype,
    decision: FusionDecision,
    transport: str,
) -> None:
    if transport not in TRANSPORTS:
        raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}")
    if dtype.name not in ("float16", "bfloat16", "float32"):
        raise ValueError(f"dtype must be float16, bfloat16 or float32, got {dtype.name}")
    if hidden_size != decision.hidden_size:
        raise ValueError(
            f"hidden_size is {hidden_size}, but the decision was made for {decision.hidden_size}"
        )
    sizes = {decision.layout.attn_tp_size, decision.layout.moe_reduce_size}
    if groups.axis_size not in sizes:
        raise ValueError(
            f"mesh axis {axis_name!r} has {groups.axis_size} devices, but the decision was made for groups of "
            f"{' or '.join(map(str, sorted(sizes)))}"
        )


def _fit_to_mesh(
    decision: FusionDecision, groups: AxisGroups, axis_name: AxisName, flashinfer: FlashInferInfo
) -> FusionDecision:
    """The decision was made for some machine; this is what the mesh and JAX's side of it add. Alike on all ranks."""
    if not decision.enabled:
        return decision
    reason = ""
    if decision.backend == "reference":
        if groups.platform != "cpu":
            reason = f"the reference backend runs on CPUs in JAX, and the mesh is of {groups.platform}s"
        elif any(len({device.process_index for device in row}) > 1 for row in groups.devices):
            reason = f"devices along {axis_name!r} lie in several processes, and CPUs meet only within one"
    elif groups.platform != "gpu":
        reason = f"the {decision.backend} backend runs on GPUs, and the mesh is of {groups.platform}s"
    elif decision.backend != "trtllm":
        reason = f"JAX's custom calls know the trtllm backend, not {decision.backend}"
    elif NEWEST_OP_PARAMS - flashinfer.op_params:
        missing = ", ".join(sorted(NEWEST_OP_PARAMS - flashinfer.op_params))
        reason = f"FlashInfer {flashinfer.version} has no {missing}: JAX's custom calls need 0.7.2 or later"
    return _refuse(decision, reason) if reason else decision


def _refuse(decision: FusionDecision, reason: str) -> FusionDecision:
    off = decision.without_fusion(reason, MESH_RULE)
    if decision.mode == "on":
        raise FusionError(f"fusion='on' cannot be met: {reason}", off)
    return off


def _require_packages(groups: AxisGroups, transport: str) -> None:
    if groups.platform == "gpu" and transport == "cupy":
        require_cupy()
    else:
        require_jax_tvm_ffi()


def _agree_on_id(comm: CommBackend, identity: tuple[Any, ...]) -> int:
    """The smallest communicator id that is free in every process, after comparing what each of them opens."""
    used = {other.id for other in communicator.open_communicators()}
    offers = comm.allgather((identity, used))
    for rank, (other, _) in enumerate(offers):
        if other != offers[0][0]:
            raise ValueError(
                f"the processes open different communicators: rank 0 {offers[0][0]}, rank {rank} {other}"
            )
    taken = set[int]().union(*(theirs for _, theirs in offers))
    return next(number for number in itertools.count() if number not in taken)


def _one_host(decision: FusionDecision, comm: CommBackend, axis_size: int) -> FusionDecision:
    """FlashInfer's handles travel over sockets of one machine: asked before anybody waits for one."""
    hosts = comm.allgather(socket.gethostname())
    rows = [hosts[start : start + axis_size] for start in range(0, len(hosts), axis_size)]
    spread = [row for row in rows if len(set(row)) > 1]
    if not spread or not decision.enabled:
        return decision
    return _refuse(decision, f"a group's devices lie on several machines: {sorted(set(spread[0]))}")


def _make_transport(
    name: str,
    communicator_id: int,
    mesh: jax.sharding.Mesh,
    axis_name: AxisName,
    local: tuple[LocalRank, ...],
    workspaces: list[Workspace],
    timeout_s: float,
) -> Transport:
    if workspaces[0].backend == "reference":
        from jax_bridge.transports.rendezvous import RendezvousTransport

        return RendezvousTransport(communicator_id, mesh.axis_names, axis_name)
    axis_size = AxisGroups.of(mesh, axis_name).axis_size
    kernels = {rank.ordinal: workspace.raw() for rank, workspace in zip(local, workspaces, strict=True)}
    if name == "cupy":
        from jax_bridge.transports.cupy import CupyTransport

        return CupyTransport(communicator_id, axis_size, kernels)
    from jax_bridge.transports.ffi import FfiTransport

    groups = {rank.ordinal: rank.group for rank in local}
    return FfiTransport(communicator_id, axis_size, kernels, groups, timeout_s)


def _close(
    groups: AxisGroups,
    local: tuple[LocalRank, ...],
    transport: Transport | None,
    workspaces: list[Workspace],
) -> None:
    if groups.platform == "gpu" and workspaces:
        for rank in local:  # XLA's kernels too: torch and XLA share the device's context
            torch.cuda.synchronize(rank.ordinal)
    if transport is not None:
        transport.close()
    for workspace in workspaces:
        workspace.close()
