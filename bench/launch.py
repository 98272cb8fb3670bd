"""Runs one part of the benchmark in processes of its own, with a deadline.

Every framework gets fresh processes, so the memory of one is never missing in another, and a part that hangs or
dies is an error with its reason, never a silent gap in the table.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
POLL_S = 0.05
GRACE_S = 5.0  # for the peers of a rank that failed, to say what they saw


class PartError(RuntimeError):
    """A rank of a part raised, died or was late. The message has the rank and its reason."""


def run_part(
    module: str, spec: Any, *, world_size: int = 1, timeout_s: float, env: dict[str, str] | None = None
) -> Any:
    """`run(spec)` of `module` on `world_size` ranks; returns what rank 0 returned (plain JSON values).

    Ranks find each other by torch's environment variables. Raises PartError within `timeout_s`.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        spec_file = Path(folder) / "spec.json"
        spec_file.write_text(json.dumps(spec))
        answers = [Path(folder) / f"rank{rank}.json" for rank in range(world_size)]
        port = _free_port()
        ranks = []
        try:
            for rank, answer in enumerate(answers):
                command = [sys.executable, "-m", "bench.part", module, str(spec_file), str(answer)]
                ranks.append(subprocess.Popen(command, env=_environment(rank, world_size, port, env)))
            _wait(module, ranks, answers, timeout_s)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return json.loads(answers[0].read_text())["result"]


def _environment(rank: int, world_size: int, port: int, extra: dict[str, str] | None) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **(extra or {}),
    }


def _wait(module: str, ranks: list[subprocess.Popen[bytes]], answers: list[Path], timeout_s: float) -> None:
    """Returns when all ranks have ended well, raises PartError otherwise."""
    deadline = time.monotonic() + timeout_s
    failed_at: float | None = None
    while any(process.poll() is None for process in ranks):
        now = time.monotonic()
        if any(process.poll() for process in ranks):
            failed_at = failed_at or now
            if now > failed_at + GRACE_S:
                break
        elif now > deadline:
            late = [rank for rank, process in enumerate(ranks) if process.poll() is None]
            raise PartError(f"{module}: ranks {late} gave no answer in {timeout_s:g} s")
        time.sleep(POLL_S)
    failures = [
        f"rank {rank}: {_reason(process, answer)}"
        for rank, (process, answer) in enumerate(zip(ranks, answers, strict=True))
        if process.poll()
    ]
    if failures:
        raise PartError(f"{module}: " + "\n".join(failures))


def _reason(process: subprocess.Popen[bytes], answer: Path) -> str:
    if answer.exists():
        return json.loads(answer.read_text())["error"]
    code = process.returncode
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code} and without an answer"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
