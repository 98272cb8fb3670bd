"""What `test_jax_processes.py` runs in each of two JAX processes: `python -m tests.jax_processes INDEX COUNT PORT`.

Prints one JSON line with what this process saw. Two virtual CPU devices a process.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_bridge
from core_torch.kernels.comm import CommBackend
from jax_bridge.transports.rendezvous import RendezvousBuffers
from tests.jax_case import D, decide, open_fused, operands, per_rank, reduce_norm


def put(array: jax.Array, mesh: Mesh, spec: P) -> jax.Array:
    """A global array of which each process gives its own shards."""
    data = np.asarray(array)
    return jax.make_array_from_callback(data.shape, NamedSharding(mesh, spec), lambda index: data[index])


def largest_error(got: jax.Array, expected: np.ndarray) -> float:
    shards = [(shard.index, np.asarray(shard.data)) for shard in got.addressable_shards]
    return max(float(np.abs(values - expected[index]).max()) for index, values in shards)


def groups_within_processes(mesh: Mesh) -> dict[str, Any]:
    """Mesh [dp = process, tp]: each process reduces among its own devices, in one program."""
    data = operands(4)
    partial = data.partial.reshape(2, 2, 5, D)

    def step(partial: jax.Array, residual: jax.Array, weight: jax.Array) -> jax.Array:
        return reduce_norm(partial[0, 0], residual, weight)[0][None]

    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P("dp", "tp"), P(), P()), out_specs=P("dp")))
    arguments = (
        put(partial, mesh, P("dp", "tp")),
        put(data.residual, mesh, P()),
        put(data.weight, mesh, P()),
    )
    with open_fused(mesh) as comm:
        fused = jax_bridge.explain(run, *arguments).counts.fused
        got = jax.block_until_ready([run(*arguments) for _ in range(20)])[-1]
    return {
        "id": comm.id,
        "fused": fused,
        "error": largest_error(got, np.asarray(partial.sum(1) + data.residual)),
    }


def group_across_processes() -> dict[str, Any]:
    """Mesh [tp] over all devices: CPUs of two processes do not meet, so all of them run unfused."""
    mesh, data = Mesh(np.array(jax.devices()), ("tp",)), operands(4)
    arguments = [put(x, mesh, spec) for x, spec in zip(data, (P("tp"), P(), P()), strict=True)]
    run = per_rank(reduce_norm, mesh)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with open_fused(mesh, decision=decide(4, mode="auto")) as comm:
            reason = jax_bridge.explain(run, *arguments).calls[0].reason
            got = jax.block_until_ready(run(*arguments)[1])
    return {
        "enabled": comm.decision.enabled,
        "reason": reason,
        "warned": len(caught),
        "error": largest_error(got, data.expected()[1]),
    }


def one_process_fails(mesh: Mesh) -> dict[str, Any]:
    original = RendezvousBuffers.create
    if jax.process_index() == 1:

        def broken(self: RendezvousBuffers, max_tokens: int, comm: CommBackend) -> None:
            raise MemoryError("out of memory")

        RendezvousBuffers.create = broken
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_fused(mesh, decision=decide(2, mode="auto")) as comm:
                return {"enabled": comm.decision.enabled, "reason": comm.decision.reason}
    finally:
        RendezvousBuffers.create = original


def decisions_differ(mesh: Mesh) -> dict[str, Any]:
    decision = decide(2, mode="auto", max_bytes=None if jax.process_index() == 0 else 1 << 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_fused(mesh, decision=decision) as comm:
            return {"enabled": comm.decision.enabled, "reason": comm.decision.reason}


def arguments_differ(mesh: Mesh) -> dict[str, Any]:
    try:
        with open_fused(mesh, max_tokens=32 + jax.process_index()):
            return {"error": ""}
    except ValueError as error:
        return {"error": str(error)}


def ids_agree(mesh: Mesh) -> dict[str, Any]:
    """Process 1 has one open that process 0 knows nothing of."""
    local = Mesh(np.array(jax.local_devices()), ("tp",))
    if jax.process_index() == 0:
        with open_fused(mesh, jnp.float32) as comm:
            return {"id": comm.id}
    with open_fused(local, jnp.float32) as own, open_fused(mesh, jnp.float32) as comm:
        return {"id": comm.id, "own": own.id}


def main() -> None:
    index, count, port = map(int, sys.argv[1:])
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=count, process_id=index)
    mesh = Mesh(np.array(jax.devices()).reshape(count, -1), ("dp", "tp"))
    seen = {
        "within": groups_within_processes(mesh),
        "across": group_across_processes(),
        "fails": one_process_fails(mesh),
        "decisions": decisions_differ(mesh),
        "arguments": arguments_differ(mesh),
        "ids": ids_agree(mesh),
    }
    print(json.dumps(seen), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
