"""`python -m bench`: measure, write `result.json` and plots, print tables and, last, one JSON line."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.compare import compare_files
from bench.launch import PartError
from bench.machine import Machine, git_revision
from bench.measuring import measure_kernels, measure_model, measure_op, model_config, probe_machine
from bench.plots import draw, require_matplotlib
from bench.readme import update_readme
from bench.report import print_result, summary
from bench.result import SCHEMA_VERSION, KernelSpec, ModelSpec, OpSpec, Result
from shared_config import cli
from shared_config.presets import PRESETS

TINY = Path(__file__).parents[1] / "tests" / "data" / "tiny-qwen3-next"

# What is measured unless it is asked for, by device. 96 calls are a step of Qwen3-Next-80B-A3B.
OP = {
    "cuda": {"tokens": (1, 8, 64, 512, 2048, 8192), "calls": 96, "repeats": 20},
    "cpu": {"tokens": (1, 8, 64), "calls": 5, "repeats": 5},
}
MODEL = {
    "cuda": {"batches": (1, 8, 32), "lengths": (1024,), "steps": 16, "repeats": 3, "chunk": 8192},
    "cpu": {"batches": (1, 4), "lengths": (32,), "steps": 4, "repeats": 3, "chunk": 512},
}
KERNELS = {
    "cuda": {"batches": (1, 8, 32, 64, 128), "lengths": (1024,), "repeats": 20, "chunk": 8192},
    "cpu": {"batches": (1, 4), "lengths": (32,), "repeats": 3, "chunk": 64},
}
ALL_LAYERS = 12  # of the preset in `all` on GPUs, so that every framework can run and compile it in minutes
PAGE_SIZE = 16


def numbers(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers with commas between them, got {text!r}")
    return values


def frameworks(text: str) -> tuple[str, ...]:
    values = tuple(text.split(","))
    if set(values) - {"torch", "jax", "transformers"}:
        raise argparse.ArgumentTypeError(f"expected some of torch,jax,transformers, got {text!r}")
    return values


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tp", type=int, default=2, metavar="N", help="tensor-parallel ranks (default 2)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, default=None, metavar="N", help="samples of each median")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), metavar="DIR")
    parser.add_argument("--revision", default=None, help="of the sources, where they are no git checkout")


def add_frameworks(parser: argparse.ArgumentParser) -> None:
    everything = ("torch", "jax", "transformers")
    parser.add_argument("--frameworks", type=frameworks, default=everything, metavar=",".join(everything))


def add_op(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=numbers, default=None, metavar="1,8,64")
    parser.add_argument("--hidden", type=int, default=2048, metavar="D")


def add_shapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=None, metavar="DIR", help="a checkpoint folder")
    parser.add_argument("--preset", default=None, choices=sorted(PRESETS), help="a real model's shape")
    parser.add_argument("--batches", type=numbers, default=None, metavar="1,8,32")
    parser.add_argument("--lengths", type=numbers, default=None, metavar="1024", help="of the prompts")
    parser.add_argument("--chunk", type=int, default=None, metavar="N", help="prompt tokens in one pass")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=None, metavar="N", help="of the preset, the first N")
    parser.add_argument("--load-format", default=None, choices=("safetensors", "dummy"))
    parser.add_argument("--decode-steps", type=int, default=None, metavar="N", help="in each repeat")


def op_spec(args: argparse.Namespace, device: str) -> OpSpec:
    defaults = OP[device]
    return OpSpec(
        frameworks=tuple(name for name in args.frameworks if name != "transformers"),
        tp=args.tp,
        tokens=args.tokens or defaults["tokens"],
        hidden_size=args.hidden,
        dtype=args.dtype,
        device=device,
        calls=defaults["calls"],
        repeats=args.repeats or defaults["repeats"],
    )


def check_shapes(args: argparse.Namespace, layers: int | None = None) -> None:
    """Raises ValueError for arguments that name no model: before anything is measured."""
    if args.model is not None or args.preset is not None:
        model_config(args.model, args.preset, layers)


def check_model(args: argparse.Namespace) -> None:
    """The same for `model`."""
    check_shapes(args, args.layers)
    if args.load_format == "safetensors" and args.model is None:
        raise ValueError("--preset has shapes only: use --load-format dummy, or --model with a checkpoint")


def shapes(args: argparse.Namespace, device: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """What `kernels` and `model` ask for alike."""
    return {
        "tp": args.tp,
        "dtype": args.dtype,
        "device": device,
        "batches": args.batches or defaults["batches"],
        "lengths": args.lengths or defaults["lengths"],
        "repeats": args.repeats or defaults["repeats"],
        "max_step_tokens": args.chunk or defaults["chunk"],
        "page_size": PAGE_SIZE,
    }


def model_spec(args: argparse.Namespace, device: str) -> tuple[ModelSpec, str]:
    """The spec, and the checkpoint's folder ("" for a preset)."""
    model, preset, layers = args.model, args.preset, args.layers
    if model is None and preset is None:  # something that every machine of its kind can run
        if device == "cuda":
            preset, layers = "80b", layers or ALL_LAYERS
        else:
            model = TINY
    name, config = model_config(model, preset, layers)
    spec = ModelSpec(
        **shapes(args, device, MODEL[device]),
        name=name,
        hf_config=config,
        frameworks=args.frameworks,
        load_format=args.load_format or ("dummy" if model is None else "safetensors"),
        decode_steps=args.decode_steps or MODEL[device]["steps"],
    )
    return spec, "" if model is None else str(model)


