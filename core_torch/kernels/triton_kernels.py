"""The kernels written in Triton (`jit`): whether they can be used, and their modules."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

from core_torch.kernels.native import Answer, first_failure

MIN_SM = 90  # tiles that fill Hopper's shared memory


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
    """Module `name` of the kernels. Raises ImportError with the install command where Triton is missing."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise ImportError("Kernels of prefill need the package `triton`: pip install triton") from error
    return importlib.import_module(f"core_torch.kernels.jit.{name}")
