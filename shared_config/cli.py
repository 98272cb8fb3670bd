"""The `generate` command of both engines: options, the run, and how results are printed."""

from __future__ import annotations

import argparse
import functools
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from shared_config.decision import FusionDecision
from shared_config.results import RequestOutput
from shared_config.sampling import SamplingParams


class Engine(Protocol):
    """What the command uses of either framework's `LLM`."""

    fusion: FusionDecision

    def generate(self, prompts: list[str], params: SamplingParams) -> list[RequestOutput]: ...


def end_on_sigterm() -> None:
    """SIGTERM (as `timeout` sends) then ends the program as an exception does, and the processes that it started."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def add_generate(
    commands: argparse._SubParsersAction, llm: Callable[..., AbstractContextManager[Any]]
) -> None:
    """The `generate` command of the engine whose `LLM` class is given."""
    parser = commands.add_parser("generate", help="continue prompts")
    add_engine_options(parser)
    add_layout_options(parser)
    parser.add_argument("--prompt", required=True, action="append", metavar="TEXT", help="repeat for a batch")
    add_sampling_options(parser)
    parser.set_defaults(run=functools.partial(_generate, llm))


def _generate(llm: Callable[..., AbstractContextManager[Engine]], args: argparse.Namespace) -> int:
    params = sampling_params(args)
    with llm(args.model, **engine_options(args), **layout_options(args)) as engine:
        print(f"fusion: {'on' if engine.fusion.enabled else 'off'} ({engine.fusion.reason})")
        start = time.perf_counter()
        outputs = engine.generate(args.prompt, params)
        elapsed_s = time.perf_counter() - start
    return print_outputs(outputs, elapsed_s, args.tp)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of `LLM`."""
    parser.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face checkpoint folder")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks (default 1)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--fusion", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--backend", default="auto", choices=("auto", "trtllm", "mnnvl", "reference"))
    parser.add_argument("--allow-multicast", action="store_true")
    parser.add_argument("--deterministic", action="store_true")


def add_layout_options(parser: argparse._ActionsContainer) -> None:
    """How the `--tp` ranks are cut, where it is not plain tensor parallelism."""
    parser.add_argument("--cp", type=int, default=1, metavar="N", help="attention context-parallel size")
    parser.add_argument(
        "--dp",
        "--dp-attention",
        type=int,
        nargs="?",
        default=1,
        const=0,
        metavar="N",
        help="attention data-parallel size; without N one copy per rank (tp / cp)",
    )
    parser.add_argument("--ep", type=int, default=1, metavar="N", help="expert-parallel size")
    parser.add_argument("--moe-dp", type=int, default=1, metavar="N", help="MoE data-parallel size")


def layout_options(args: argparse.Namespace) -> dict[str, int]:
    """Keywords for `LLM` and `ParallelLayout`: the sizes of the axes that were asked for."""
    sizes = {
        "attn_cp_size": args.cp,
        "attn_dp_size": args.dp or max(args.tp // max(args.cp, 1), 1),
        "moe_dp_size": args.moe_dp,
        "ep_size": args.ep,
    }
    return {name: size for name, size in sizes.items() if size != 1}


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords for `LLM`, but for the model's folder."""
    return {
        "tensor_parallel_size": args.tp,
        "fusion": args.fusion,
        "deterministic": args.deterministic,
        "dtype": args.dtype,
        "device": args.device,
        "backend": args.backend,
        "allow_multicast": args.allow_multicast,
    }


def engine_arguments(args: argparse.Namespace) -> list[str]:
    """The command line that `add_engine_options` reads `args` from."""
    flags = ("model", "tp", "device", "dtype", "fusion", "backend")
    switches = ("allow_multicast", "deterministic")
    return [f"--{name}={getattr(args, name)}" for name in flags] + [
        f"--{name.replace('_', '-')}" for name in switches if getattr(args, name)
    ]


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
    )


def print_outputs(outputs: list[RequestOutput], elapsed_s: float, ranks: int) -> int:
    """Print each text with its counts, and the speed; 1 when a request was refused."""
    for output in outputs:
        if output.error:
            print(f"--- {output.prompt!r} was refused: {output.error}", file=sys.stderr)
            continue
        print(
            f"--- [{output.finish_reason}, {len(output.token_ids)} tokens; reductions: {output.reductions}]"
        )
        print(f"{output.prompt}{output.text}")
    count = sum(len(output.token_ids) for output in outputs)
    print(f"--- {count} tokens in {elapsed_s:.2f} s, {count / elapsed_s:.1f} tokens/s over {ranks} rank(s)")
    return 1 if any(output.error for output in outputs) else 0
