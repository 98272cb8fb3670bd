"""The fused op across the virtual devices of a CPU, through the custom call in `native/rendezvous.cc`.

It is what the `reference` backend means in JAX: the path that GPUs take (decision, votes, custom call, order,
counts) with the kernel's rounding, on a laptop. All devices of a group must lie in one process.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tvm_ffi

from core_torch.kernels.buffers import NoChoices
from core_torch.kernels.comm import CommBackend
from core_torch.kernels.flashinfer_api import RawKernel
from jax_bridge import native
from jax_bridge.axes import AxisName
from jax_bridge.devices import group_index
from jax_bridge.transports.base import alike, like, register

NORM_TARGET = "crossfuse.cpu.allreduce_residual_rmsnorm"
SUM_TARGET = "crossfuse.cpu.allreduce"
# Sequence numbers of calls that nothing orders start here, far from those that a CallOrder counts.
FIRST_UNORDERED = 1 << 30


class RendezvousBuffers(NoChoices):
    """One rank's seat in a group, as the start-up of the PyTorch core makes, tests and destroys it (`Buffers`)."""

    def __init__(self, communicator_id: int, group: int, rank: int, axis_size: int, timeout_s: float) -> None:
        self._library = native.load("rendezvous")
        self._id = communicator_id
        self._place = torch.tensor([group, rank], dtype=torch.int32)
        self._axis_size = axis_size
        self._timeout_ms = int(timeout_s * 1000)
        self._calls = 0

    def probe(self, max_tokens: int) -> None:
        del max_tokens  # ranks read each other's operands in place: there is nothing to allocate

    def create(self, max_tokens: int, comm: CommBackend) -> None:
        del max_tokens
        group, rank = self._place.tolist()
        if rank == 0:
            self._library.open_group(self._id, group, self._axis_size, self._timeout_ms)
        comm.barrier()

    def run(
        self,
        partial: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        weight_bias: float,
        out_residual: torch.Tensor,
        out_normed: torch.Tensor,
    ) -> None:
        number = torch.tensor([self._calls], dtype=torch.int32)
        self._calls += 1
        operands = (partial, residual, weight, self._place, number, out_residual, out_normed, number.clone())
        self._library.allreduce_residual_rmsnorm(
            *map(tvm_ffi.from_dlpack, operands), self._id, eps, weight_bias
        )

    def raw(self) -> RawKernel:
        raise ValueError("the rendezvous has no kernel outside its custom call")

    def destroy(self) -> None:
        self._library.close_group(self._id, int(self._place[0]))


class RendezvousTransport:
    """See `Transport`. The groups have been opened by `RendezvousBuffers`."""

    targets = (NORM_TARGET, SUM_TARGET)

    def __init__(self, communicator_id: int, mesh_axes: Sequence[str], axis_name: AxisName) -> None:
        library = native.load("rendezvous")
        register(
            NORM_TARGET,
            library.allreduce_residual_rmsnorm,
            ("communicator", "eps", "weight_bias"),
            platform="cpu",
        )
        register(SUM_TARGET, library.allreduce, ("communicator",), platform="cpu")
        self._id = communicator_id
        self._mesh_axes = tuple(mesh_axes)
        self._axis_name = axis_name
        self._numbers = itertools.count(FIRST_UNORDERED)

    def close(self) -> None:
        return None  # the buffers close the groups

    def allreduce_residual_rmsnorm(
        self,
        partial: jax.Array,
        residual: jax.Array,
        weight: jax.Array,
        sequence: jax.Array | None,
        *,
        eps: float,
        weight_bias: float,
        in_place: bool,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        number = self._number(sequence)
        aliases = {1: 0} if in_place else {}
        if sequence is not None:
            aliases[4] = 2
        results = (like(partial), like(partial), like(number))
        call = jax.ffi.ffi_call(NORM_TARGET, results, input_output_aliases=aliases)
        new_residual, normed, next_number = call(
            *alike(partial, residual, weight, self._place(), number),
            communicator=np.int64(self._id),
            eps=np.float64(eps),
            weight_bias=np.float64(weight_bias),
        )
        return new_residual, normed, None if sequence is None else next_number

    def allreduce(self, partial: jax.Array, sequence: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        number = self._number(sequence)
        call = jax.ffi.ffi_call(
            SUM_TARGET,
            (like(partial), like(number)),
            input_output_aliases={2: 1} if sequence is not None else {},
        )
        total, next_number = call(*alike(partial, self._place(), number), communicator=np.int64(self._id))
        return total, None if sequence is None else next_number

    def _number(self, sequence: jax.Array | None) -> jax.Array:
        """A call's sequence number: of its order, or else of this place in the program."""
        if sequence is not None:
            return sequence
        return jnp.full((1,), next(self._numbers), jnp.int32)

    def _place(self) -> jax.Array:
        """int32 [2]: this device's group and its rank there. XLA:CPU gives a custom call no device number."""
        rank = jax.lax.axis_index(self._axis_name)
        return jnp.stack([group_index(self._mesh_axes, self._axis_name), jnp.asarray(rank, jnp.int32)])
