"""The Triton kernels of `core_torch/kernels/jit` as XLA custom calls: the machine code that PyTorch runs.

A call is written as the kernel's own operands. Those that it writes are results: a `ShapeDtypeStruct` stands for a new
array, `Changed` for one that is overwritten, on the same buffer where XLA may. A kernel is loaded (compiled, where it
is not prebuilt) and registered when its first call is traced.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
import torch

from core_torch.kernels import triton_kernels
from core_torch.kernels.triton_kernels import Kernel, Launch, Scalar
from jax_bridge.transports.base import alike, like, register
from jax_bridge.varying import vary_over, varying_axes

PREFIX = "crossfuse.gpu."


@dataclass(frozen=True)
class Changed:
    """An operand that the kernel overwrites; its new value is a result."""

    value: jax.Array


@dataclass(frozen=True)
class _Order:
    """Where the kernel's tensors are among XLA's operands and, behind them, results."""

    num_arrays: int
    places: tuple[int, ...]
    same: tuple[int, ...]  # pairs on one buffer: an operand, its result


def launch(
    how: Launch,
    device: torch.device,
    *tensors: jax.Array | jax.ShapeDtypeStruct | Changed,
    scalars: Sequence[Scalar] = (),
    after: Sequence[jax.Array] = (),
) -> list[jax.Array]:
    """The kernel's results, in the order of its operands. `after`: arrays that must be there before it runs.

    `device` is any GPU of this process, as PyTorch knows it.
    """
    operands: list[jax.Array] = []
    results: list[jax.ShapeDtypeStruct] = []
    places: list[tuple[bool, int]] = []  # (whether among the results, number there)
    aliases: dict[int, int] = {}
    for tensor in tensors:
        if isinstance(tensor, jax.ShapeDtypeStruct):
            places.append((True, len(results)))
            results.append(tensor)
            continue
        places.append((False, len(operands)))
        if isinstance(tensor, Changed):
            aliases[len(operands)] = len(results)
            results.append(like(tensor.value))
        operands.append(tensor.value if isinstance(tensor, Changed) else tensor)
    dtypes = [(results if is_result else operands)[number].dtype.name for is_result, number in places]
    operands += after
    first = len(operands)
    order = _Order(
        num_arrays=first + len(results),
        places=tuple(first + number if is_result else number for is_result, number in places),
        same=tuple(place for operand, result in aliases.items() for place in (operand, first + result)),
    )
    target = _target(how.kernel(dtypes, scalars), device, order)
    axes = frozenset[str]().union(*map(varying_axes, operands))
    run = jax.ffi.ffi_call(target, results, input_output_aliases=aliases)
    values = dict(zip(_attrs(len(scalars)), (*scalars, *how.grid), strict=True))
    attrs = {
        name: np.float64(value) if isinstance(value, float) else np.int64(value)
        for name, value in values.items()
    }
    return [vary_over(result, axes) for result in run(*alike(*operands), **attrs)]


def _attrs(num_scalars: int) -> tuple[str, ...]:
    return (*(f"scalar_{number}" for number in range(num_scalars)), "grid_x", "grid_y")


@functools.cache
def _target(kernel: Kernel, device: torch.device, order: _Order) -> str:
    """The registered custom call's name."""
    function = triton_kernels.function(kernel, device, order.num_arrays, order.places, order.same)
    digest = hashlib.sha256(repr((kernel, order)).encode()).hexdigest()[:12]
    name = f"{PREFIX}{kernel.module}.{kernel.name}.{digest}"
    platform = "gpu" if device.type == "cuda" else "cpu"
    register(name, function, _attrs(len(kernel.scalars)), platform=platform)
    return name
