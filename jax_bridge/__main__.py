"""`python -m jax_bridge generate`: text from a checkpoint, with the fusion decision and the counts.

`python -m jax_bridge parity`: how equal PyTorch and JAX are on a checkpoint, level by level.
"""

from __future__ import annotations

import argparse
import sys
import time

from jax_bridge.llm import LLM
from jax_bridge.parity.run import add_parity
from shared_config import cli


def add_generate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("generate", help="continue prompts")
    cli.add_engine_options(parser)
    parser.add_argument("--prompt", required=True, action="append", metavar="TEXT", help="repeat for a batch")
    cli.add_sampling_options(parser)
    parser.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    params = cli.sampling_params(args)
    with LLM(args.model, **cli.engine_options(args)) as llm:
        print(f"fusion: {'on' if llm.fusion.enabled else 'off'} ({llm.fusion.reason})")
        start = time.perf_counter()
        outputs = llm.generate(args.prompt, params)
        elapsed_s = time.perf_counter() - start
    return cli.print_outputs(outputs, elapsed_s, args.tp)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jax_bridge", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_generate(commands)
    add_parity(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
