"""The compiled kernels of `csrc`: found prebuilt, or compiled on first use, which is announced.

A library is named by what it was made from (its source, the GPU architecture, TVM-FFI's version), so one that does not
fit is never found. It is looked for in `$CROSSFUSE_PREBUILT_DIR` (made by `python -m core_torch prebuild --out`), then
in `$CROSSFUSE_CACHE_DIR` (default `~/.cache/crossfuse`), where compiled ones are kept. The modules are TVM-FFI's: the
same binary serves torch, JAX and every Python version, and runs on the caller's current stream.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CSRC = Path(__file__).with_name("csrc")
MODULES = (
    "add_norm",
    "cubin",
    "few_rows",
    "gdn_decode",
    "moe_decode",
    "norm_rope",
    "paged_decode",
    "pair_allreduce",
    "vocabulary",
)
PREBUILT_VARIABLE, CACHE_VARIABLE = "CROSSFUSE_PREBUILT_DIR", "CROSSFUSE_CACHE_DIR"
MIN_SM = 90  # clusters and programmatic dependent launch
LITTLE_SHARED_MEMORY = 12  # the compute capability of GPUs that are newer and cannot hold the kernels' tiles

_loaded: dict[tuple[str, str], Any] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Answer:
    """Whether a compiled kernel can be used, and why not."""

    usable: bool
    reason: str = ""


def first_failure(*checks: tuple[bool, str]) -> Answer:
    """The reason of the first check that does not hold."""
    return next((Answer(False, reason) for holds, reason in checks if not holds), Answer(True))


def check_device(device: torch.device) -> Answer:
    """Whether compiled kernels run on `device` at all."""
    if device.type != "cuda":
        return Answer(False, f"compiled kernels need a CUDA GPU, and this is {device}")
    major, minor = torch.cuda.get_device_capability(device)
    return first_failure(
        (
            10 * major + minor >= MIN_SM,
            f"compiled kernels need SM{MIN_SM} or newer, this GPU is SM{major}{minor}",
        ),
        (
            major != LITTLE_SHARED_MEMORY,
            f"compiled kernels need 227 KiB of shared memory a block, and SM{major}{minor} has 99",
        ),
        (importlib.util.find_spec("tvm_ffi") is not None, "apache-tvm-ffi is not installed"),
    )


def device_arch(device: torch.device) -> str:
    """The architecture to compile for, as TVM-FFI and FlashInfer write it: "9.0a" on Hopper."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}a"


def require_tvm_ffi(module: str = "tvm_ffi") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"Compiled kernels need the package `{module}`: pip install apache-tvm-ffi ninja (or crossfuse[cuda])"
        ) from error


def cuda_home() -> str:
    """$CUDA_HOME or $CUDA_PATH, the usual folder, or where nvcc really lies."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    usual, nvcc = Path("/usr/local/cuda"), shutil.which("nvcc")
    if named or usual.exists() or nvcc is None:
        return named or str(usual)
    return str(Path(nvcc).resolve().parent.parent)


def cache_dir() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE, "~/.cache/crossfuse")).expanduser()


def search_folders() -> list[Path]:
    """Where libraries are looked for, in this order."""
    prebuilt = os.environ.get(PREBUILT_VARIABLE)
    return [*([Path(prebuilt).expanduser()] if prebuilt else []), cache_dir()]


def library_name(name: str, arch: str) -> str:
    """The file that module `name` for GPU architecture `arch` has in every folder."""
    if name not in MODULES:
        raise ValueError(f"no compiled kernel module is called {name!r}; there are {', '.join(MODULES)}")
    made_from = hashlib.sha256(f"{require_tvm_ffi().__version__} {platform.machine()}".encode())
    for source in (*sorted(CSRC.glob("*.cuh")), CSRC / f"{name}.cu"):
        made_from.update(source.read_bytes())
    return f"{name}-sm{arch.replace('.', '')}-{made_from.hexdigest()[:12]}.so"


def find(name: str, arch: str) -> Path | None:
    """The prebuilt or cached library, or None."""
    return find_file(library_name(name, arch))


def find_file(file: str) -> Path | None:
    return next((folder / file for folder in search_folders() if (folder / file).is_file()), None)


def find_or_make(file: str, lock: str, make: Callable[[Path], Path]) -> Path:
    """The prebuilt or cached file, or what `make` puts into the cache's folder; processes that start together wait for
    the first one's."""
    found = find_file(file)
    if found is None:
        with _one_process(cache_dir() / f"{lock}.lock"):
            found = find_file(file) or make(cache_dir())
    return found


def build(name: str, arch: str, folder: Path) -> Path:
    """Compile module `name` for `arch` into `folder` (needs nvcc, no GPU), saying so on stderr.

    Raises RuntimeError with the compiler's output when that fails.
    """
    library = folder / library_name(name, arch)
    folder.mkdir(parents=True, exist_ok=True)
    cpp = require_tvm_ffi("tvm_ffi.cpp")
    print(f"crossfuse: compiling {name} for SM {arch} into {folder} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    # Built aside and moved into place: another process may load it at any time.
    with tempfile.TemporaryDirectory(dir=folder) as aside, _environment(arch):
        built = cpp.build(name, sources=[str(CSRC / f"{name}.cu")], build_directory=aside, backend="cuda")
        os.replace(built, library)
    print(f"crossfuse: compiled {name} in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return library


def check_library(name: str, device: torch.device) -> Answer:
    """Whether module `name` can be loaded on `device`: it is there, or nvcc is."""
    arch, nvcc = device_arch(device), Path(cuda_home(), "bin", "nvcc")
    return first_failure(
        (
            find(name, arch) is not None or nvcc.is_file(),
            f"{name} is not prebuilt for SM {arch}, and there is no {nvcc} to compile it; make it elsewhere with "
            f"`python -m core_torch prebuild --arch {arch}` and name its folder in {PREBUILT_VARIABLE}",
        )
    )


def load(name: str, device: torch.device) -> Any:
    """The module, found or compiled (about ten seconds): the same object on every call in a process."""
    return _load(name, device_arch(device))


def _load(name: str, arch: str) -> Any:
    with _lock:
        if (name, arch) not in _loaded:
            path = find_or_make(library_name(name, arch), name, functools.partial(build, name, arch))
            _loaded[name, arch] = require_tvm_ffi().load_module(str(path))
        return _loaded[name, arch]


@functools.cache
def function(name: str, device: torch.device, of: str | None = None) -> Any:
    """TVM-FFI function `name` of the module `of` (default: of the same name)."""
    return getattr(load(of or name, device), name)


def ahead_operands(ahead: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The last two operands of a kernel that fetches what later kernels read (`fetch_ahead` in csrc/device.cuh)."""
    if len(ahead) > 2:
        raise ValueError(f"at most two tensors can be fetched ahead, got {len(ahead)}")
    first, second = (*ahead, None, None)[:2]
    return first, second


@contextmanager
def _environment(arch: str) -> Iterator[None]:
    """TVM-FFI takes the architecture, and finds CUDA and ninja, through environment variables only."""
    values = {
        "CUDA_HOME": cuda_home(),
        "TVM_FFI_CUDA_ARCH_LIST": arch,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _one_process(lock: Path) -> Iterator[None]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
