"""The compiled kernels of `core_torch/kernels/csrc` as XLA custom calls: the binaries that PyTorch calls.

XLA captures them into its CUDA graphs. What a kernel changes in place is an operand and, on the same buffer, a result,
so the order of calls follows from data; scratch memory is a result that nobody reads. A call that is traced names its
target alone; `open_kernels` loads and registers it before anything runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch

from core_torch.kernels import native as kernels
from core_torch.kernels.choice import KernelOptions
from jax_bridge import native
from jax_bridge.transports.base import alike, register
from jax_bridge.varying import vary_over, varying_axes

PREFIX = "crossfuse.gpu."


@dataclass(frozen=True)
class Target:
    """A TVM-FFI function of a module in csrc: `function(*operands, *results, *attrs)`, named as the target is.

    `adapted`: its own parameters are others, and `native/decode_adaptor.cc` stands between. `function` is its name
    where that differs.
    """

    module: str
    attrs: tuple[str, ...]
    adapted: bool = False
    function: str | None = None


TARGETS = {
    "add_norm": Target("add_norm", ("eps", "weight_bias", "launch_with_pdl")),
    "norm": Target("add_norm", ("eps", "weight_bias", "launch_with_pdl"), adapted=True, function="add_norm"),
    "few_rows": Target("few_rows", ("launch_with_pdl",)),
    "gdn_decode": Target("gdn_decode", ("eps", "units_per_block", "launch_with_pdl"), adapted=True),
    "norm_rope": Target(
        "norm_rope", ("rotary_dim", "theta", "eps", "weight_bias", "launch_with_pdl"), adapted=True
    ),
    "paged_decode": Target("paged_decode", ("scale", "launch_with_pdl"), adapted=True),
    "moe_route": Target("moe_decode", ("num_experts", "normalize", "launch_with_pdl")),
    "moe_group": Target("moe_decode", ("num_experts", "launch_with_pdl")),
    "moe_decode": Target("moe_decode", ("launch_with_pdl",)),
    "vocabulary_argmax": Target("vocabulary", ("launch_with_pdl",), adapted=True),
}


@dataclass(frozen=True)
class JaxKernelOptions(KernelOptions):
    """What a layer asks in JAX: the kernel must take its shapes, and XLA must be able to call it."""

    def ask(self, name: str, check: Callable[..., kernels.Answer], **shapes: Any) -> kernels.Answer:
        answer = super().ask(name, check, **shapes)
        if answer.usable and importlib.util.find_spec("jax_tvm_ffi") is None:
            return kernels.Answer(False, "jax-tvm-ffi is not installed")
        return answer


def open_kernels(modules: Iterable[str], device: torch.device) -> None:
    """Loads these modules of csrc (compiling what is not prebuilt) for `device` and registers their custom calls.

    All GPUs of a process are of one architecture. Raises ImportError for a missing package, RuntimeError with the
    compiler's output.
    """
    wanted = set(modules)
    for name, target in TARGETS.items():
        if target.module in wanted:
            function = kernels.function(target.function or name, device, of=target.module)
            open_target(name, function, platform="gpu")


def open_target(name: str, function: object, *, platform: str) -> None:
    """Makes `function` what the custom call `name` runs on `platform`."""
    target = TARGETS[name]
    if target.adapted:
        adaptor = native.load("decode_adaptor")
        adaptor.set_kernel(name, function)
        function = adaptor[name]
    register(PREFIX + name, function, target.attrs, platform=platform)


def call(
    name: str,
    operands: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    in_place: Mapping[int, int] | None = None,
    **attrs: float,
) -> list[jax.Array]:
    """One custom call on each device's own operands. `in_place`: operands that are results, on their buffers."""
    assert tuple(attrs) == TARGETS[name].attrs
    axes = frozenset[str]().union(*map(varying_axes, operands))
    run = jax.ffi.ffi_call(PREFIX + name, list(results), input_output_aliases=dict(in_place or {}))
    values = {
        attr: np.float64(value) if isinstance(value, float) else np.int64(value)
        for attr, value in attrs.items()
    }
    return [vary_over(result, axes) for result in run(*alike(*operands), **values)]
