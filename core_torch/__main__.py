"""`python -m core_torch generate`: text from a checkpoint, with the fusion decision and the counts.

`python -m core_torch doctor`: GPUs, links, versions, and a self-test of the fused op.
"""

from __future__ import annotations

import argparse
import sys
import time

from core_torch.doctor import add_doctor
from core_torch.llm import LLM
from core_torch.worker import RankFailure
from shared_config.sampling import SamplingParams


def add_generate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("generate", help="continue prompts")
    parser.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face checkpoint folder")
    parser.add_argument("--prompt", required=True, action="append", metavar="TEXT", help="repeat for a batch")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks (default 1)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--fusion", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--backend", default="auto", choices=("auto", "trtllm", "mnnvl", "reference"))
    parser.add_argument("--allow-multicast", action="store_true")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT")
    parser.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
    )
    with LLM(
        args.model,
        args.tp,
        fusion=args.fusion,
        deterministic=args.deterministic,
        dtype=args.dtype,
        device=args.device,
        backend=args.backend,
        allow_multicast=args.allow_multicast,
    ) as llm:
        print(f"fusion: {'on' if llm.fusion.enabled else 'off'} ({llm.fusion.reason})")
        start = time.perf_counter()
        outputs = llm.generate(args.prompt, params)
        elapsed_s = time.perf_counter() - start
    for output in outputs:
        if output.error:
            print(f"--- {output.prompt!r} was refused: {output.error}", file=sys.stderr)
            continue
        print(
            f"--- [{output.finish_reason}, {len(output.token_ids)} tokens; reductions: {output.reductions}]"
        )
        print(f"{output.prompt}{output.text}")
    count = sum(len(output.token_ids) for output in outputs)
    print(f"--- {count} tokens in {elapsed_s:.2f} s, {count / elapsed_s:.1f} tokens/s over {args.tp} rank(s)")
    return 1 if any(output.error for output in outputs) else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m core_torch", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_generate(commands)
    add_doctor(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, RankFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
