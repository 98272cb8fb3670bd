"""Your own CuPy or PyTorch kernel as a JAX function: it runs on XLA's stream, on XLA's buffers, without copies.

    @jax_bridge.cupy_kernel(out=lambda x, y, scale: jax.ShapeDtypeStruct(x.shape, x.dtype))
    def scaled_add(out, x, y, *, scale):
        out[...] = x + scale * y

    jax.jit(lambda x, y: scaled_add(x, y, scale=2.0))(x, y)

The function gets its results first (one array, or a tuple), then its operands, and fills the results in place. On
CPU the arrays are NumPy's, so code that uses what both libraries have runs on both.

With `cuda_graph=True` XLA may capture the launches into a CUDA graph: Python then runs once per capture, not at
every step, and the kernel must not allocate, wait, or look at values on the host. Whether XLA does is its choice: a
program with one small kernel was seen to launch it from Python at each of 100 executions. The one-liner above
allocates temporaries, so on a GPU it would be `cuda_graph=False`, or `cupy.multiply(y, scale, out=out)`, `out += x`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from jax_bridge.packages import require_cupy, require_torch
from jax_bridge.varying import vary_over, varying_axes

ARRAYS = ("cupy", "torch", "dlpack")
CPU = 1  # DLPack's kDLCPU


def cupy_kernel(
    *,
    out: Callable[..., Any],
    arrays: str = "cupy",
    cuda_graph: bool = True,
    aliases: Mapping[int, int] | None = None,
    vmap_method: str = "sequential",
    same_on_all_ranks: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., Any]]:
    """Decorator: makes `kernel(results, *operands, **static)` a function of JAX arrays that returns the results.

    `out(*operands, **static)` gives the `jax.ShapeDtypeStruct` of each result (one, or a tuple) from those of the
    operands. `arrays` is what the kernel gets: "cupy" (NumPy on CPU), "torch", or "dlpack", the buffers themselves
    for any library that reads DLPack. `aliases` maps operands to results that are computed in their place.
    `vmap_method` is that of `jax.pure_callback`. Keyword arguments are constants of the compiled function.

    Inside shard_map each device runs the kernel on its own shard; `same_on_all_ranks` promises that the results do
    not vary over mesh axes although the operands do, as those of a collective. A kernel has no gradient: give it
    one with `jax.custom_vjp`. On a GPU this needs CuPy, whatever `arrays` is.
    """
    if arrays not in ARRAYS:
        raise ValueError(f"arrays must be one of {', '.join(ARRAYS)}, got {arrays!r}")

    def decorate(kernel: Callable[..., None]) -> Callable[..., Any]:
        @functools.wraps(kernel)
        def call(*operands: jax.Array, **static: Any) -> Any:
            shapes = [jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in operands]
            run = buffer_callback(
                functools.partial(_run, kernel, arrays, static),
                out(*shapes, **static),
                command_buffer_compatible=cuda_graph,
                vmap_method=vmap_method,
                input_output_aliases=dict(aliases or {}),
            )
            axes = frozenset[str]()
            if not same_on_all_ranks:
                axes = axes.union(*map(varying_axes, operands))
            return jax.tree.map(lambda result: vary_over(result, axes), run(*operands))

        return call

    return decorate


def _run(
    kernel: Callable[..., None],
    arrays: str,
    static: Mapping[str, Any],
    context: Any,
    results: Any,
    *operands: Any,
) -> None:
    """What XLA calls. `context` lends the stream on GPUs and has none on CPU."""
    kind, ordinal = jax.tree.leaves((results, operands))[0].__dlpack_device__()
    with contextlib.ExitStack() as stack:
        if kind != CPU:
            cupy = require_cupy()
            stack.enter_context(cupy.cuda.Device(ordinal))
            stack.enter_context(cupy.cuda.ExternalStream(context.stream, ordinal))
        if arrays == "dlpack":
            kernel(results, *operands, **static)
            return
        if arrays == "torch":
            torch = require_torch()
            view = torch.from_dlpack
            if kind != CPU:
                stack.enter_context(torch.cuda.stream(torch.cuda.ExternalStream(context.stream, ordinal)))
        else:
            view = np.asarray if kind == CPU else require_cupy().from_dlpack
        kernel(jax.tree.map(view, results), *map(view, operands), **static)
