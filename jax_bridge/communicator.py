"""A mesh axis, or several, with workspaces for the fused kernel: opened once, found by name, closed by `with`.

    with jax_bridge.fused_communicator(mesh, "tp", hidden_size, jnp.bfloat16, decision) as comm:
        ...                                   # jitted functions traced in here fuse where comm.decision says so

Opening is collective over all processes of the mesh. Each local device gets a thread that runs the start-up of the
PyTorch core (allocation, votes, self-test); afterwards all ranks, in all groups along the axes, have the same
decision. `comm.decision` says whether anything fuses, and why not.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jax_bridge.axes import AxisName, axes_of
from shared_config import BatchAnswer, FusionDecision

if TYPE_CHECKING:
    from jax_bridge.transports.base import Transport

# A communicator that is open changes what a function traces to, so which ones are open is part of jit's cache key.
# A reload of this module must find the key and the registry of before.
_open_serials: Any = globals().get("_open_serials") or jax.make_user_context(())
_open: list[Communicator] = globals().get("_open", [])
_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Communicator:
    """One open communicator. `id` is the number that its custom calls find their workspaces by: small, and the
    same on all processes and in every run that opens communicators in the same order. `serial` is never reused."""

    id: int
    serial: int
    mesh: jax.sharding.Mesh
    axis_name: AxisName
    hidden_size: int
    dtype: jnp.dtype
    decision: FusionDecision
    max_tokens: int  # the most that one fused call may have; 0 when nothing fuses
    _transport: Transport | None

    @property
    def is_open(self) -> bool:
        return any(other is self for other in _open)

    @property
    def axis_size(self) -> int:
        return math.prod(self.mesh.shape[name] for name in axes_of(self.axis_name))

    @property
    def transport(self) -> Transport:
        if self._transport is None:
            raise RuntimeError(f"communicator {self.id} does not fuse: {self.decision.reason}")
        return self._transport

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the custom calls that its fused functions contain."""
        return () if self._transport is None else self._transport.targets

    def answer(self, shape: tuple[int, ...], dtype: jnp.dtype, *, side: str) -> BatchAnswer:
        """Whether a reduction of an array `[..., D]` of that shape and dtype is fused, and why."""
        num_tokens = math.prod(shape[:-1])
        if self.decision.enabled and shape[-1] != self.hidden_size:
            return BatchAnswer(False, f"hidden size {shape[-1]} is not the communicator's {self.hidden_size}")
        if self.decision.enabled and dtype != self.dtype:
            return BatchAnswer(False, f"dtype {dtype} is not the communicator's {self.dtype}")
        layout = self.decision.layout
        owed = layout.attn_tp_size if side == "attention" else layout.moe_reduce_size
        answer = self.decision.fuses(
            num_tokens,
            side=side,
            itemsize=dtype.itemsize,
            owed_ranks=tuple(range(owed)),
            op_ranks=tuple(
                range(self.axis_size)
            ),  # all groups along the axes are alike, so ranks count from 0
        )
        if answer.fuses and num_tokens > self.max_tokens:
            return BatchAnswer(False, f"{num_tokens} tokens are above the workspace's {self.max_tokens}")
        return answer


def find_communicator(axis_name: AxisName, comm: Communicator | None) -> tuple[Communicator | None, str]:
    """The communicator for a call over `axis_name`, or None and why there is none.

    `comm` is what the caller asked for; without it, the one opened last for those axes and mesh shape. Raises
    ValueError when the one asked for cannot serve the call.
    """
    here = jax.sharding.get_abstract_mesh()
    if comm is not None:
        if not comm.is_open:
            raise ValueError(f"communicator {comm.id} is closed: call inside its `with` block")
        if comm.axis_name != axis_name:
            raise ValueError(
                f"axis_name is {axis_name!r}, but the communicator reduces over {comm.axis_name!r}"
            )
        mismatch = _mesh_mismatch(comm, here)
        if mismatch:
            raise ValueError(mismatch)
        return comm, ""
    reason = f"no fused communicator is open for axis {axis_name!r}"
    for candidate in reversed(_open):
        if candidate.axis_name == axis_name:
            reason = _mesh_mismatch(candidate, here)
            if not reason:
                return candidate, ""
    return None, reason


def _mesh_mismatch(comm: Communicator, here: jax.sharding.AbstractMesh) -> str:
    """Why code inside a shard_map over `here` cannot use `comm`, or ""."""
    ours, theirs = dict(comm.mesh.shape), dict(zip(here.axis_names, here.axis_sizes, strict=True))
    if ours != theirs:
        return f"the communicator's mesh is {ours}, but this code runs over {theirs or 'no mesh'}"
    automatic = [name for name, size in ours.items() if size > 1 and name not in here.manual_axes]
    if automatic:
        return f"mesh axes {automatic} are not manual here: give shard_map all axes of the mesh"
    return ""


def open_communicators() -> tuple[Communicator, ...]:
    return tuple(_open)


@contextlib.contextmanager
def registered(comm: Communicator) -> Iterator[None]:
    """`comm` is found by calls, in all threads, for a `with` block."""
    with _lock:
        _open.append(comm)
        _open_serials.set_global(tuple(other.serial for other in _open))
    try:
        yield
    finally:
        with _lock:
            _open.remove(comm)
            _open_serials.set_global(tuple(other.serial for other in _open))
