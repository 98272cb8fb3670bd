"""`python -m bench.jax_op_chain`: the fused op in chains of 512 inside one JAX program, against XLA and torch.

Each call reduces what the call before it returned, as in a decoder, and nothing runs in between, so what is measured
is the call itself with everything that a framework puts around it. Columns, microseconds a call:

    ffi, cupy    the fused op through JAX's two transports, in XLA's CUDA graphs
    no_pdl       ffi without programmatic dependent launch, which needs neighbours in one graph
    kept         ffi on a residual that is kept, in_place=False
    copied       ffi on a residual that is kept, in place: XLA copies it before each call
    psum_norm    psum, add and norm as XLA compiles them
    torch        FlashInfer's op in a CUDA graph of PyTorch, same process, same GPUs

The time of a chain of 8 is taken off the time of a long one, so what one program costs to start is left out of the
time of a call; it is in the file too. Before it is timed, each chain's end is compared bit by bit with the others'.
Shapes: N ranks, T tokens, D hidden.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SHORT = 8
LONG = {"ffi": 512, "no_pdl": 512, "kept": 512, "copied": 512, "cupy": 512, "torch": 512, "psum_norm": 128}
FUSED = ("ffi", "no_pdl", "kept", "copied", "cupy")
SAME_BITS = (("ffi", "no_pdl", "cupy", "torch"), ("kept", "copied"))
BLOCK = 8  # calls that are traced once and repeated
WARMUPS = 3
EPS = 1e-6
PACKAGES = ("jax", "jaxlib", "torch", "jax-tvm-ffi", "apache-tvm-ffi", "cupy-cuda13x")
# What XLA can do differently with the same calls; each is a run of its own.
XLA_FLAGS = {
    "default": "",
    "concurrent": "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT",
    "concurrent regions": "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT_REGIONS",
    "stable addresses": "--xla_gpu_command_buffer_update_mode=SKIP_TEMP",
    "pdl": "--xla_gpu_enable_pdl=true",
    "no graphs": "--xla_gpu_enable_command_buffer=",
}


class Chains:
    """The compiled chains of one size: (way, number of calls) -> a function that runs it and waits."""

    def __init__(self, num_ranks: int, hidden_size: int, num_tokens: int, dtype: str) -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import Mesh, NamedSharding
        from jax.sharding import PartitionSpec as P

        self.mesh = Mesh(np.array(jax.devices()[:num_ranks]), ("tp",))
        rng = np.random.default_rng(num_tokens)
        shapes = (num_ranks * num_tokens, hidden_size), (num_tokens, hidden_size), (hidden_size,)
        arrays = [jnp.asarray(rng.standard_normal(shape, np.float32) / 4, dtype) for shape in shapes]
        self.specs = P("tp"), P(), P()
        self.operands = [
            jax.device_put(array, NamedSharding(self.mesh, spec))
            for array, spec in zip(arrays, self.specs, strict=True)
        ]

    def compiled(self, op: Callable[..., Any], count: int) -> Callable[[], Any]:
        """`count` calls of `op(partial, residual, weight)` in one program -> (normed, residual) of each rank."""
        import jax
        from jax.sharding import PartitionSpec as P

        @jax.jit
        def block(hidden: jax.Array, residual: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
            for _ in range(BLOCK):
                residual, hidden = op(hidden, residual, weight)
            return hidden, residual

        def chain(x: jax.Array, residual: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden = x
            for _ in range(count // BLOCK):
                hidden, residual = block(hidden, residual, weight)
            return hidden, residual

        run = jax.shard_map(
            chain, mesh=self.mesh, in_specs=self.specs, out_specs=(P("tp"), P("tp")), check_vma=False
        )
        program = jax.jit(run).lower(*self.operands).compile()
        return lambda: jax.block_until_ready(program(*self.operands))


def measure_size(args: argparse.Namespace, num_tokens: int, decision: Any) -> dict[str, Any]:
    """One line of the table, and how often the host launched the kernel while it was timed."""
    import jax
    import jax.numpy as jnp

    import jax_bridge
    from jax_bridge import native, plain

    chains = Chains(args.tp, args.hidden, num_tokens, args.dtype)

    def psum_norm(partial: jax.Array, residual: jax.Array, weight: jax.Array) -> Any:
        return plain.add_rmsnorm(plain.allreduce(partial, "tp", False), residual, weight, EPS, 1.0)

    with contextlib.ExitStack() as stack:
        ops: dict[str, Callable[..., Any]] = {"psum_norm": psum_norm}
        for way in args.ways:
            comm = stack.enter_context(
                jax_bridge.fused_communicator(
                    chains.mesh,
                    "tp",
                    args.hidden,
                    jnp.dtype(args.dtype),
                    decision,
                    transport="cupy" if way == "cupy" else "ffi",
                )
            )
            if way == "no_pdl":
                comm.transport.launch_with_pdl = False  # pyright: ignore[reportAttributeAccessIssue] (of ffi)
            ops[way] = fused_op(way, comm)
        wanted = [(way, count) for way in ops for count in (SHORT, LONG[way])]
        started = time.perf_counter()
        with ThreadPoolExecutor(8) as pool:
            programs = list(pool.map(lambda job: chains.compiled(ops[job[0]], job[1]), wanted))
        runs = dict(zip(wanted, programs, strict=True))
        compile_s = time.perf_counter() - started
        runs |= stack.enter_context(torch_chains(chains, args, decision))
        for ways in SAME_BITS:
            check_same_bits(runs, [way for way in ways if (way, SHORT) in runs])
        for run in runs.values():
            for _ in range(WARMUPS):
                run()
        launches = native.load("flashinfer_adaptor").count_host_launches
        before = launches()
        samples: dict[tuple[str, int], list[float]] = {job: [] for job in runs}
        for _ in range(args.repeats):
            for job, run in runs.items():
                start = time.perf_counter()
                run()
                samples[job].append((time.perf_counter() - start) * 1e6)
        host_launches = launches() - before
    line: dict[str, Any] = {
        "num_tokens": num_tokens,
        "compile_s": round(compile_s, 2),
        "ffi_kernels_timed": args.tp
        * args.repeats
        * sum(SHORT + LONG[way] for way in args.ways if way != "cupy"),
        "ffi_host_launches_while_timed": host_launches,
    }
    for way in {way for way, _ in runs}:
        long, short = sorted(samples[way, LONG[way]]), sorted(samples[way, SHORT])
        middle = args.repeats // 2
        line[f"{way}_us"] = round((long[middle] - short[middle]) / (LONG[way] - SHORT), 3)
        line[f"{way}_start_us"] = round(short[middle] - SHORT * line[f"{way}_us"], 1)
        line[f"{way}_spread_us"] = round((long[-1 - len(long) // 10] - long[len(long) // 10]) / LONG[way], 3)
    return line


def fused_op(way: str, comm: Any) -> Callable[..., Any]:
    """op(partial, residual, weight) -> (the residual of the next call, normed)."""
    import jax

    import jax_bridge

    op = functools.partial(
        jax_bridge.allreduce_residual_rmsnorm, axis_name="tp", eps=EPS, comm=comm, in_place=way != "kept"
    )
    if way not in ("kept", "copied"):
        return op

    def keeping(partial: jax.Array, residual: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        return residual, op(partial, residual, weight)[1]

    return keeping


def check_same_bits(runs: dict[tuple[str, int], Callable[[], Any]], ways: Sequence[str]) -> None:
    """After SHORT calls, and on every rank, all ways have the same normed output and residual."""
    results = {way: runs[way, SHORT]() for way in ways}
    first = [bits(part) for way in ways[:1] for output in results[way] for part in parts_of(output)]
    for way in ways[1:]:
        for one, other in zip(first, (bits(p) for o in results[way] for p in parts_of(o)), strict=True):
            wrong = int((one != other.to(one.device)).sum())
            if wrong:
                raise RuntimeError(
                    f"{way} and {ways[0]} differ in {wrong} of {one.numel()} elements: not timed"
                )


def parts_of(output: Any) -> list[Any]:
    """Each rank's part, as torch tensors."""
    if isinstance(output, list):
        return output
    import jax_bridge

    shards = sorted(output.addressable_shards, key=lambda shard: shard.device.local_hardware_id)
    return [jax_bridge.dlpack.to_torch(shard.data) for shard in shards]


