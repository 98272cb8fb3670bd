"""FlashInfer's compiled modules: where `prebuild` puts them, and how FlashInfer is told.

FlashInfer compiles a module on first use unless it finds `<its aot folder>/<module>/<module>.so`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from core_torch.kernels.native import search_folders

MODULES = {"trtllm_comm": "flashinfer.jit.comm"}  # module -> where its generator `gen_<module>_module` is


def aot_folder(folder: Path, arch: str) -> Path:
    """Inside `folder`, what FlashInfer's aot folder may be set to: for this version and architecture alone."""
    version = importlib.metadata.version("flashinfer-python")
    return folder / f"flashinfer-{version}-sm{arch.replace('.', '')}"


def library(folder: Path, name: str, arch: str) -> Path:
    return aot_folder(folder, arch) / name / f"{name}.so"


def use_prebuilt(name: str, arch: str) -> Path | None:
    """Make FlashInfer load the prebuilt `name`, if it lies in a searched folder, and return its path.

    Otherwise says on stderr that FlashInfer is about to compile it, unless FlashInfer has it.
    """
    env: Any = importlib.import_module("flashinfer.jit.env")
    own = Path(env.FLASHINFER_AOT_DIR) / name / f"{name}.so"
    if own.is_file():
        return own
    for folder in search_folders():
        found = library(folder, name, arch)
        if found.is_file():
            env.FLASHINFER_AOT_DIR = aot_folder(
                folder, arch
            )  # FlashInfer's own way: it reads the attribute late
            return found
    if not (Path(env.FLASHINFER_JIT_DIR) / name / f"{name}.so").is_file():
        print(
            f"crossfuse: FlashInfer compiles {name} for SM {arch} on first use, about 5 minutes; "
            f"`python -m core_torch prebuild --arch {arch}` does it ahead of time",
            file=sys.stderr,
            flush=True,
        )
    return None
