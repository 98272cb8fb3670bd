"""`python -m core_torch prebuild`: compile every kernel ahead of time, on any machine with nvcc; it needs no GPU.

The kernels of csrc and FlashInfer's serve all models. Those in Triton are compiled for a model's sizes on one rank,
which its layers are asked for on the meta device.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core_torch.kernels import flashinfer_modules, native, triton_kernels
from core_torch.kernels.choice import KernelOptions, choose_kernels
from core_torch.layers.mlp import SparseMoE
from core_torch.models.qwen3_next import Qwen3Next
from core_torch.pieces import Pieces
from core_torch.weights import materialize
from shared_config import ParallelLayout, Qwen3NextConfig
from shared_config.presets import PRESETS


def add_prebuild(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("prebuild", help="compile all kernels ahead of time, without a GPU")
    parser.add_argument("--arch", required=True, help="GPU architecture: 9.0a for H100 and H200")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="DIR",
        help=f"to be named in {native.PREBUILT_VARIABLE} where the engine runs (default: {native.cache_dir()}, "
        "which is searched anyway)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=None,
        metavar="DIR",
        help="whose sizes the kernels of prefill are compiled for (default: those of Qwen3-Next-80B-A3B)",
    )
    parser.add_argument("--tp", type=int, default=2, metavar="N", help="and for this many ranks (default 2)")
    everything = [*native.MODULES, *triton_kernels.MODULES, *flashinfer_modules.MODULES]
    parser.add_argument("--only", action="append", metavar="MODULE", choices=everything)
    parser.set_defaults(run=run_prebuild, everything=everything)


def run_prebuild(args: argparse.Namespace) -> int:
    """Build what is not there yet and print where it lies; 0 when all of it is there."""
    folder = (args.out or native.cache_dir()).expanduser().resolve()
    config = Qwen3NextConfig.from_hf(args.model or PRESETS["80b"])
    failed = 0
    for name in args.only or args.everything:
        try:
            for file in find_or_build(name, args.arch, folder, config, args.tp):
                print(f"{file.stat().st_size / 2**20:7.2f} MiB  {file}")
        except RuntimeError as error:
            print(f"error: {name} was not built: {error}", file=sys.stderr)
            failed = 1
    return failed


def find_or_build(name: str, arch: str, folder: Path, config: Qwen3NextConfig, tp: int) -> Iterator[Path]:
    """The files of one module in `folder`; RuntimeError with the compiler's output when one cannot be built."""
    if name in native.MODULES:
        library = folder / native.library_name(name, arch)
        yield library if library.is_file() else native.build(name, arch, folder)
    elif name in triton_kernels.MODULES:
        for kernel in prefill_kernels(config, tp):
            if kernel.module == name:
                file = folder / kernel.file_name(arch)
                yield file if file.is_file() else triton_kernels.build(kernel, arch, folder)
    else:
        library = flashinfer_modules.library(folder, name, arch)
        if not library.is_file():
            build_flashinfer(name, arch, library)
        yield library


@dataclass(frozen=True)
class _Ranks:
    """As much of a group as shapes depend on."""

    size: int
    rank: int = 0

    def agree(self, name: str, answer: native.Answer) -> native.Answer:
        del name
        return answer


def prefill_kernels(config: Qwen3NextConfig, tp: int) -> list[triton_kernels.Kernel]:
    """What either framework's engine runs for this model, in bfloat16 on one of `tp` ranks."""
    group: Any = _Ranks(tp)
    alone: Any = _Ranks(1)
    meta = torch.device("meta")
    with meta:
        model = Qwen3Next(config, group, group, Pieces(ParallelLayout(tp), *[alone] * 5))
    materialize(model, torch.bfloat16, meta)
    with triton_kernels.recording() as kernels:
        choose_kernels(model.modules(), KernelOptions(torch.bfloat16, meta, max_num_seqs=1))
        for layer in model.modules():
            if isinstance(layer, SparseMoE):
                layer.part_with_shared()  # JAX's shared expert is always apart
        choose_kernels(model.modules(), KernelOptions(torch.bfloat16, meta, max_num_seqs=1))
    return list(kernels)


def build_flashinfer(name: str, arch: str, library: Path) -> None:
    """Compile a FlashInfer module with its own generator (minutes)."""
    print(f"crossfuse: compiling FlashInfer's {name} for SM {arch}, which takes minutes ...", file=sys.stderr)
    start = time.perf_counter()
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as aside:
        environment = {
            **os.environ,
            "CUDA_HOME": native.cuda_home(),
            "FLASHINFER_CUDA_ARCH_LIST": arch,
            "FLASHINFER_WORKSPACE_BASE": aside,
            "LIBRARY_PATH": os.pathsep.join([_driver_stub(Path(aside)), os.environ.get("LIBRARY_PATH", "")]),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
        environment.pop("FLASHINFER_JIT_VERBOSE", None)  # it switches optimisation off
        code = (
            f"from {flashinfer_modules.MODULES[name]} import gen_{name}_module as generate\n"
            "spec = generate()\nspec.build()\nprint(spec.jit_library_path)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise RuntimeError(
                f"FlashInfer's {name} was not built (exit {done.returncode}); its output is above"
            )
        os.replace(done.stdout.split()[-1], library)
    print(f"crossfuse: compiled {name} in {time.perf_counter() - start:.0f} s", file=sys.stderr)


def _driver_stub(folder: Path) -> str:
    """A folder with an empty libcuda to link with: the driver's library is absent where there is no GPU."""
    command = ["gcc", "-shared", "-o", str(folder / "libcuda.so"), "-x", "c", "/dev/null"]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], check=True)
    return str(folder)
