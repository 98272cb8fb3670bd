"""Both engines on one job. PyTorch's runs first, in a process of its own, so that each framework has the GPUs alone."""

from __future__ import annotations

import argparse
import importlib
import inspect
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from jax_bridge.llm import LLM
from jax_bridge.parity.compare import Comparison, compare
from jax_bridge.parity.report import plot, print_report, print_texts, to_json
from jax_bridge.trace import make_record
from shared_config import Qwen3NextConfig, cli
from shared_config.generation import load_tokenizer
from shared_config.trace import Record, TraceJob

OP_TOKENS = (1, 3, 64, 67, 512)
# Prompts come in pieces beside one another, in few shapes: each is a program that XLA compiles.
MAX_STEP_TOKENS, MAX_NUM_SEQS = 256, 32
# Their sources' first lines are the prompts: text that every Python has.
MODULES = (
    "argparse", "ast", "base64", "bisect", "calendar", "cmd", "code", "codecs", "configparser", "contextlib", "copy",
    "csv", "dataclasses", "datetime", "difflib", "dis", "enum", "fileinput", "fnmatch", "fractions", "functools",
    "getopt", "glob", "gzip", "heapq", "inspect", "locale", "mailbox", "netrc", "numbers", "operator", "optparse",
)  # fmt: skip


def add_parity(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "parity", help="how equal PyTorch and JAX are, level by level; exit 1 when not"
    )
    cli.add_engine_options(parser)
    parser.add_argument(
        "--prompts", type=int, default=8, metavar="N", help=f"at most {len(MODULES)} (default 8)"
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="instead of the built-in ones; repeat for more"
    )
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="greedy tokens (default 64)")
    parser.add_argument(
        "--forced-tokens", type=int, default=16, metavar="N", help="decode steps that layers are compared in"
    )
    parser.add_argument(
        "--with-unfused", action="store_true", help="also compare each engine with itself, fusion off"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.set_defaults(run=run_parity)


def run_parity(args: argparse.Namespace) -> int:
    texts, job = make_job(args)
    records = {"torch": record_torch(args, job, "torch")}
    # Everybody is fed what PyTorch has generated, so that rows stay comparable after a first difference.
    job = replace(job, continuations=[greedy.token_ids for greedy in records["torch"].greedy])
    unfused = argparse.Namespace(**vars(args) | {"fusion": "off"})
    if args.with_unfused:
        records["torch, unfused"] = record_torch(unfused, job, "torch, unfused")
    records["jax"] = record_jax(args, job, "jax")
    pairs = [("torch", "jax")]
    if args.with_unfused:
        records["jax, unfused"] = record_jax(unfused, job, "jax, unfused")
        pairs += [("torch", "torch, unfused"), ("jax", "jax, unfused"), ("torch, unfused", "jax, unfused")]
    comparisons = [compare(records[left], records[right]) for left, right in pairs]
    write_report(args, texts, comparisons)
    return 0 if all(comparison.failed is None for comparison in comparisons) else 1


def write_report(args: argparse.Namespace, texts: list[str], comparisons: list[Comparison]) -> None:
    console = Console()
    if texts:
        print_texts(texts, comparisons[0].left, comparisons[0].right, console)
    print_report(comparisons, console)
    count = len(comparisons[0].left.greedy)
    facts = {"model": Path(args.model).name, "tensor_parallel_size": args.tp, "prompts": count}
    if args.json:
        args.json.write_text(to_json(comparisons, facts | {"max_tokens": args.max_tokens}))
    if args.plot:
        plot(comparisons, args.plot, f"{facts['model']}, TP={args.tp}, {count} prompts")


def make_job(args: argparse.Namespace) -> tuple[list[str], TraceJob]:
    """(the prompts as text, the job); random token ids, and no text, for a model without a tokenizer."""
    if not 1 <= args.prompts <= len(MODULES):
        raise ValueError(f"--prompts must be from 1 to {len(MODULES)}, got {args.prompts}")
    file = Path(args.model) / "tokenizer.json"
    texts: list[str] = []
    if file.exists():
        texts = args.prompt or prompt_texts(args.prompts)
        tokenizer = load_tokenizer(str(file))
        prompts = [tokenizer.encode(text).ids for text in texts]  # type: ignore[union-attr]
    elif args.prompt:
        raise ValueError(f"--prompt needs {file}, which is missing")
    else:
        rng, vocab_size = np.random.default_rng(0), Qwen3NextConfig.from_hf(args.model).vocab_size
        prompts = [rng.integers(0, vocab_size, 5 + 9 * i).tolist() for i in range(args.prompts)]
    return texts, TraceJob(prompts, args.max_tokens, args.forced_tokens, op_tokens=OP_TOKENS)


def prompt_texts(count: int) -> list[str]:
    """The beginnings, of different lengths, of functions' neighbourhoods in the standard library's sources."""
    texts = []
    for i, name in enumerate(MODULES[:count]):
        source = inspect.getsource(importlib.import_module(name))
        start = source.index("\ndef ") + 1 if "\ndef " in source else 0
        texts.append(source[start : start + 24 + 40 * (i % 7)])
    return texts


def record_torch(args: argparse.Namespace, job: TraceJob, engine: str) -> Record:
    """PyTorch's answer. Raises RuntimeError with what the process wrote when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, out = Path(folder, "job.json"), Path(folder, "record.npz")
        job.save(job_file)
        launcher = []
        if args.tp > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.tp}"]
        command = [sys.executable, *launcher, "-m", "core_torch", "trace", *cli.engine_arguments(args)]
        command += [f"--job={job_file}", f"--out={out}", f"--max-step-tokens={MAX_STEP_TOKENS}"]
        command += [f"--max-num-seqs={MAX_NUM_SEQS}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        record = Record.load(out)
    record.engine = engine
    return record


def record_jax(args: argparse.Namespace, job: TraceJob, engine: str) -> Record:
    limits = {"max_step_tokens": MAX_STEP_TOKENS, "max_num_seqs": MAX_NUM_SEQS}
    with LLM(args.model, **limits, **cli.engine_options(args)) as llm:
        assert llm._session is not None
        return make_record(llm._session, job, engine)
