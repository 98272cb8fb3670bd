"""Optional packages, imported when first needed, each missing one an ImportError that says how to install it."""

from __future__ import annotations

import importlib
from types import ModuleType


def _require(module: str, purpose: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs the package `{module}`: {install}") from error


def require_jax_tvm_ffi() -> ModuleType:
    """`jax_tvm_ffi`, which registers TVM-FFI functions as XLA custom calls."""
    return _require(
        "jax_tvm_ffi",
        "A fused custom call in JAX",
        "pip install jax-tvm-ffi apache-tvm-ffi (or crossfuse[jax])",
    )


def require_tvm_ffi_cpp() -> ModuleType:
    """`tvm_ffi.cpp`, which compiles the C++ side of a custom call."""
    return _require("tvm_ffi.cpp", "Compiling a custom call's C++", "pip install apache-tvm-ffi ninja")


def require_cupy() -> ModuleType:
    """`cupy`, for kernels that run on XLA's CUDA stream from Python."""
    return _require("cupy", "A CuPy kernel in JAX", "pip install cupy-cuda13x (or crossfuse[cuda])")


def require_torch() -> ModuleType:
    """`torch`, for exchanging tensors and for FlashInfer's workspaces."""
    return _require("torch", "Exchanging tensors with PyTorch", "pip install torch")
