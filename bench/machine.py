"""What a result was measured on: hardware, versions, switches, source revision, and the rates of `rates.py`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass, replace
from typing import Any

from bench.codec import to_plain
from shared_config import HardwareInfo, probe_flashinfer, probe_hardware

PACKAGES = (
    "torch",
    "triton",
    "jax",
    "jaxlib",
    "flax",
    "transformers",
    "apache-tvm-ffi",
    "jax-tvm-ffi",
    "cupy-cuda13x",
    "numpy",
)
# Switches that change what is measured. None of them holds a path.
FLAGS = (
    "NCCL_NVLS_ENABLE",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NCCL_P2P_DISABLE",
    "NCCL_CUMEM_ENABLE",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST",
    "NVSHMEM_DISABLE_NVLS",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_MODULE_LOADING",
    "CUDA_LAUNCH_BLOCKING",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "OMP_NUM_THREADS",
)


@dataclass(frozen=True)
class Rates:
    """Of one device: memory bytes per second (read + written), products in floating-point operations per second,
    and link bytes per second in each direction (None without two linked devices)."""

    memory_bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float | None

    def shared_by(self, ranks: int) -> Rates:
        """One rank's part, where ranks share one device's memory and cores (CPU)."""
        return replace(
            self, memory_bytes_per_s=self.memory_bytes_per_s / ranks, flops_per_s=self.flops_per_s / ranks
        )


@dataclass(frozen=True)
class Machine:
    hardware: HardwareInfo
    cpu: str
    cores: int
    memory_bytes: int  # of one device
    python: str
    versions: dict[str, str]
    flags: dict[str, str]
    rates: Rates

    @property
    def label(self) -> str:
        """For headings: "2x NVIDIA H200", or "CPU (2 cores)"."""
        gpu = self.hardware
        return f"{gpu.num_gpus}x {gpu.gpu_name}" if gpu.device == "cuda" else f"CPU ({self.cores} cores)"


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """The part of `launch.run_part`; spec: device ("auto", "cpu", "cuda"), dtype."""
    import torch
    import torch.cuda.nccl

    from bench import rates

    hardware = probe_hardware() if spec["device"] != "cpu" else HardwareInfo()
    dtype: torch.dtype = getattr(torch, spec["dtype"])
    device = hardware.device
    measured = Rates(
        memory_bytes_per_s=rates.copy_bytes_per_s(device),
        flops_per_s=rates.matmul_flops_per_s(device, dtype),
        link_bytes_per_s=rates.link_bytes_per_s() if device == "cuda" else None,
    )
    versions = _versions() | {"flashinfer": probe_flashinfer().version}
    if device == "cuda":
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return to_plain(
        Machine(
            hardware=hardware,
            cpu=platform.machine(),
            cores=os.cpu_count() or 1,
            memory_bytes=rates.memory_bytes(device),
            python=platform.python_version(),
            versions=versions,
            flags={name: os.environ[name] for name in FLAGS if name in os.environ},
            rates=measured,
        )
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_revision() -> str:
    """The commit of the sources, with "+changes" when files differ from it; "unknown" outside a checkout."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def git(*arguments: str) -> str:
        answer = subprocess.run(("git", *arguments), cwd=root, capture_output=True, text=True, check=True)
        return answer.stdout.strip()

    try:
        revision = git("rev-parse", "--short=12", "HEAD")
        return revision + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
