"""Faults to plant in either engine, one at a time: what a parity run must find, and where.

A fault is a context manager that is given the engine's runner; inside it, the engine is wrong.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

# The model has two layers, so four payments a pass, in this order.
PAYMENTS = ("layers.0.mixer", "layers.0.mlp", "layers.1.mixer", "layers.1.mlp")


@dataclass(frozen=True)
class Expected:
    """The level that must fail first, and what its report must name."""

    level: str
    where: str


EXPECTED = {
    "skipped reduction": Expected("layer", "layers.0.mixer"),
    "double reduction": Expected("layer", "layers.0.mlp"),
    "w for 1 + w": Expected("layer", "layers.0.mixer"),
    "w for 1 + w in the op": Expected("op", "normed"),
    "swapped gate": Expected("layer", "layers.0.mlp"),
    "wrong rotary fraction": Expected("layer", "layers.1.mixer"),
    "one expert permuted": Expected("layer", "layers.1.mlp"),
    "off-by-one cache position": Expected("layer", "layers.1.mixer"),
    "bfloat16 router": Expected("layer", "layers.0.mlp"),
}


def at_payment(name: str, pay: Callable[..., Any], wrong: Callable[..., Any]) -> Callable[..., Any]:
    """`pay`, but for the payment `name` of every pass, which is `wrong`'s."""
    count = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return (wrong if PAYMENTS[(count - 1) % 4] == name else pay)(*args, **kwargs)

    return call


@contextlib.contextmanager
def torch_fault(name: str, runner: Any) -> Iterator[None]:
    import torch

    from core_torch import batch
    from core_torch import runner as runner_module
    from core_torch.kernels import allreduce
    from core_torch.kernels.contract import add_rmsnorm
    from core_torch.layers import attention, mlp, norm

    pay = norm.allreduce_residual_rmsnorm

    def unreduced(
        partial: Any, residual: Any, weight: Any, *, group: Any, eps: float, weight_bias: float
    ) -> Any:
        del group
        return add_rmsnorm(partial, residual, weight, eps, weight_bias)

    def doubled(partial: Any, *args: Any, group: Any, **kwargs: Any) -> Any:
        return pay(allreduce.all_reduce(partial.clone(), group=group), *args, group=group, **kwargs)

    def off_by_one(*args: Any, **kwargs: Any) -> Any:
        packed = batch.pack_decode(*args, **kwargs)
        packed[2] += 1  # kv_slots
        return packed

    patches: dict[str, Callable[[], Any]] = {
        "skipped reduction": lambda: mock.patch.object(
            norm, "allreduce_residual_rmsnorm", at_payment("layers.0.mixer", pay, unreduced)
        ),
        "double reduction": lambda: mock.patch.object(
            norm, "allreduce_residual_rmsnorm", at_payment("layers.0.mlp", pay, doubled)
        ),
        "w for 1 + w": lambda: mock.patch.object(norm, "WEIGHT_BIAS", 0.0),
        "w for 1 + w in the op": lambda: mock.patch.object(
            allreduce, "add_rmsnorm", lambda s, r, w, eps, _bias: add_rmsnorm(s, r, w, eps, 0.0)
        ),
        "swapped gate": lambda: mock.patch.object(
            mlp, "swiglu", lambda x, swiglu=mlp.swiglu: swiglu(x.roll(x.shape[-1] // 2, -1))
        ),
        "wrong rotary fraction": lambda: mock.patch.object(
            attention, "rotary_cos_sin", doubled_rotary(attention.rotary_cos_sin)
        ),
        "off-by-one cache position": lambda: mock.patch.object(runner_module, "pack_decode", off_by_one),
        "bfloat16 router": lambda: mock.patch.object(
            mlp, "route", lambda logits, route=mlp.route, **kw: route(logits.bfloat16().float(), **kw)
        ),
    }
    if name == "one expert permuted":
        expert = runner.model.layers[1].mlp.experts.down_proj[3]
        with torch.inference_mode():
            expert.copy_(expert.roll(1, 0))
        yield
        return
    with patches[name]():
        yield


@contextlib.contextmanager
def jax_fault(name: str, runner: Any) -> Iterator[None]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jax_bridge import batch, plain
    from jax_bridge import runner as runner_module
    from jax_bridge.layers import attention, mlp, norm

    pay = norm.allreduce_residual_rmsnorm

    def unreduced(partial: Any, *args: Any, axis_name: str, **kwargs: Any) -> Any:
        # JAX's types do not let a part pass for a sum (see `test_a_part_is_no_sum`), so only rank 0's part is summed.
        mine = jnp.where(jax.lax.axis_index(axis_name) == 0, partial, jnp.zeros_like(partial))
        return pay(mine, *args, axis_name=axis_name, **kwargs)

    def doubled(partial: Any, *args: Any, axis_name: str, **kwargs: Any) -> Any:
        return pay(jax.lax.psum(partial, axis_name), *args, axis_name=axis_name, **kwargs)

    def off_by_one(step: Any, **kwargs: Any) -> Any:
        built = batch.build_batch(step, **kwargs)
        if not step.prefill:
            built.kv_slots[...] += 1
        return built

    add_rmsnorm = plain.add_rmsnorm
    patches: dict[str, Callable[[], Any]] = {
        "skipped reduction": lambda: mock.patch.object(
            norm, "allreduce_residual_rmsnorm", at_payment("layers.0.mixer", pay, unreduced)
        ),
        "double reduction": lambda: mock.patch.object(
            norm, "allreduce_residual_rmsnorm", at_payment("layers.0.mlp", pay, doubled)
        ),
        "w for 1 + w": lambda: mock.patch.object(norm, "WEIGHT_BIAS", 0.0),
        "w for 1 + w in the op": lambda: mock.patch.object(
            plain, "add_rmsnorm", lambda s, r, w, eps, _bias: add_rmsnorm(s, r, w, eps, 0.0)
        ),
        "swapped gate": lambda: mock.patch.object(
            mlp, "swiglu", lambda x, swiglu=mlp.swiglu: swiglu(jnp.roll(x, x.shape[-1] // 2, -1))
        ),
        "wrong rotary fraction": lambda: mock.patch.object(
            attention, "rotary_cos_sin", doubled_rotary(attention.rotary_cos_sin)
        ),
        "off-by-one cache position": lambda: mock.patch.object(runner_module, "build_batch", off_by_one),
        "bfloat16 router": lambda: mock.patch.object(
            mlp,
            "route",
            lambda x, route=mlp.route, **kw: route(x.astype(jnp.bfloat16).astype(jnp.float32), **kw),
        ),
    }
    if name == "one expert permuted":
        right = runner.parameters
        permuted = [
            (path, leaf.replace(leaf.get_value().at[3].set(jnp.roll(leaf.get_value()[3], 1, 0))))
            if path == ("layers", 1, "mlp", "experts", "down_proj")
            else (path, leaf)
            for path, leaf in nnx.to_flat_state(right)
        ]
        runner.parameters = nnx.from_flat_state(permuted)
        yield
        runner.parameters = right
        return
    with patches[name]():
        yield


def doubled_rotary(rotary_cos_sin: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(_with_rotary_dim, rotary_cos_sin)


def _with_rotary_dim(
    rotary_cos_sin: Callable[..., Any], positions: Any, *, rotary_dim: int, theta: float
) -> Any:
    return rotary_cos_sin(positions, rotary_dim=2 * rotary_dim, theta=theta)
