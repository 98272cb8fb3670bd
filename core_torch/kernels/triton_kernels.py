"""The kernels written in Triton (`jit`): whether they can be used, and their modules."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from typing import Any

import torch

from core_torch.kernels.native import Answer, first_failure

MIN_SM = 90  # tiles that fill Hopper's shared memory
JIT = "core_torch.kernels.jit"


def check_triton(device: torch.device) -> Answer:
    """Whether Triton's kernels run on `device` at all."""
    if device.type != "cuda":
        return Answer(False, f"compiled kernels need a CUDA GPU, and this is {device}")
    major, minor = torch.cuda.get_device_capability(device)
    return first_failure(
        (
            10 * major + minor >= MIN_SM,
            f"compiled kernels need SM{MIN_SM} or newer, this GPU is SM{major}{minor}",
        ),
        (importlib.util.find_spec("triton") is not None, "triton is not installed"),
    )


@functools.cache
def require_jit(name: str) -> Any:
    """Module `name` of the kernels. Raises ImportError with the install command where Triton is missing.

    Triton compiles each kernel on its first call, for one model's sizes in a second or two, and keeps it in its cache.
    """
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        raise ImportError("Kernels of prefill need the package `triton`: pip install triton") from error
    if triton.knobs.compilation.listener is None:  # else somebody listens already
        triton.knobs.compilation.listener = _say
    return importlib.import_module(f"{JIT}.{name}")


def _say(*, src: Any, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
    """One line on stderr for each kernel of ours that was compiled, as for those of `csrc`."""
    if not cache_hit and getattr(getattr(src, "fn", None), "__module__", "").startswith(JIT):
        name, seconds = metadata["name"], times.total / 1e6
        print(f"crossfuse: Triton compiled {name} in {seconds:.1f} s", file=sys.stderr, flush=True)
