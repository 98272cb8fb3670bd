"""Compiles the C++ files of this folder once per machine and loads them.

The library lies in `$CROSSFUSE_CACHE_DIR` (default `~/.cache/crossfuse`) under a hash of its source, the TVM-FFI
version and the machine's architecture, so a second process only loads it and needs neither compiler nor ninja.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
import threading
from pathlib import Path
from typing import Any

from jax_bridge.packages import require_jax_tvm_ffi, require_tvm_ffi_cpp

_loaded: dict[str, Any] = {}
_lock = threading.Lock()


def cache_dir() -> Path:
    return Path(os.environ.get("CROSSFUSE_CACHE_DIR", "~/.cache/crossfuse")).expanduser()


def load(name: str) -> Any:
    """The TVM-FFI module compiled from `<name>.cc`: the same object on every call in a process.

    Raises ImportError when a package is missing, RuntimeError with the compiler's output when the build fails.
    """
    with _lock:
        if name not in _loaded:
            _loaded[name] = _load(name)
        return _loaded[name]


def _load(name: str) -> Any:
    require_jax_tvm_ffi()
    import tvm_ffi

    source = Path(__file__).with_name(f"{name}.cc")
    key = f"{tvm_ffi.__version__} {platform.machine()} {source.read_text()}"
    folder = cache_dir() / hashlib.sha256(key.encode()).hexdigest()[:16]
    library = folder / f"{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Built aside and moved into place: several processes may start at once.
        with tempfile.TemporaryDirectory(dir=folder) as build:
            built = require_tvm_ffi_cpp().build(name, sources=[str(source)], build_directory=build)
            os.replace(built, library)
    return tvm_ffi.load_module(str(library))
