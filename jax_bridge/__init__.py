"""FlashInfer's fused all-reduce + residual + RMSNorm as a JAX function: inside jit and shard_map, differentiable.

This runs as it is on one device, on virtual CPU devices, and fused on GPUs:

    import jax, jax.numpy as jnp, jax_bridge, shared_config as sc
    from jax.sharding import PartitionSpec as P
    mesh = jax.sharding.Mesh(jax.devices(), ("tp",))
    model, layout = sc.ModelFacts("Qwen3NextForCausalLM", hidden_size=2048), sc.ParallelLayout(tp_size=mesh.size)
    decision = sc.resolve_fusion(model, layout, sc.probe_hardware(), sc.probe_flashinfer(), sc.FusionRequest())
    op = lambda x, r, w: jax_bridge.allreduce_residual_rmsnorm(x, r, w, axis_name="tp", eps=1e-6)
    step = jax.jit(jax.shard_map(op, mesh=mesh, in_specs=(P("tp"), P(), P()), out_specs=P()))
    x, r, w = (jnp.ones(s, jnp.bfloat16) for s in ((8 * mesh.size, 2048), (8, 2048), (2048,)))
    with jax_bridge.fused_communicator(mesh, "tp", 2048, jnp.bfloat16, decision):
        print(jax_bridge.explain(step, x, r, w), step(x, r, w)[1])

op.py           the two reductions                      order.py    one order for independent calls
reduction.py    their transformations, fused or not     report.py   explain: what is fused, and why not
opening.py      workspaces and votes for mesh axes      transports/ the ways into the kernel
user_kernel.py  your own kernel in JAX                  dlpack.py   tensors from and to PyTorch and CuPy
llm.py          the model in Flax, as core_torch's      parity/     how equal the two engines are
mesh.py         a layout's groups as axes of one mesh   pieces.py   rows on their way between them

Importing this imports neither jax nor torch; a name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_bridge import dlpack as dlpack
    from jax_bridge.communicator import Communicator as Communicator
    from jax_bridge.dispatch import dispatch_lock as dispatch_lock
    from jax_bridge.dispatch import one_at_a_time as one_at_a_time
    from jax_bridge.exporting import export_checks as export_checks
    from jax_bridge.llm import LLM as LLM
    from jax_bridge.llm import SamplingParams as SamplingParams
    from jax_bridge.op import allreduce as allreduce
    from jax_bridge.op import allreduce_residual_rmsnorm as allreduce_residual_rmsnorm
    from jax_bridge.opening import fused_communicator as fused_communicator
    from jax_bridge.order import CallOrder as CallOrder
    from jax_bridge.report import CallRecord as CallRecord
    from jax_bridge.report import TraceReport as TraceReport
    from jax_bridge.report import explain as explain
    from jax_bridge.user_kernel import cupy_kernel as cupy_kernel

_HOME = {
    "LLM": "llm",
    "SamplingParams": "llm",
    "CallOrder": "order",
    "CallRecord": "report",
    "Communicator": "communicator",
    "TraceReport": "report",
    "allreduce": "op",
    "allreduce_residual_rmsnorm": "op",
    "cupy_kernel": "user_kernel",
    "dispatch_lock": "dispatch",
    "explain": "report",
    "export_checks": "exporting",
    "fused_communicator": "opening",
    "one_at_a_time": "dispatch",
}

__all__ = [*sorted(_HOME), "dlpack"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "dlpack":
        return importlib.import_module("jax_bridge.dlpack")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"jax_bridge.{_HOME[name]}"), name)
