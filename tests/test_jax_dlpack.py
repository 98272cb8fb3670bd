"""Tensors shared with PyTorch and CuPy: the same memory both ways, and clear errors where it cannot be."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_bridge import dlpack
from tests.jax_case import mesh_of

pytestmark = pytest.mark.timeout(60)

SHARED = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bool,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.complex64,
]


class TestTorch:
    @pytest.mark.parametrize("dtype", SHARED, ids=str)
    def test_both_ways_on_one_memory(self, dtype: torch.dtype) -> None:
        tensor = torch.arange(6).reshape(2, 3).to(dtype)
        array = dlpack.from_torch(tensor)
        assert array.unsafe_buffer_pointer() == tensor.data_ptr()
        assert (array.shape, str(array.dtype)) == ((2, 3), str(dtype).removeprefix("torch."))
        back = dlpack.to_torch(array)
        assert back.data_ptr() == tensor.data_ptr()
        assert back.dtype == dtype

    def test_writes_show_on_the_other_side(self) -> None:
        """What the module's docstring warns of."""
        tensor = torch.zeros(3)
        array = dlpack.from_torch(tensor)
        kept = jnp.array(array, copy=True)
        tensor[1] = 5
        np.testing.assert_array_equal(array, [0, 5, 0])
        np.testing.assert_array_equal(kept, [0, 0, 0])

    def test_the_array_outlives_the_tensor(self) -> None:
        array = dlpack.from_torch(torch.arange(1000, dtype=torch.float32))
        torch.full((1000,), 7.0)
        np.testing.assert_array_equal(array, np.arange(1000, dtype=np.float32))

    @pytest.mark.parametrize("shape", [(), (0, 3), (1, 1)])
    def test_odd_shapes(self, shape: tuple[int, ...]) -> None:
        assert dlpack.to_torch(dlpack.from_torch(torch.ones(shape))).shape == shape

    @pytest.mark.parametrize("cut", [lambda t: t[:, 1:], lambda t: t[::2], lambda t: t.T])
    def test_strided(self, cut) -> None:
        with pytest.raises(ValueError, match=r"strides .* is not contiguous.*pass tensor.contiguous\(\)"):
            dlpack.from_torch(cut(torch.ones(4, 4)))

    def test_requires_grad(self) -> None:
        tensor = torch.ones(2, requires_grad=True)
        with pytest.raises(ValueError, match=r"requires grad.*pass tensor.detach\(\)"):
            dlpack.from_torch(tensor)
        assert dlpack.from_torch(tensor.detach()).shape == (2,)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.complex128], ids=str)
    def test_narrowing(self, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match="would be narrowed by a copy, because jax_enable_x64 is off"):
            dlpack.from_torch(torch.ones(2, dtype=dtype))

    def test_wrong_device(self) -> None:
        with pytest.raises(ValueError, match="the data is on meta, where JAX has no device: it has cpu"):
            dlpack.from_torch(torch.ones(2, device="meta"))

    def test_wrong_type(self) -> None:
        with pytest.raises(TypeError, match="takes a torch.Tensor, got ndarray"):
            dlpack.from_torch(np.ones(2))  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match="takes a jax.Array, got ndarray"):
            dlpack.to_torch(np.ones(2))  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match="being traced"):
            jax.jit(dlpack.to_torch)(jnp.ones(2))

    def test_several_devices(self) -> None:
        array = jax.device_put(jnp.ones((4, 2)), NamedSharding(mesh_of(2), P("tp")))
        with pytest.raises(ValueError, match="lies on 2 devices"):
            dlpack.to_torch(array)
        assert dlpack.to_torch(array.addressable_shards[1].data).shape == (2, 2)


class TestShards:
    def test_a_global_array(self) -> None:
        tensors = [torch.full((3, 2), float(rank)) for rank in range(4)]
        mesh = mesh_of(2, 2, names=("dp", "tp"))
        array = dlpack.shards_from_torch(tensors, mesh, P("dp", "tp"))
        assert array.shape == (6, 4)
        np.testing.assert_array_equal(array[::3, ::2], [[0, 1], [2, 3]])
        assert array.addressable_shards[0].data.unsafe_buffer_pointer() == tensors[0].data_ptr()

    @pytest.mark.parametrize(
        ("spec", "shape"), [(P("tp"), (12, 2)), (P(None, "tp"), (3, 8)), (P(), (3, 2)), (P(("tp",)), (12, 2))]
    )
    def test_specs(self, spec: P, shape: tuple[int, ...]) -> None:
        assert dlpack.shards_from_torch([torch.ones(3, 2)] * 4, mesh_of(4), spec).shape == shape

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="2 devices in this process, got 3 tensors"):
            dlpack.shards_from_torch([torch.ones(2)] * 3, mesh_of(2), P("tp"))
        with pytest.raises(ValueError, match=r"tensor 0 is .*\(2,\), but tensor 1 is .*\(3,\)"):
            dlpack.shards_from_torch([torch.ones(2), torch.ones(3)], mesh_of(2), P("tp"))
        with pytest.raises(ValueError, match="more entries than the shards"):
            dlpack.shards_from_torch([torch.ones(2)] * 2, mesh_of(2), P(None, "tp"))


class TestCupy:
    @pytest.fixture(autouse=True)
    def numpy_as_cupy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """NumPy has what is used of CuPy; its memory is the CPU's."""
        monkeypatch.setitem(
            sys.modules, "cupy", SimpleNamespace(ndarray=np.ndarray, from_dlpack=np.from_dlpack)
        )
        monkeypatch.setattr(dlpack, "_reject_unknown_device", lambda _kind: None)

    def test_both_ways_on_one_memory(self) -> None:
        source = np.arange(6, dtype=np.float32).reshape(2, 3)
        array = dlpack.from_cupy(source)
        assert dlpack.to_cupy(array).ctypes.data == array.unsafe_buffer_pointer()
        np.testing.assert_array_equal(array, source)

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="is not contiguous.*ascontiguousarray"):
            dlpack.from_cupy(np.ones((4, 4), np.float32).T[1:])
        with pytest.raises(TypeError, match="float64 would be narrowed"):
            dlpack.from_cupy(np.ones(2))
        with pytest.raises(TypeError, match="takes a cupy.ndarray, got list"):
            dlpack.from_cupy([1.0])


def test_cupy_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match="pip install cupy-cuda13x"):
        dlpack.to_cupy(jnp.ones(2))
