"""`python -m core_torch prebuild`: compile every kernel ahead of time, on any machine with nvcc; it needs no GPU."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from core_torch.kernels import flashinfer_modules, native


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
        "--only", action="append", metavar="MODULE", choices=[*native.MODULES, *flashinfer_modules.MODULES]
    )
    parser.set_defaults(run=run_prebuild)


def run_prebuild(args: argparse.Namespace) -> int:
    """Build what is not there yet and print where it lies; 0 when all of it is there."""
    folder = (args.out or native.cache_dir()).expanduser().resolve()
    failed = 0
    for name in args.only or [*native.MODULES, *flashinfer_modules.MODULES]:
        try:
            library = find_or_build(name, args.arch, folder)
            print(f"{library.stat().st_size / 2**20:7.2f} MiB  {library}")
        except RuntimeError as error:
            print(f"error: {name} was not built: {error}", file=sys.stderr)
            failed = 1
    return failed


def find_or_build(name: str, arch: str, folder: Path) -> Path:
    """The library of one module in `folder`; RuntimeError with the compiler's output when it cannot be built."""
    if name in native.MODULES:
        library = folder / native.library_name(name, arch)
        return library if library.is_file() else native.build(name, arch, folder)
    library = flashinfer_modules.library(folder, name, arch)
    if not library.is_file():
        build_flashinfer(name, arch, library)
    return library


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
