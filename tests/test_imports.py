"""One-way imports: shared_config knows no framework, core_torch no JAX, jax_bridge only core_torch's kernels."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported_modules(source: str, package: str, *, at_import_time: bool) -> set[str]:
    """Absolute names that a module imports; `from a import b` counts as `a.b`. Function bodies and
    `if TYPE_CHECKING` blocks do not run at import time."""

    def skip(node: ast.AST) -> bool:
        if not at_import_time:
            return False
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return True
        return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)

    found: set[str] = set()
    queue: list[ast.AST] = [ast.parse(source)]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], base]
                ).strip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names}
        queue += [child for child in ast.iter_child_nodes(node) if not skip(child)]
    return found


def violations(source: str, package: str) -> list[str]:
    top = package.split(".")[0]
    everything = imported_modules(source, package, at_import_time=False)
    first = imported_modules(source, package, at_import_time=True)

    def within(name: str, *modules: str) -> bool:
        return any(name == m or name.startswith(m + ".") for m in modules)

    if top == "shared_config":
        wrong = {n for n in first if within(n, "torch", "jax", "jaxlib", "flax")}
        return sorted(
            wrong | {n for n in everything if within(n, "core_torch", "jax_bridge", "bench", "tests")}
        )
    if top == "core_torch":
        return sorted(
            n for n in everything if within(n, "jax", "jaxlib", "flax", "jax_bridge", "bench", "tests")
        )
    if top == "jax_bridge":
        core = {n for n in everything if within(n, "core_torch") and not within(n, "core_torch.kernels")}
        return sorted(core | {n for n in everything if within(n, "bench", "tests")})
    return []


FILES = sorted(p for top in ("shared_config", "core_torch", "jax_bridge") for p in (ROOT / top).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    assert violations(path.read_text(), package) == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("shared_config", "import torch"),
        ("shared_config", "from jax import numpy"),
        ("shared_config", "def f():\n    from core_torch import LLM"),
        ("core_torch", "import jax.numpy as jnp"),
        ("core_torch.kernels", "def f():\n    import jax_bridge"),
        ("jax_bridge", "import core_torch"),
        ("jax_bridge", "from core_torch import LLM"),
        ("jax_bridge.layers", "from core_torch.layers import norm"),
        ("core_torch.layers", "from ...jax_bridge import op"),
    ],
)
def test_the_walk_finds_a_wrong_import(package: str, source: str) -> None:
    assert violations(source, package)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("shared_config", "def probe():\n    import torch"),
        ("shared_config", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("jax_bridge", "from core_torch.kernels.votes import vote"),
        ("jax_bridge", "from core_torch import kernels"),
        ("core_torch", "import torch"),
    ],
)
def test_the_walk_lets_right_imports_pass(package: str, source: str) -> None:
    assert violations(source, package) == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("shared_config", ("torch", "jax", "flashinfer")),
        ("core_torch.kernels", ("jax", "core_torch.llm", "core_torch.session", "core_torch.parallel")),
        (
            "core_torch.kernels.startup",
            ("jax", "core_torch.llm", "core_torch.session", "core_torch.parallel"),
        ),
    ],
)
def test_importing_stays_light(module: str, absent: tuple[str, ...]) -> None:
    """In a fresh interpreter: what importing `module` must not bring along."""
    code = f"import sys, {module}; print(*[m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == []
