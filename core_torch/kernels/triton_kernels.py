"""The kernels written in Triton (`jit`): machine code for a model's sizes, called through TVM-FFI as those of csrc are.

A kernel's file is named by what it was made from, and looked for where csrc's libraries are (`native`): what
`python -m core_torch prebuild` made, or what was compiled on first use, which is announced. Triton itself is needed to
compile, not to run, and the same code serves torch and JAX.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core_torch.kernels import native
from core_torch.kernels.native import Answer, first_failure

JIT = "core_torch.kernels.jit"
MODULES = ("gdn_prefill", "moe_prefill")
LAUNCHER = "cubin"  # of csrc
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs kernels itself, on a CPU
POINTERS = {"bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32", "int64": "*i64"}
SCALARS = {"i32": "i", "fp32": "f"}  # as csrc/cubin.cu knows them
Scalar = int | float


@dataclass(frozen=True)
class Launch:
    """How kernel `name` of jit's `module` is run: its grid, and the sizes that it is compiled for."""

    module: str
    name: str
    grid: tuple[int, int]
    sizes: dict[str, int]
    warps: int = 4
    stages: int = 3
    registers: int | None = None  # of a thread, at most
    ready: dict[Any, Any] = field(
        default_factory=dict, repr=False, compare=False
    )  # functions, by operands' types

    def kernel(self, dtypes: Sequence[str], scalars: Sequence[Scalar]) -> Kernel:
        """For tensors of these dtypes ("bfloat16"), and scalars behind them."""
        types = [POINTERS[dtype] for dtype in dtypes]
        types += ["fp32" if isinstance(x, float) else "i32" for x in scalars]
        sizes = tuple(self.sizes.items())
        return Kernel(self.module, self.name, tuple(types), sizes, self.warps, self.stages, self.registers)


@dataclass(frozen=True)
class Kernel:
    """A kernel of `jit` and all that its machine code depends on, but the GPU.

    `types` are its operands', tensors first, as Triton writes them; `sizes` the constants that it is compiled for.
    """

    module: str
    name: str
    types: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]
    warps: int
    stages: int
    registers: int | None

    @property
    def num_tensors(self) -> int:
        return sum(kind.startswith("*") for kind in self.types)

    @property
    def scalars(self) -> str:
        return "".join(SCALARS[kind] for kind in self.types[self.num_tensors :])

    def file_name(self, arch: str) -> str:
        """The file that holds it for GPU architecture `arch`, in every folder."""
        source = Path(__file__).with_name("jit") / f"{self.module}.py"
        made_from = hashlib.sha256(source.read_bytes() + repr(self).encode())
        return f"{self.module}-{self.name}-sm{arch.replace('.', '')}-{made_from.hexdigest()[:12]}.json"


def check_triton(device: torch.device) -> Answer:
    """Whether these kernels run on `device` at all."""
    if _recorded is not None:
        return Answer(True)  # they will, elsewhere
    answer = native.check_device(device)
    if not answer.usable:
        return answer
    launcher = native.check_library(LAUNCHER, device)
    arch = native.device_arch(device)
    prebuilt = (
        folder.glob(f"*_prefill-*-sm{arch.replace('.', '')}-*.json") for folder in native.search_folders()
    )
    return first_failure(
        (launcher.usable, launcher.reason),
        (
            importlib.util.find_spec("triton") is not None or any(any(files) for files in prebuilt),
            "triton is not installed, and no kernels were prebuilt",
        ),
    )


def launch(how: Launch, *operands: Tensor | Scalar) -> None:
    """Run a kernel on its operands, tensors first, each at a multiple of 16 bytes (or it is a ValueError).

    Raises ImportError, with what to install, for a kernel that was not compiled before and cannot be now.
    """
    assert isinstance(operands[0], Tensor)
    device = operands[0].device
    types = (device, *[x.dtype if isinstance(x, Tensor) else type(x) for x in operands])
    run = how.ready.get(types)
    if run is None:
        tensors = [x for x in operands if isinstance(x, Tensor)]
        scalars = [x for x in operands if not isinstance(x, Tensor)]
        kernel = how.kernel([str(x.dtype).removeprefix("torch.") for x in tensors], scalars)
        if _recorded is not None:
            _recorded[kernel] = None
            return
        if INTERPRETED:
            module = importlib.import_module(f"{JIT}.{how.module}")
            getattr(module, how.name)[how.grid](*operands, **how.sizes)
            return
        run = how.ready[types] = function(kernel, device)
    run(*operands, *how.grid)


