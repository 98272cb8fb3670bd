"""A user's own kernel as a JAX function; on CPU it gets NumPy arrays, torch tensors or raw buffers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P

import jax_bridge
from tests.jax_case import mesh_of

pytestmark = pytest.mark.timeout(60)


def like(x: jax.ShapeDtypeStruct, *_rest: Any, **_static: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@jax_bridge.cupy_kernel(out=like)
def scaled_add(out: Any, x: Any, y: Any, *, scale: float) -> None:
    """out = x + scale * y"""
    out[...] = x + np.float32(scale) * y


def test_values_and_constants() -> None:
    x, y = jnp.arange(6.0), jnp.ones(6)
    run = jax.jit(lambda x, y: (scaled_add(x, y, scale=2.0), scaled_add(x, y, scale=3.0)))
    two, three = run(x, y)
    np.testing.assert_array_equal(two, np.arange(6.0) + 2)
    np.testing.assert_array_equal(three, np.arange(6.0) + 3)
    assert scaled_add.__doc__ == "out = x + scale * y"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_torch_tensors_on_the_same_memory(dtype: Any) -> None:
    @jax_bridge.cupy_kernel(out=like, arrays="torch")
    def double(out: torch.Tensor, x: torch.Tensor) -> None:
        torch.mul(x, 2, out=out)

    np.testing.assert_array_equal(jax.jit(double)(jnp.arange(4).astype(dtype)), [0, 2, 4, 6])


def test_buffers_for_other_libraries() -> None:
    @jax_bridge.cupy_kernel(out=like, arrays="dlpack")
    def copy(out: Any, x: Any) -> None:
        np.from_dlpack(out)[...] = np.from_dlpack(x)

    np.testing.assert_array_equal(jax.jit(copy)(jnp.arange(4.0)), np.arange(4.0))


def test_several_results() -> None:
    @jax_bridge.cupy_kernel(out=lambda x: (like(x), jax.ShapeDtypeStruct((), x.dtype)))
    def split(results: Any, x: Any) -> None:
        results[0][...] = -x
        results[1][...] = x.sum()

    negative, total = jax.jit(split)(jnp.arange(4.0))
    np.testing.assert_array_equal(negative, -np.arange(4.0))
    assert total == 6


def test_in_place() -> None:
    @jax_bridge.cupy_kernel(out=like, aliases={0: 0})
    def increment(out: Any, x: Any) -> None:
        assert out.ctypes.data == x.ctypes.data
        out += 1

    x = jnp.arange(4.0)
    np.testing.assert_array_equal(jax.jit(increment)(x), np.arange(4.0) + 1)
    np.testing.assert_array_equal(x, np.arange(4.0))


@pytest.mark.parametrize("check_vma", [True, False])
def test_each_device_runs_its_shard(check_vma: bool) -> None:
    run = jax.jit(
        jax.shard_map(
            lambda x, y: scaled_add(x, y, scale=2.0),
            mesh=mesh_of(4),
            in_specs=(P("tp"), P()),
            out_specs=P("tp"),
            check_vma=check_vma,
        )
    )
    np.testing.assert_array_equal(run(jnp.arange(8.0), jnp.ones(2)), np.arange(8.0) + 2)


def test_vmap() -> None:
    x = jnp.arange(6.0).reshape(3, 2)
    got = jax.vmap(lambda x: scaled_add(x, jnp.ones(2), scale=1.0))(x)
    np.testing.assert_array_equal(got, x + 1)


def test_an_error_in_the_kernel_reaches_the_caller() -> None:
    @jax_bridge.cupy_kernel(out=like)
    def broken(_out: Any, _x: Any) -> None:
        raise ArithmeticError("the kernel is broken")

    with pytest.raises(jax.errors.JaxRuntimeError, match="the kernel is broken"):
        jax.block_until_ready(jax.jit(broken)(jnp.ones(2)))


def test_arguments() -> None:
    with pytest.raises(ValueError, match="arrays must be one of cupy, torch, dlpack, got 'jax'"):
        jax_bridge.cupy_kernel(out=like, arrays="jax")
