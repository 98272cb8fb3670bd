"""What the JAX tests share: meshes of virtual devices, decisions for the reference backend, data and its answers.

Shapes: N ranks, T tokens, D hidden.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_bridge
from shared_config import (
    FlashInferInfo,
    FusionDecision,
    FusionRequest,
    HardwareInfo,
    ModelFacts,
    ParallelLayout,
    resolve_fusion,
)

D = 32
EPS = 1e-6
# Relative to 1 + |expected|: a few roundings of the dtype.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
reduce_norm = functools.partial(jax_bridge.allreduce_residual_rmsnorm, axis_name="tp", eps=EPS)
reduce_sum = functools.partial(jax_bridge.allreduce, axis_name="tp")


def mesh_of(*sizes: int, names: tuple[str, ...] = ("tp",)) -> Mesh:
    return Mesh(np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes), names)


def decide(
    tp_size: int,
    *,
    hidden_size: int = D,
    itemsize: int = 4,
    architecture: str = "Qwen3NextForCausalLM",
    layout: ParallelLayout | None = None,
    **request: Any,
) -> FusionDecision:
    """The decision of a laptop for the reference backend, unless `request` says otherwise."""
    return resolve_fusion(
        ModelFacts(architecture, hidden_size, itemsize),
        layout or ParallelLayout(tp_size=tp_size),
        HardwareInfo(),
        FlashInferInfo(),
        FusionRequest(**{"mode": "on", "backend": "reference", **request}),
    )


def open_fused(
    mesh: Mesh, dtype: Any = jnp.float32, decision: FusionDecision | None = None, **options: Any
) -> Any:
    """An open communicator over `mesh`'s axis "tp", with short waits."""
    decision = decision or decide(mesh.shape["tp"], itemsize=jnp.dtype(dtype).itemsize)
    options = {"max_tokens": 64, "timeout_s": 10.0, **options}
    return jax_bridge.fused_communicator(mesh, "tp", decision.hidden_size, dtype, decision, **options)


@dataclass(frozen=True)
class Operands:
    """partial [N, T, D], one row per rank; residual [T, D]; weight [D]."""

    partial: jax.Array
    residual: jax.Array
    weight: jax.Array

    def __iter__(self) -> Any:
        return iter((self.partial, self.residual, self.weight))

    def expected(self, weight_bias: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """(residual, normed) in float64."""
        partial, residual, weight = (np.asarray(x).astype(np.float64) for x in self)
        total = residual + partial.sum(0)
        scale = 1 / np.sqrt((total * total).mean(-1, keepdims=True) + EPS)
        return total, total * scale * (weight_bias + weight)


def operands(
    num_ranks: int, num_tokens: int = 5, dtype: Any = jnp.float32, seed: int = 0, hidden_size: int = D
) -> Operands:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return Operands(
        normal(num_ranks, num_tokens, hidden_size), normal(num_tokens, hidden_size), normal(hidden_size)
    )


def per_rank(function: Callable[..., Any], mesh: Mesh, check_vma: bool = True, out_specs: Any = None) -> Any:
    """`function(partial [T, D], residual, weight)` on every rank, of a partial [N, T, D] split over "tp"."""
    return jax.jit(
        jax.shard_map(
            lambda partial, *rest: function(partial[0], *rest),
            mesh=mesh,
            in_specs=(P("tp"), P(), P()),
            out_specs=P() if out_specs is None else out_specs,
            check_vma=check_vma,
        )
    )


def assert_close(got: Any, expected: np.ndarray, dtype: Any = jnp.float32) -> None:
    got = np.asarray(got).astype(np.float64)
    error = np.abs(got - expected) / (1 + np.abs(expected))
    assert error.max() <= TOLERANCE[jnp.dtype(dtype).name], f"largest error {error.max():.3g}"