def kernel_spec(args: argparse.Namespace, device: str) -> KernelSpec:
    preset = args.preset or ("80b" if args.model is None and device == "cuda" else None)
    name, config = model_config(args.model or (TINY if preset is None else None), preset, None)
    return KernelSpec(**shapes(args, device, KERNELS[device]), name=preset or name, hf_config=config)


def run_bench(args: argparse.Namespace) -> int:
    require_matplotlib()
    if "model" in args.measures:
        check_model(args)
    elif "kernels" in args.measures:
        check_shapes(args)
    args.out.mkdir(parents=True, exist_ok=True)
    ranks = 1 if args.measures == {"kernels"} else args.tp  # one rank's kernels need one device
    machine: Machine = probe_machine(args.device, args.dtype, ranks)
    device = machine.hardware.device
    result = Result(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        revision=args.revision or git_revision(),
        machine=machine,
        decisions={},
        notes=(),
        op_spec=None,
        op=(),
        model_spec=None,
        model=(),
        kernel_spec=None,
        kernels=(),
    )
    if "kernels" in args.measures:
        kernels = kernel_spec(args, device)
        kernel_rows, notes = measure_kernels(kernels, machine)
        result = replace(result, kernel_spec=kernels, kernels=tuple(kernel_rows), notes=tuple(notes))
        result.save(args.out / "result.json")
    if "op" in args.measures:
        op = op_spec(args, device)
        op_rows, decisions = measure_op(op, machine)
        result = replace(result, op_spec=op, op=tuple(op_rows), decisions=decisions)
        result.save(args.out / "result.json")  # should a later part fail, these minutes are not lost
    if "model" in args.measures:
        model, folder = model_spec(args, device)
        result = replace(result, model_spec=model)
        for framework in model.frameworks:
            alone = replace(model, frameworks=(framework,))
            model_rows, decisions, notes = measure_model(alone, folder, machine)
            result = replace(
                result,
                model=(*result.model, *model_rows),
                decisions=result.decisions | decisions,
                notes=(*result.notes, *notes),
            )
            result.save(args.out / "result.json")
    print_result(result)
    for file in (args.out / "result.json", *draw(result, args.out)):
        print(f"written: {file}")
    print(json.dumps(summary(result)))
    return 0


def run_compare(args: argparse.Namespace) -> int:
    print(json.dumps(compare_files(args.before, args.after)))
    return 0


def run_readme(args: argparse.Namespace) -> int:
    differs = update_readme(check=args.check)
    if differs:
        print("README.md is not what the results say" if args.check else "README.md: tables written")
    return int(differs and args.check)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    op, kernels = (add_frameworks, add_op), (add_shapes,)
    for name, adders, help_text in (
        ("op", op, "the fused op against its alternatives, by number of tokens"),
        (
            "kernels",
            kernels,
            "each own kernel against plain torch, beside its floor; on one device, and for two ranks on two",
        ),
        (
            "model",
            (*kernels, add_frameworks, add_model),
            "prefill and decode, fused and not, in all frameworks, beside the roofline",
        ),
        ("all", (*op, *kernels, add_model), "the three"),
    ):
        command = commands.add_parser(name, help=help_text)
        for add in (add_common, *adders):
            add(command)
        command.set_defaults(run=run_bench, measures={"op", "kernels", "model"} if name == "all" else {name})
    compare = commands.add_parser("compare", help="what changed between two results, beyond their spread")
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")
    compare.set_defaults(run=run_compare)
    readme = commands.add_parser("readme", help="write README's tables from the committed results")
    readme.add_argument("--check", action="store_true", help="only say whether they are up to date")
    readme.set_defaults(run=run_readme)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (PartError, ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    cli.end_on_sigterm()
    sys.exit(main())
