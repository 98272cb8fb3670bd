"""FlashInfer's kernel as an XLA custom call through the C++ adaptor in `native/flashinfer_adaptor.cc`.

The default on GPUs: XLA captures it into its CUDA graphs, and no Python runs between the launches.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
import tvm_ffi

from core_torch.kernels.flashinfer_api import RawKernel, use_oneshot
from jax_bridge import native
from jax_bridge.transports.base import alike, like, register

NORM_TARGET = "crossfuse.gpu.allreduce_residual_rmsnorm"
SUM_TARGET = "crossfuse.gpu.allreduce"
ORDERED_NORM_TARGET = "crossfuse.gpu.ordered_allreduce_residual_rmsnorm"
ORDERED_SUM_TARGET = "crossfuse.gpu.ordered_allreduce"
LAUNCH_ATTRS = ("use_oneshot", "launch_with_pdl")
NORM_ATTRS = ("communicator", "eps", "weight_bias", *LAUNCH_ATTRS)
SUM_ATTRS = ("communicator", *LAUNCH_ATTRS)


class FfiTransport:
    """See `Transport`. `kernels` are this process's ranks, by CUDA device ordinal; `groups` says which reduce together
    (left out: all), since outside CUDA graphs their host threads wait for each other at each launch, `timeout_s` at
    most."""

    targets = (NORM_TARGET, SUM_TARGET, ORDERED_NORM_TARGET, ORDERED_SUM_TARGET)
    launch_with_pdl = True

    def __init__(
        self,
        communicator_id: int,
        axis_size: int,
        kernels: Mapping[int, RawKernel],
        groups: Mapping[int, int] | None = None,
        timeout_s: float = 60.0,
        platform: str = "gpu",
    ) -> None:
        library = native.load("flashinfer_adaptor")
        for target, attrs in zip(self.targets, (NORM_ATTRS, SUM_ATTRS) * 2, strict=True):
            register(target, library[target.rsplit(".", 1)[1]], attrs, platform=platform)
        self._library = library
        self._id = communicator_id
        self._axis_size = axis_size
        self._ordinals = tuple(kernels)
        for ordinal, kernel in kernels.items():
            library.open_rank(
                communicator_id,
                ordinal,
                groups[ordinal] if groups else 0,
                kernel.function,
                kernel.world_size,
                kernel.rank,
                tvm_ffi.from_dlpack(kernel.workspace_ptrs),
                int(timeout_s * 1000),
            )

    def close(self) -> None:
        for ordinal in self._ordinals:
            self._library.close_rank(self._id, ordinal)

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
        aliases = {1: 0} if in_place else {}
        attrs = {
            "eps": np.float64(eps),
            "weight_bias": np.float64(weight_bias),
            **self._launch(partial),
        }
        results = [like(partial), like(partial)]
        if sequence is None:
            call = jax.ffi.ffi_call(NORM_TARGET, results, input_output_aliases=aliases)
            new_residual, normed = call(*alike(partial, residual, weight), **attrs)
            return new_residual, normed, None
        results.append(like(sequence))
        call = jax.ffi.ffi_call(ORDERED_NORM_TARGET, results, input_output_aliases=aliases | {3: 2})
        new_residual, normed, sequence = call(*alike(partial, residual, weight, sequence), **attrs)
        return new_residual, normed, sequence

    def allreduce(self, partial: jax.Array, sequence: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        attrs = self._launch(partial)
        if sequence is None:
            return jax.ffi.ffi_call(SUM_TARGET, like(partial))(partial, **attrs), None
        results = (like(partial), like(sequence))
        call = jax.ffi.ffi_call(ORDERED_SUM_TARGET, results, input_output_aliases={1: 1})
        total, sequence = call(*alike(partial, sequence), **attrs)
        return total, sequence

    def _launch(self, partial: jax.Array) -> dict[str, np.generic]:
        """How the kernel is launched: as the PyTorch core does it, for the same bits."""
        num_tokens, hidden_size = partial.shape
        oneshot = use_oneshot(num_tokens, hidden_size, partial.dtype.itemsize, self._axis_size)
        return {
            "communicator": np.int64(self._id),
            "use_oneshot": np.int64(oneshot),
            "launch_with_pdl": np.int64(self.launch_with_pdl),
        }
