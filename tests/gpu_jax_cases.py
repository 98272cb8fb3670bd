"""What `test_gpu_jax.py` runs on GPUs, in processes of its own: `python -m tests.gpu_jax_cases OUT CASE...`.

Each case is a function of this module; what it returns (or its traceback) is one JSON line in the file OUT, written
when it ends, so that a case that hangs takes nothing of the others with it.

Shapes: N ranks, T tokens, D hidden.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_bridge
from core_torch.kernels.contract import sum_in_rank_order
from core_torch.kernels.startup import start_fusion
from core_torch.kernels.workspace import Workspace
from jax_bridge import native
from jax_bridge.devices import AxisGroups, mesh_comms, on_threads
from jax_bridge.transports.cupy import CupyTransport
from shared_config import (
    FusionDecision,
    FusionRequest,
    ModelFacts,
    ParallelLayout,
    probe_flashinfer,
    probe_hardware,
    resolve_fusion,
)

N = int(os.environ.get("CROSSFUSE_TEST_RANKS", "2"))
EPS = 1e-6
HIDDEN = (1024, 2048, 4096, 5120, 7168)
TOKENS = (1, 2, 3, 8, 63, 64, 66, 67, 128, 500, 1000, 2048)
BIASES = (0.0, 1.0)
DTYPES = ("float16", "bfloat16", "float32")
reduce_norm = functools.partial(jax_bridge.allreduce_residual_rmsnorm, axis_name="tp", eps=EPS)
hardware, flashinfer = functools.cache(probe_hardware), functools.cache(probe_flashinfer)


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:N]), ("tp",))


def decide(hidden_size: int, dtype: str, max_tokens: int) -> FusionDecision:
    itemsize = jnp.dtype(dtype).itemsize
    request = FusionRequest(mode="on", max_bytes=max_tokens * hidden_size * itemsize)
    model = ModelFacts("Qwen3NextForCausalLM", hidden_size, itemsize)
    return resolve_fusion(model, ParallelLayout(tp_size=N), hardware(), flashinfer(), request)


def opened(hidden_size: int = 2048, dtype: str = "bfloat16", max_tokens: int = 64, **options: Any) -> Any:
    decision = decide(hidden_size, dtype, max_tokens)
    return jax_bridge.fused_communicator(mesh(), "tp", hidden_size, dtype, decision, **options)


def data(
    hidden_size: int, dtype: str, num_tokens: int, seed: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """partial [N * T, D] split over ranks, residual [T, D] and weight [D] on all of them; made on the GPUs."""

    @functools.partial(jax.jit, out_shardings=tuple(NamedSharding(mesh(), s) for s in (P("tp"), P(), P())))
    def make() -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.key(seed), 3)
        shapes = (N * num_tokens, hidden_size), (num_tokens, hidden_size), (hidden_size,)
        x, r, w = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
        return x.astype(dtype), r.astype(dtype), (w / 10).astype(dtype)

    return jax.block_until_ready(make())


def per_rank(function: Callable[..., Any]) -> Any:
    """`function(partial [T, D], residual, weight)` on each rank; each result is all ranks', one after another."""
    return jax.jit(
        jax.shard_map(function, mesh=mesh(), in_specs=(P("tp"), P(), P()), out_specs=P("tp"), check_vma=False)
    )


def shards(array: jax.Array) -> list[torch.Tensor]:
    """Each rank's part of an array, as torch tensors on the ranks' GPUs."""
    parts = sorted(array.addressable_shards, key=lambda shard: shard.device.local_hardware_id)
    return [jax_bridge.dlpack.to_torch(part.data) for part in parts]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@contextlib.contextmanager
def torch_workspaces(hidden_size: int, dtype: str, max_tokens: int) -> Iterator[list[Workspace]]:
    """The PyTorch core's own workspaces on the same GPUs, one thread per rank."""
    groups = AxisGroups.of(mesh(), "tp")
    comms, decision = mesh_comms(groups, 60.0), decide(hidden_size, dtype, max_tokens)

    def start(rank: int) -> Workspace:
        torch.cuda.set_device(rank)
        workspace = start_fusion(
            decision,
            comms[rank],
            hidden_size=hidden_size,
            dtype=getattr(torch, dtype),
            device=torch.device("cuda", rank),
            flashinfer=flashinfer(),
        )[1]
        assert workspace is not None
        return workspace

    workspaces = on_threads(start, N, comms[0].abort)
    try:
        yield workspaces
    finally:
        for workspace in workspaces:
            workspace.close()


