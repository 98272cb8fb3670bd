"""Which devices of a mesh reduce together, and which of them this process has to speak for."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

from core_torch.kernels.comm import CommError
from jax_bridge.axes import AxisName, axes_of, in_mesh_order
from jax_bridge.comm import MeshComm, ProcessExchange, ThreadHub
from jax_bridge.coordination import CoordinationStore

T = TypeVar("T")
Device = Any  # jax.Device, which type checkers take for a variable


@dataclass(frozen=True)
class LocalRank:
    """A device of this process: its place in the mesh's groups, and the number that CUDA knows it by."""

    device: Device
    group: int
    rank: int  # in the group
    ordinal: int  # the GPU's number in this process, as CUDA and custom calls know it


@dataclass(frozen=True)
class AxisGroups:
    """The groups along mesh axes: one per combination of the other axes, in row-major order of those.

    Within a group too the devices come in row-major order of its axes.
    """

    devices: tuple[tuple[Device, ...], ...]  # [group][rank]

    @classmethod
    def of(cls, mesh: jax.sharding.Mesh, axis_name: AxisName) -> AxisGroups:
        names = axes_of(in_mesh_order(axis_name, mesh.axis_names))
        axes = [mesh.axis_names.index(name) for name in names]
        size = math.prod(mesh.shape[name] for name in names)
        rows = np.moveaxis(mesh.devices, axes, range(-len(axes), 0)).reshape(-1, size)
        return cls(tuple(tuple(row) for row in rows))

    @property
    def axis_size(self) -> int:
        return len(self.devices[0])

    @property
    def processes(self) -> tuple[int, ...]:
        return tuple(sorted({device.process_index for row in self.devices for device in row}))

    @property
    def platform(self) -> str:
        """ "cpu" or "gpu"; a mesh has one."""
        return self.devices[0][0].platform

    def local_ranks(self) -> tuple[LocalRank, ...]:
        me = jax.process_index()
        return tuple(
            LocalRank(device, group, rank, getattr(device, "local_hardware_id", None) or 0)
            for group, row in enumerate(self.devices)
            for rank, device in enumerate(row)
            if device.process_index == me
        )


# How often each set of processes has met: numbers its key prefixes, alike in all of them.
_meetings: dict[tuple[int, ...], int] = {}


def mesh_comms(groups: AxisGroups, timeout_s: float) -> tuple[MeshComm, ...]:
    """A `MeshComm` over all devices of the mesh for each local rank; rank = group * axis size + rank in group."""
    local = groups.local_ranks()
    hub = ThreadHub(len(local), timeout_s)
    exchange = None
    if len(groups.processes) > 1:
        _meetings[groups.processes] = _meetings.get(groups.processes, 0) + 1
        prefix = f"crossfuse/{'-'.join(map(str, groups.processes))}/{_meetings[groups.processes]}"
        exchange = ProcessExchange(
            CoordinationStore(), prefix, groups.processes, jax.process_index(), timeout_s
        )
    world_size = len(groups.devices) * groups.axis_size
    return tuple(
        MeshComm(rank.group * groups.axis_size + rank.rank, world_size, hub, seat, exchange)
        for seat, rank in enumerate(local)
    )


def on_threads(action: Callable[[int], T], count: int, abort: Callable[[str], Any]) -> list[T]:
    """`[action(0), ..., action(count - 1)]`, each in a thread of its own.

    The first failure is raised again; `abort` is told of it at once, so that nobody waits for that thread.
    """
    results: dict[int, T] = {}
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = action(index)
        except BaseException as error:
            failures.append(error)
            abort(f"{type(error).__name__} in the thread of local device {index}: {error}")

    threads = [
        threading.Thread(target=run, args=(index,), name=f"crossfuse-{index}") for index in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        # A CommError is mostly the echo of another thread's failure.
        raise next((error for error in failures if not isinstance(error, CommError)), failures[0])
    return [results[index] for index in range(count)]


def group_index(mesh_axes: Sequence[str], axis_name: AxisName) -> jax.Array:
    """Inside shard_map: which group of `axis_name` this device is in, as `AxisGroups` counts them. int32 []."""
    index = np.int32(0)
    for name in mesh_axes:
        if name not in axes_of(axis_name):
            index = index * np.int32(jax.lax.axis_size(name)) + jax.lax.axis_index(name)
    return jax.numpy.asarray(index, jax.numpy.int32)