def bits(tensor: Any) -> Any:
    import torch

    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@contextlib.contextmanager
def torch_chains(
    chains: Chains, args: argparse.Namespace, decision: Any
) -> Iterator[dict[tuple[str, int], Callable[[], Any]]]:
    """The same chains in PyTorch: one CUDA graph per GPU, on workspaces of its own."""
    import torch

    from core_torch.kernels.startup import start_fusion
    from jax_bridge.devices import AxisGroups, mesh_comms, on_threads
    from shared_config import probe_flashinfer

    if chains.mesh.devices.flat[0].platform == "cpu":
        yield {}
        return
    comms = mesh_comms(AxisGroups.of(chains.mesh, "tp"), 60.0)
    flashinfer = probe_flashinfer()
    inputs = [parts_of(operand) for operand in chains.operands]

    def start(rank: int) -> Any:
        torch.cuda.set_device(rank)
        return start_fusion(
            decision,
            comms[rank],
            hidden_size=args.hidden,
            dtype=getattr(torch, args.dtype),
            device=torch.device("cuda", rank),
            flashinfer=flashinfer,
        )[1]

    workspaces = on_threads(start, args.tp, comms[0].abort)

    def graph_of(rank: int, count: int) -> tuple[Any, list[Any]]:
        """-> (graph, [normed, residual]): the outputs of odd and even calls take turns in two buffers."""
        partial, residual, weight = (operand[rank] for operand in inputs)
        buffers = [(torch.empty_like(partial), torch.empty_like(residual)) for _ in range(2)]
        outputs = [torch.empty_like(partial), torch.empty_like(residual)]

        def chain() -> None:
            hidden, left = partial, residual
            for number in range(count):
                out_normed, out_residual = outputs if number == count - 1 else buffers[number % 2]
                left, hidden = workspaces[rank].run(
                    hidden, left, weight, EPS, 1.0, out_residual=out_residual, out_normed=out_normed
                )

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(rank), torch.cuda.graph(graph):
            chain()
        return graph, outputs

    def run_of(count: int) -> Callable[[], list[list[Any]]]:
        graphs = [graph_of(rank, count) for rank in range(args.tp)]

        def run() -> list[list[Any]]:
            for rank, (graph, _) in enumerate(graphs):
                with torch.cuda.device(rank):
                    graph.replay()
            for rank in range(args.tp):
                torch.cuda.synchronize(rank)
            return [[outputs[index] for _, outputs in graphs] for index in range(2)]

        return run

    try:
        yield {("torch", count): run_of(count) for count in (SHORT, LONG["torch"])}
    finally:
        for workspace in workspaces:
            workspace.close()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that one process measures; `main` starts it."""
    import jax

    from shared_config import (
        FusionRequest,
        ModelFacts,
        ParallelLayout,
        probe_flashinfer,
        probe_hardware,
        resolve_fusion,
    )

    itemsize = jax.numpy.dtype(args.dtype).itemsize
    backend = "reference" if jax.devices()[0].platform == "cpu" else "trtllm"
    flashinfer, hardware = probe_flashinfer(), probe_hardware()
    decision = resolve_fusion(
        ModelFacts("Qwen3NextForCausalLM", args.hidden, itemsize),
        ParallelLayout(tp_size=args.tp),
        hardware,
        flashinfer,
        FusionRequest(mode="on", backend=backend, max_bytes=max(args.tokens) * args.hidden * itemsize),
    )
    rows = []
    for num_tokens in args.tokens:
        rows.append(measure_size(args, num_tokens, decision))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    versions = {package: version_of(package) for package in PACKAGES} | {"flashinfer": flashinfer.version}
    return {
        "gpus": [device.device_kind for device in jax.devices()[: args.tp]],
        "driver": hardware.driver,
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "tp": args.tp,
        "hidden_size": args.hidden,
        "dtype": args.dtype,
        "calls": {"short": SHORT, "long": LONG},
        "repeats": args.repeats,
        "rows": rows,
    }


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def table(result: dict[str, Any]) -> str:
    ways = [way for way in ("psum_norm", *FUSED, "torch") if f"{way}_us" in result["rows"][0]]
    lines = [" ".join(f"{name:>10}" for name in ("tokens", *ways, "over XLA", "of torch"))]
    for row in result["rows"]:
        ffi = next((row[f"{way}_us"] for way in FUSED if f"{way}_us" in row), None)
        over = f"{row['psum_norm_us'] / ffi:.2f}x" if ffi else "-"
        of_torch = f"{ffi / row['torch_us']:.2f}x" if ffi and "torch_us" in row else "-"
        cells = [f"{row[f'{way}_us']:.2f}" if f"{way}_us" in row else "-" for way in ways]
        lines.append(" ".join(f"{cell:>10}" for cell in (str(row["num_tokens"]), *cells, over, of_torch)))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.jax_op_chain", description=__doc__)
    numbers = lambda text: tuple(map(int, text.split(",")))  # noqa: E731
    parser.add_argument("--tokens", type=numbers, default=(1, 8, 64, 128, 512, 1024, 2048, 4096))
    parser.add_argument(
        "--ways",
        type=lambda text: tuple(text.split(",")),
        default=("ffi", "cupy"),
        help=f"the fused ones of the columns: {', '.join(FUSED)}",
    )
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--xla", default="default", choices=sorted(XLA_FLAGS), help="XLA's flags, by name")
    parser.add_argument("--timeout-s", type=float, default=150.0)
    parser.add_argument("--out", type=Path, default=Path("build/bench/jax_op_chain.json"))
    parser.add_argument("--here", action="store_true", help="measure in this process")
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.here:
        args.out.write_text(json.dumps(measure(args), indent=1) + "\n")
        return 0
    # In a process of its own: XLA reads its flags once, and one that hangs can be ended.
    environment = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",
        "CUDA_MODULE_LOADING": "EAGER",
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS[args.xla]}".strip(),
    }
    command = [
        sys.executable,
        "-m",
        "bench.jax_op_chain",
        *(sys.argv[1:] if argv is None else argv),
        "--here",
    ]
    try:
        subprocess.run(command, env=environment, check=True, timeout=args.timeout_s)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = json.loads(args.out.read_text())
    print(table(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
