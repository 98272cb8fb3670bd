"""`python -m shared_config explain --model DIR ...`: may this run fuse, and why."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from shared_config.explain import OneLineParser, add_arguments, run


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when there is an answer (a "no" is one too), 2 with one line on bad input."""
    parser = OneLineParser(prog="python -m shared_config", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    explain_parser = commands.add_parser(
        "explain", help="every rule of the fusion, for one model and machine"
    )
    add_arguments(explain_parser)
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        explain_parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
