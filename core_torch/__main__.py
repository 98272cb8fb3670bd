"""`python -m core_torch generate`: text from a checkpoint, with the fusion decision and the counts.

`python -m core_torch doctor`: GPUs, links, versions, and a self-test of the fused op.

`python -m core_torch prebuild`: all kernels compiled ahead of time, on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import sys

from core_torch.doctor import add_doctor
from core_torch.llm import LLM
from core_torch.prebuild import add_prebuild
from core_torch.trace import add_trace
from core_torch.worker import RankFailure
from shared_config import cli


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m core_torch", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    cli.add_generate(commands, LLM)
    add_doctor(commands)
    add_prebuild(commands)
    add_trace(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError, RankFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    cli.end_on_sigterm()
    sys.exit(main())
