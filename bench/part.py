"""One rank of one part: `python -m bench.part MODULE SPEC.json ANSWER.json`, started by `launch.run_part`."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path


def main(module: str, spec_file: str, answer_file: str) -> int:
    spec = json.loads(Path(spec_file).read_text())
    try:
        answer = {"result": importlib.import_module(module).run(spec)}
    except Exception:  # told to the parent, which raises it
        answer = {"error": traceback.format_exc()}
    Path(answer_file).write_text(json.dumps(answer))
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