def all_sizes(x: jax.Array, r: jax.Array, w: jax.Array) -> list[Any]:
    """Every token count with both biases, and the plain sum, as independent calls in one order."""
    order, results = jax_bridge.CallOrder.start(), []
    for num_tokens in TOKENS:
        partial, residual = x[:num_tokens], r[:num_tokens]
        for bias in BIASES:
            outputs, order = order.allreduce_residual_rmsnorm(
                partial, residual, w, axis_name="tp", eps=EPS, weight_bias=bias
            )
            results.append(outputs)
        total, order = order.allreduce(partial, axis_name="tp")
        results.append((total,))
    return results


def in_torch(workspaces: list[Workspace], x: jax.Array, r: jax.Array, w: jax.Array) -> list[list[Any]]:
    """The same in PyTorch: [rank][call] -> tensors."""
    partials, residuals, weights = shards(x), shards(r), shards(w)
    everywhere = [[part.to(f"cuda:{rank}") for part in partials] for rank in range(N)]
    for rank in range(N):
        torch.cuda.synchronize(rank)

    def run(rank: int) -> list[Any]:
        torch.cuda.set_device(rank)
        results: list[Any] = []
        for num_tokens in TOKENS:
            partial, residual = partials[rank][:num_tokens], residuals[rank][:num_tokens]
            results += [workspaces[rank].run(partial, residual, weights[rank], EPS, bias) for bias in BIASES]
            results.append((sum_in_rank_order(torch.stack([p[:num_tokens] for p in everywhere[rank]])),))
        torch.cuda.synchronize(rank)
        return results

    return on_threads(run, N, lambda _reason: None)


def compare_with_torch(transport: str, hidden_sizes: tuple[int, ...]) -> dict[str, Any]:
    compared, different, seconds = 0, [], {}
    for hidden_size, dtype in itertools.product(hidden_sizes, DTYPES):
        started = time.perf_counter()
        operands = data(hidden_size, dtype, max(TOKENS))
        with torch_workspaces(hidden_size, dtype, max(TOKENS)) as workspaces:
            want = in_torch(workspaces, *operands)
        with opened(hidden_size, dtype, max(TOKENS), transport=transport):
            run = per_rank(all_sizes)
            fused = jax_bridge.explain(run, *operands).calls
            assert all(call.fused for call in fused), [str(call) for call in fused if not call.fused]
            got = jax.block_until_ready(run(*operands))
        for index, outputs in enumerate(got):
            for part, output in enumerate(outputs):
                for rank, shard in enumerate(shards(output)):
                    compared += 1
                    expected = want[rank][index][part]
                    wrong = int((bits(shard) != bits(expected)).sum())
                    if wrong:
                        difference = float((shard.double() - expected.double()).abs().max())
                        different.append([hidden_size, dtype, index, part, rank, wrong, difference])
        seconds[f"{hidden_size} {dtype}"] = round(time.perf_counter() - started, 2)
    return {"compared": compared, "different": different[:20], "seconds": seconds}


def ffi_equals_torch() -> dict[str, Any]:
    return compare_with_torch("ffi", HIDDEN)


def cupy_equals_torch() -> dict[str, Any]:
    return compare_with_torch("cupy", (2048,))


