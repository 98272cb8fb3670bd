"""What a transport is, and how its custom-call targets are registered.

Shapes: T tokens, D hidden.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import jax

from jax_bridge.packages import require_jax_tvm_ffi
from jax_bridge.varying import vary_over, varying_axes


class Transport(Protocol):
    """One open communicator's way into the kernel. Operands are contiguous, of one dtype, and fit the workspace.

    `sequence` is an int32 [1] that orders independent calls, or None; it is returned (aliased, so that the next
    call has to wait for this one), or None. The results' types say nothing about mesh axes; the caller's cast does.
    """

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of its custom calls, as `jax.export` asks for them."""
        ...

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
        """partial, residual [T, D], weight [D] -> (residual, normed, sequence). `in_place` reuses `residual`."""
        ...

    def allreduce(self, partial: jax.Array, sequence: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """partial [T, D] -> (total [T, D], sequence)."""
        ...

    def close(self) -> None:
        """Forgets the communicator: a call that still comes is an error. No call may be running."""
        ...


# XLA knows a target by its name for as long as the process lives, so none is registered twice: a reload of this
# module finds the set of before.
_registered: set[str] = globals().get("_registered", set())
_lock = threading.Lock()


def register(target: str, function: Any, attrs: tuple[str, ...], *, platform: str) -> None:
    """Makes the TVM-FFI `function(*operands, *results, *attrs)` the custom call `target`, once per process.

    On GPUs it may be captured into a CUDA graph: it must launch on the current stream and do nothing else.
    """
    with _lock:
        if target in _registered:
            return
        require_jax_tvm_ffi().register_ffi_target(
            target,
            function,
            arg_spec=["args", "rets", *(f"attrs.{attr}" for attr in attrs)],
            platform=platform,
            allow_cuda_graph=platform == "gpu",
        )
        _registered.add(target)


def like(x: jax.Array) -> jax.ShapeDtypeStruct:
    """A result of `x`'s shape and dtype. It names no mesh axis: a reduction's result is the same on all ranks."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def alike(*operands: jax.Array) -> list[jax.Array]:
    """The operands, typed as varying over the same axes, as a custom call demands under `check_vma=True`."""
    axes = frozenset[str]().union(*(varying_axes(operand) for operand in operands))
    return [vary_over(operand, axes) for operand in operands]
