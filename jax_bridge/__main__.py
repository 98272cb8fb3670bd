"""`python -m jax_bridge generate`: text from a checkpoint, with the fusion decision and the counts.

`python -m jax_bridge parity`: how equal PyTorch and JAX are on a checkpoint, level by level.
"""

from __future__ import annotations

import argparse
import sys

from jax_bridge.llm import LLM
from jax_bridge.parity.run import add_parity
from shared_config import cli


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jax_bridge", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    cli.add_generate(commands, LLM)
    add_parity(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    cli.end_on_sigterm()
    sys.exit(main())