def chain(x: jax.Array, r: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden = x
    for _ in range(8):
        r, hidden = reduce_norm(hidden, r, w)
    return hidden, r


def captured(x: jax.Array, r: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`chain` under a name that the dump of XLA's programs is filtered by."""
    return chain(x, r, w)


class LaunchCount:
    """How often the host has launched the kernel through a transport, since this was made."""

    def __init__(self, transport: str) -> None:
        self._python_launches = 0
        if transport == "ffi":
            self._read = native.load("flashinfer_adaptor").count_host_launches
        else:
            self._read = lambda: self._python_launches
            launch = CupyTransport._launch

            def counted(transport: CupyTransport, *args: Any, **kwargs: Any) -> None:
                self._python_launches += 1
                launch(transport, *args, **kwargs)

            setattr(CupyTransport, launch.__name__, counted)
        self._before = self._read()

    def __call__(self) -> int:
        return self._read() - self._before


def thousand_executions() -> dict[str, Any]:
    """Each transport: 1,000 runs with the same bits, on fresh data now and then, almost all of them replays."""
    results = {}
    for transport in ("ffi", "cupy"):
        launches = LaunchCount(transport)
        with opened(transport=transport):
            run = per_rank(captured)
            changed = jax.jit(
                lambda got, first: sum(jnp.sum(a != b) for a, b in zip(got, first, strict=True))
            )
            wrong = 0
            started = time.perf_counter()
            for seed in range(5):
                operands = data(2048, "bfloat16", 8, seed)
                first = jax.block_until_ready(run(*operands))
                for _ in range(199):
                    # One at a time: results in flight take new addresses, and XLA records the graph again for those.
                    wrong += int(changed(run(*operands), first))
                ranks = shards(first[0])
                wrong += int((bits(ranks[0]) != bits(ranks[1].to("cuda:0"))).sum())
            results[transport] = {
                "executions": 1000,
                "kernels": 1000 * 8 * N,
                "host_launches": launches(),
                "wrong": wrong,
                "seconds": round(time.perf_counter() - started, 2),
            }
    return results | {"dump": dumped_commands()}


def dumped_commands() -> list[str]:
    """Lines of XLA's dump of the programs named `captured` that speak of command buffers or of our calls."""
    folder = os.environ.get("CROSSFUSE_TEST_DUMP", "")
    lines = [f"{file.name}" for file in sorted(Path(folder).glob("*"))][:30] if folder else []
    for file in sorted(Path(folder).glob("*thunk_sequence*")) if folder else []:
        for line in file.read_text().splitlines():
            if "ommand" in line or "crossfuse" in line:
                lines.append(f"{file.name}: {line.strip()[:200]}")
    return lines[:60]


def independent_calls() -> dict[str, Any]:
    """Calls that only a CallOrder keeps apart, 200 times; run under XLA's CONCURRENT command buffers as well."""
    results = {}
    for transport in ("ffi", "cupy"):
        operands = data(2048, "bfloat16", 8)

        def sums(x: jax.Array, r: jax.Array, w: jax.Array) -> jax.Array:
            del r, w
            order, totals = jax_bridge.CallOrder.start(), []
            for i in range(16):
                total, order = order.allreduce(x * jnp.bfloat16(2.0 ** (i - 8)), axis_name="tp")
                totals.append(total)
            return jnp.stack(totals)

        with opened(transport=transport):
            run = per_rank(sums)
            parts = operands[0].reshape(N, 8, 2048)
            total = sum_in_rank_order(
                torch.stack([part.to("cuda:0") for part in shards(parts)]).reshape(N, 8, -1)
            )
            want = torch.stack([total * 2.0 ** (i - 8) for i in range(16)])  # powers of two: exact
            wrong = 0
            for _ in range(200):
                got = shards(jax.block_until_ready(run(*operands)))
                wrong += sum(int((bits(shard) != bits(want.to(shard.device))).sum()) for shard in got)
        results[transport] = {"executions": 200, "calls": 16, "wrong": wrong}
    return results


def two_threads() -> dict[str, Any]:
    """Two Python threads, each with a program of its own, behind `one_at_a_time`."""
    operands = [data(2048, "bfloat16", 8, seed) for seed in range(2)]
    wrong = [0, 0]
    with opened():
        runs = [
            jax_bridge.one_at_a_time(per_rank(lambda x, r, w, b=bias: reduce_norm(x, r, w, weight_bias=b)))
            for bias in BIASES
        ]
        first = [jax.block_until_ready(run(*xs)) for run, xs in zip(runs, operands, strict=True)]

        def dispatch(index: int) -> None:
            for _ in range(200):
                got = runs[index](*operands[index])
                wrong[index] += sum(
                    int((bits(a) != bits(b)).sum())
                    for one, other in zip(got, first[index], strict=True)
                    for a, b in zip(shards(one), shards(other), strict=True)
                )

        threads = [threading.Thread(target=dispatch, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return {"wrong": wrong}


def transformations() -> dict[str, Any]:
    """Donation, vmap, scan, gradients and export with the real kernel."""
    seen: dict[str, Any] = {}
    with opened(hidden_size=1024, dtype="float32") as comm:
        x, r, w = data(1024, "float32", 8)
        want = jax.block_until_ready(per_rank(reduce_norm)(x, r, w))

        step = jax.jit(per_rank(reduce_norm), donate_argnums=1)
        replicated = jax.device_put(np.asarray(r), NamedSharding(mesh(), P()))
        jax.block_until_ready(step(x, replicated, w))
        seen["donated"] = replicated.is_deleted()

        batched = per_rank(lambda x, r, w: jax.vmap(reduce_norm, in_axes=(0, 0, None))(x[None], r[None], w))
        got = jax.block_until_ready(batched(x, r, w))
        seen["vmap"] = bool((got[1].reshape(want[1].shape) == want[1]).all())

        def scanned(x: jax.Array, r: jax.Array, w: jax.Array) -> jax.Array:
            return jax.lax.scan(lambda r, _: (reduce_norm(x, r, w)[0], None), r, None, length=10)[0]

        def unrolled(x: jax.Array, r: jax.Array, w: jax.Array) -> jax.Array:
            for _ in range(10):
                r = reduce_norm(x, r, w)[0]
            return r

        loops = [jax.block_until_ready(per_rank(f)(x, r, w)) for f in (scanned, unrolled)]
        seen["scan"] = bool((loops[0] == loops[1]).all())

        exported = jax.export.export(per_rank(reduce_norm), disabled_checks=jax_bridge.export_checks(comm))(
            x, r, w
        )
        got = jax.block_until_ready(jax.jit(exported.call)(x, r, w))
        seen["export"] = bool((got[1] == want[1]).all())

        def loss(x: jax.Array, r: jax.Array, w: jax.Array) -> jax.Array:
            run = jax.shard_map(reduce_norm, mesh=mesh(), in_specs=(P("tp"), P(), P()), out_specs=P())
            residual, normed = run(x, r, w)
            return jnp.sum(jnp.sin(residual)) + jnp.sum(normed * normed)

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        seen["fused_in_gradient"] = jax_bridge.explain(gradients, x, r, w).counts.fused
        fused = jax.block_until_ready(gradients(x, r, w))
    plain = jax.block_until_ready(gradients(x, r, w))
    seen["gradient_error"] = max(
        float(jnp.max(jnp.abs(a - b) / (1 + jnp.abs(b)))) for a, b in zip(fused, plain, strict=True)
    )
    return seen


def exchange() -> dict[str, Any]:
    """DLPack and own kernels on GPUs."""
    import cupy  # pyright: ignore[reportMissingImports]

    seen: dict[str, Any] = {}
    tensors = [torch.full((4, 8), float(rank), device=f"cuda:{rank}") for rank in range(N)]
    array = jax_bridge.dlpack.from_torch(tensors[1])
    seen["from_torch"] = array.unsafe_buffer_pointer() == tensors[1].data_ptr()
    seen["to_torch"] = jax_bridge.dlpack.to_torch(array).data_ptr() == tensors[1].data_ptr()
    whole = jax_bridge.dlpack.shards_from_torch(tensors, mesh(), P("tp"))
    pointers = [shard.data.unsafe_buffer_pointer() for shard in whole.addressable_shards]
    seen["shards"] = pointers == [tensor.data_ptr() for tensor in tensors] and whole.shape == (8, 8)
    try:
        jax_bridge.dlpack.shards_from_torch(tensors[::-1], mesh(), P("tp"))
        seen["wrong_order"] = ""
    except ValueError as error:
        seen["wrong_order"] = str(error)
    with cupy.cuda.Device(0):
        source = cupy.arange(6, dtype=cupy.float32)
        array = jax_bridge.dlpack.from_cupy(source)
        seen["from_cupy"] = array.unsafe_buffer_pointer() == source.data.ptr
        seen["to_cupy"] = jax_bridge.dlpack.to_cupy(array).data.ptr == source.data.ptr

    def like(x: jax.ShapeDtypeStruct, *_rest: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    python_calls = itertools.count()

    @jax_bridge.cupy_kernel(out=like)
    def add_with_cupy(out: Any, x: Any, y: Any) -> None:
        next(python_calls)
        cupy.add(x, y, out=out)

    @jax_bridge.cupy_kernel(out=like, arrays="torch")
    def double_with_torch(out: torch.Tensor, x: torch.Tensor) -> None:
        torch.mul(x, 2, out=out)

    def chain(x: jax.Array) -> jax.Array:
        total = jnp.zeros_like(x)
        for _ in range(8):
            total = add_with_cupy(total, x)
        return total

    run = jax.jit(chain)
    wrong = 0
    for step in range(10):
        x = jnp.arange(1000.0) + step
        wrong += int((run(x) != 8 * x).sum())
    seen["cupy_wrong"] = wrong
    # XLA records its graph again for arrays at new addresses, so these stay where they are.
    x, before = jnp.arange(1000.0), next(python_calls)
    for _ in range(100):
        run(x).block_until_ready()
    seen["cupy_python_calls"] = next(python_calls) - before - 1
    x = jnp.arange(8.0).astype(jnp.bfloat16)
    seen["torch_kernel"] = bool((jax.jit(double_with_torch)(x) == x * 2).all())
    sharded = jax.jit(
        jax.shard_map(add_with_cupy, mesh=mesh(), in_specs=(P("tp"), P("tp")), out_specs=P("tp"))
    )
    seen["sharded_kernel"] = bool((sharded(whole, whole) == whole * 2).all())
    return seen


def readme_example() -> dict[str, Any]:
    """The docstring's example, as it is, with what it prints."""
    block = next(part for part in (jax_bridge.__doc__ or "").split("\n\n") if part.startswith("    "))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(textwrap.dedent(block), "example", "exec"), {})
    return {"printed": printed.getvalue()}


def digest() -> dict[str, Any]:
    """The bits that two processes must get too: of every rank that lives here."""
    operands = data_on_all(64)
    with opened() as comm:
        run = per_rank(chain)
        fused = jax_bridge.explain(run, *operands).counts.fused
        got = jax.block_until_ready([run(*operands) for _ in range(20)])[-1]
    bytes_of = [np.asarray(shard.data).tobytes() for output in got for shard in output.addressable_shards]
    return {
        "fused": fused,
        "reason": comm.decision.reason,
        "local_devices": [device.local_hardware_id for device in jax.local_devices()],
        "digests": sorted({hashlib.sha256(part).hexdigest() for part in bytes_of}),
    }


def data_on_all(num_tokens: int) -> list[jax.Array]:
    """As `data`, from NumPy, so that every process makes the same."""
    rng = np.random.default_rng(7)
    shapes = (N * num_tokens, 2048), (num_tokens, 2048), (2048,)
    arrays = [rng.standard_normal(shape).astype(jnp.bfloat16) for shape in shapes]
    return [
        jax.make_array_from_callback(array.shape, NamedSharding(mesh(), spec), lambda i, a=array: a[i])
        for array, spec in zip(arrays, (P("tp"), P(), P()), strict=True)
    ]


def main(out: str, *cases: str) -> None:
    if "CROSSFUSE_TEST_PROCESS" in os.environ:
        # "INDEX PROCESSES PORT": one of several, with its share of the GPUs
        index, processes, port = map(int, os.environ["CROSSFUSE_TEST_PROCESS"].split())
        share = N // processes
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            num_processes=processes,
            process_id=index,
            local_device_ids=list(range(index * share, (index + 1) * share)),
        )
    run_cases(globals(), out, cases)


def run_cases(module: dict[str, Any], out: str, cases: Sequence[str]) -> None:
    """Functions of a module, by name: one JSON line each in the file `out`."""
    with Path(out).open("w") as file:
        for case in cases:
            started = time.perf_counter()
            line: dict[str, Any] = {"case": case}
            try:
                line["result"] = module[case]()
            except Exception:
                line["error"] = traceback.format_exc()
            line["seconds"] = round(time.perf_counter() - started, 1)
            print(json.dumps(line), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
