"""FlashInfer's kernel through `jax_bridge.cupy_kernel`: Python at capture, on XLA's stream, no C++ to compile.

The same launches as `ffi`, so the same bits. A user's own kernel takes the same road.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import tvm_ffi

from core_torch.kernels.flashinfer_api import RawKernel, use_oneshot
from jax_bridge.packages import require_cupy
from jax_bridge.transports.base import like
from jax_bridge.user_kernel import cupy_kernel

# FlashInfer's AllReduceFusionPattern.
ALL_REDUCE = 0
ALL_REDUCE_RESIDUAL_RMSNORM = 1


class CupyTransport:
    """See `Transport`. `kernels` are this process's ranks, by CUDA device ordinal."""

    targets = ("xla_buffer_python_gpu_callback_cmd_buffer",)

    def __init__(self, communicator_id: int, axis_size: int, kernels: Mapping[int, RawKernel]) -> None:
        require_cupy()
        self._id = communicator_id
        self._axis_size = axis_size
        self._kernels = dict(kernels)

    def close(self) -> None:
        self._kernels.clear()

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
        results = [like(partial), like(partial)]
        aliases = {1: 0} if in_place else {}
        if sequence is None:
            norm = self._kernel(self._launch_norm, results, aliases)
            new_residual, normed = norm(partial, residual, weight, eps=eps, weight_bias=weight_bias)
            return new_residual, normed, None
        norm = self._kernel(self._launch_norm, [*results, like(sequence)], aliases | {3: 2})
        return tuple(norm(partial, residual, weight, sequence, eps=eps, weight_bias=weight_bias))

    def allreduce(self, partial: jax.Array, sequence: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        if sequence is None:
            return self._kernel(self._launch_sum, [like(partial)], {})(partial)[0], None
        total = self._kernel(self._launch_sum, [like(partial), like(sequence)], {1: 1})
        return tuple(total(partial, sequence))

    def _kernel(
        self, launch: Callable[..., None], results: list[jax.ShapeDtypeStruct], aliases: dict[int, int]
    ) -> Callable[..., Any]:
        return cupy_kernel(
            out=lambda *_operands, **_static: results,
            arrays="dlpack",
            aliases=aliases,
            same_on_all_ranks=True,
        )(launch)

    def _launch_norm(
        self,
        results: list[Any],
        partial: Any,
        residual: Any,
        weight: Any,
        *_sequence: Any,
        eps: float,
        weight_bias: float,
    ) -> None:
        partial, residual, weight = map(tvm_ffi.from_dlpack, (partial, residual, weight))
        new_residual, normed = map(tvm_ffi.from_dlpack, results[:2])
        norm = {
            "residual_in": residual,
            "residual_out": new_residual,
            "norm_out": normed,
            "rms_gamma": weight,
            "rms_eps": eps,
            "weight_bias": weight_bias,
        }
        self._launch(partial, ALL_REDUCE_RESIDUAL_RMSNORM, **norm)

    def _launch_sum(self, results: list[Any], partial: Any, *_sequence: Any) -> None:
        self._launch(tvm_ffi.from_dlpack(partial), ALL_REDUCE, allreduce_out=tvm_ffi.from_dlpack(results[0]))

    def _launch(self, partial: Any, pattern: int, **tensors: Any) -> None:
        """FlashInfer's kernel takes its parameters by position; those without a value here are None."""
        kernel = self._kernels.get(partial.device.index)
        if kernel is None:
            raise RuntimeError(
                f"fused communicator {self._id} is not open on CUDA device {partial.device.index}: a fused "
                "function runs inside the `with` block that it was compiled in, on the devices of its mesh"
            )
        num_tokens, hidden_size = partial.shape
        names = (
            "allreduce_out",
            "residual_in",
            "residual_out",
            "norm_out",
            "quant_out",
            "scale_out",
            "rms_gamma",
            "rms_eps",
            "scale_factor",
            "layout_code",
            "block_quant_group_size",
            "weight_bias",
        )
        stream = require_cupy().cuda.get_current_stream().ptr
        with tvm_ffi.use_raw_stream(partial.device, stream):
            kernel.function(
                partial,
                kernel.world_size,
                kernel.rank,
                num_tokens,
                hidden_size,
                tvm_ffi.from_dlpack(kernel.workspace_ptrs),
                True,  # launch_with_pdl
                use_oneshot(num_tokens, hidden_size, partial.dtype.itemsize, self._axis_size),
                True,  # trigger_completion_at_end
                partial.dtype.itemsize == 2,  # fp32_acc: in float32 there is nothing to widen
                pattern,
                *(tensors.get(name) for name in names),
            )
