"""`python -m bench`: measure, write `result.json`, print tables and one JSON line."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from bench.codec import from_plain, to_plain
from bench.launch import PartError, run_part
from bench.machine import Machine, git_revision, read_machine
from bench.report import print_result, summary
from bench.result import SCHEMA_VERSION, OpPart, OpRow, OpSpec, Result

TOKENS = {"cuda": (1, 8, 64, 512, 2048), "cpu": (1, 8, 64)}
CALLS = {"cuda": 96, "cpu": 5}  # 96: the reductions of one step of Qwen3-Next-80B-A3B
REPEATS = {"cuda": 20, "cpu": 5}
PART_TIMEOUT_S = 300.0


def numbers(text: str) -> tuple[int, ...]:
    values = tuple(int(part) for part in text.split(","))
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers with commas between them, got {text!r}")
    return values


def frameworks(text: str) -> tuple[str, ...]:
    values = tuple(text.split(","))
    unknown = set(values) - {"torch", "jax"}
    if unknown:
        raise argparse.ArgumentTypeError(f"expected torch, jax or both, got {text!r}")
    return values


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--frameworks", type=frameworks, default=("torch", "jax"), metavar="torch,jax")
    parser.add_argument("--tp", type=int, default=2, metavar="N", help="tensor-parallel ranks (default 2)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--out", type=Path, default=Path("build/bench"), metavar="DIR")
    parser.add_argument("--revision", default=None, help="of the sources, where they are no git checkout")


def add_op(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=numbers, default=None, metavar="1,8,64")
    parser.add_argument("--hidden", type=int, default=2048, metavar="D")
    parser.add_argument("--repeats", type=int, default=None, metavar="N", help="samples for each median")


def probe_machine(args: argparse.Namespace) -> Machine:
    spec = {"device": args.device, "dtype": args.dtype}
    machine = read_machine(run_part("machine", spec, timeout_s=PART_TIMEOUT_S))
    if machine.hardware.device == "cuda" and machine.hardware.num_gpus < args.tp:
        raise ValueError(
            f"--tp {args.tp} needs {args.tp} GPUs, this machine has {machine.hardware.num_gpus}; "
            "use fewer ranks or --device cpu"
        )
    if args.device == "cuda" and machine.hardware.device == "cpu":
        raise ValueError("--device cuda, but torch sees no GPU")
    return machine


def measure_op(args: argparse.Namespace, machine: Machine) -> tuple[OpSpec, list[OpRow], dict[str, str]]:
    """The spec, all frameworks' rows with their link floors, and the fusion decision of each."""
    device = machine.hardware.device
    spec = OpSpec(
        frameworks=args.frameworks,
        tp=args.tp,
        tokens=args.tokens or TOKENS[device],
        hidden_size=args.hidden,
        dtype=args.dtype,
        device=device,
        calls=CALLS[device],
        repeats=args.repeats or REPEATS[device],
    )
    rows, decisions = [], {}
    for framework in spec.frameworks:
        part = from_plain(
            OpPart,
            run_part(
                f"{framework}_op",
                to_plain(spec),
                world_size=spec.tp if framework == "torch" else 1,
                timeout_s=PART_TIMEOUT_S,
                env=part_environment(framework, device, spec.tp),
            ),
        )
        rows += part.rows
        decisions[framework] = part.decision
    link = machine.rates.link_bytes_per_s
    if link is not None:
        rows = [replace(row, floor_us=row.wire_bytes / link * 1e6) for row in rows]
    return spec, rows, decisions


def part_environment(framework: str, device: str, tp: int) -> dict[str, str]:
    """What a part's processes need beyond this one's environment."""
    if device == "cpu":  # ranks and virtual devices share the cores instead of fighting for them
        return {
            "OMP_NUM_THREADS": "1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={tp}",
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
    # A kernel that is loaded on first use waits for the devices, and there a fused kernel waits for its peer.
    return {"CUDA_MODULE_LOADING": "EAGER"} if framework == "jax" else {}


def run_bench(args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    machine = probe_machine(args)
    spec, rows, decisions = measure_op(args, machine)
    result = Result(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        revision=args.revision or git_revision(),
        machine=machine,
        decisions=decisions,
        op_spec=spec,
        op=tuple(rows),
    )
    file = args.out / "result.json"
    result.save(file)
    print_result(result)
    print(f"written: {file}")
    print(json.dumps(summary(result)))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    op = commands.add_parser("op", help="the fused op against its alternatives, by number of tokens")
    add_common(op)
    add_op(op)
    op.set_defaults(run=run_bench)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (PartError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