_recorded: dict[Kernel, None] | None = None


@contextmanager
def recording() -> Iterator[dict[Kernel, None]]:
    """Collects the kernels that are launched inside, once each, instead of running them."""
    global _recorded
    before, _recorded = _recorded, {}
    try:
        yield _recorded
    finally:
        _recorded = before


@functools.cache
def function(
    kernel: Kernel,
    device: torch.device,
    num_operands: int | None = None,
    order: tuple[int, ...] | None = None,
    same: tuple[int, ...] = (),
) -> Any:
    """A TVM-FFI function of (tensors, scalars, the grid's x and y); found or compiled.

    By default the tensors are the kernel's own. `order` says which of `num_operands` they are, `same` which pairs of
    those must be one buffer.
    """
    arch = native.device_arch(device)
    made = json.loads(
        native.find_or_make(
            kernel.file_name(arch), kernel.module, functools.partial(build, kernel, arch)
        ).read_text()
    )
    return native.function("load", device, of=LAUNCHER)(
        base64.b64decode(made["cubin"]),
        made["name"],
        made["threads"],
        made["shared_bytes"],
        made["unused"],
        kernel.scalars,
        kernel.num_tensors if num_operands is None else num_operands,
        tuple(range(kernel.num_tensors)) if order is None else order,
        same,
    )


def build(kernel: Kernel, arch: str, folder: Path) -> Path:
    """Compile `kernel` for `arch` into `folder` (needs Triton, no GPU), saying so on stderr."""
    triton = _require_triton()
    compiler, backend = (
        importlib.import_module(f"triton.{name}") for name in ("compiler", "backends.compiler")
    )
    start = time.perf_counter()
    source = getattr(importlib.import_module(f"{JIT}.{kernel.module}"), kernel.name)
    sizes, types = dict(kernel.sizes), iter(kernel.types)
    signature = {name: "constexpr" if name in sizes else next(types) for name in source.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(source.arg_names)
        if signature[name].startswith("*")
    }
    major, minor = re.findall(r"\d+", arch)
    compiled = triton.compile(
        compiler.ASTSource(source, signature, constexprs=sizes, attrs=aligned),
        target=backend.GPUTarget("cuda", 10 * int(major) + int(minor), 32),
        options={
            "num_warps": kernel.warps,
            "num_stages": kernel.stages,
            "maxnreg": kernel.registers,
        },
    )
    metadata = compiled.metadata
    if metadata.global_scratch_size:
        raise RuntimeError(f"Triton wants scratch memory for {kernel}, which nobody gives it")
    parameters = re.search(r"\.entry [^(]*\(([^)]*)\)", compiled.asm["ptx"])
    assert parameters is not None
    made = {
        "name": metadata.name,
        "threads": 32 * metadata.num_warps,
        "shared_bytes": metadata.shared,
        "unused": parameters[1].count(".param") - len(kernel.types),  # pointers that Triton adds
        "triton": triton.__version__,
        "cubin": base64.b64encode(compiled.asm["cubin"]).decode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / kernel.file_name(arch)
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as aside:
        json.dump(made, aside)
    os.replace(aside.name, file)  # whole or not at all: another process may load it at any time
    took_s = time.perf_counter() - start
    print(f"crossfuse: Triton compiled {kernel.name} in {took_s:.1f} s", file=sys.stderr, flush=True)
    return file


def _require_triton() -> Any:
    try:
        return importlib.import_module("triton")
    except ImportError as error:
        raise ImportError(
            "Kernels of prefill that are not prebuilt need the package `triton`: pip install triton, or "
            "`python -m core_torch prebuild` elsewhere"
        ) from error
