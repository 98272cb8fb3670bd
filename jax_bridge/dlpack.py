"""Tensors between PyTorch, CuPy and JAX on the same memory, without copies.

What both sides have to know, because both now own one buffer:

- Lifetime: each side keeps the buffer alive for as long as it holds its view.
- Mutability: JAX believes that arrays never change, and a DLPack view cannot enforce it. An in-place write by
  PyTorch or CuPy shows in the JAX array, also in the middle of a computation that reads it, and a JAX array that
  is donated is handed back to JAX under the other side's feet. Share what nobody writes any more, or copy:
  `jnp.array(x, copy=True)`, `tensor.clone()`.
- Streams: DLPack's protocol orders the two sides' current streams at the exchange, and only there.
- Memory: both allocators live on one GPU, and JAX preallocates most of it: set `XLA_PYTHON_CLIENT_MEM_FRACTION`.

float32, float16, bfloat16, float8, complex64, bool and the integers up to 32 bits are shared as they are. 64-bit
types would be narrowed by a copy while `jax_enable_x64` is off, which is an error here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import jax
from jax.core import Tracer

from jax_bridge.packages import require_cupy, require_torch

if TYPE_CHECKING:
    import torch

NARROWED = ("int64", "uint64", "float64", "complex128")


def from_torch(tensor: torch.Tensor) -> jax.Array:
    """A `jax.Array` on `tensor`'s memory, same shape, dtype and device.

    Raises ValueError for a tensor that is strided, requires grad, or lies where JAX has no device; TypeError for
    a dtype that JAX would narrow.
    """
    torch = require_torch()
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"from_torch takes a torch.Tensor, got {type(tensor).__name__}")
    if tensor.requires_grad:
        raise ValueError(
            f"a {tuple(tensor.shape)} tensor requires grad, and autograd cannot follow it into JAX: "
            "pass tensor.detach()"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"a {tuple(tensor.shape)} tensor with strides {tensor.stride()} is not contiguous, and JAX arrays are: "
            "pass tensor.contiguous()"
        )
    _reject_narrowing(str(tensor.dtype).removeprefix("torch."))
    _reject_unknown_device(tensor.device.type)
    # torch exports only what lies on its current GPU.
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        return jax.dlpack.from_dlpack(tensor)


def to_torch(array: jax.Array) -> torch.Tensor:
    """A `torch.Tensor` on the memory of an array on one device. Writing to it breaks JAX's rules: see above.

    Raises ValueError for an array that lies on several devices.
    """
    torch = require_torch()
    _require_one_device(array, "to_torch")
    return torch.from_dlpack(array)


def from_cupy(array: Any) -> jax.Array:
    """A `jax.Array` on the memory of a `cupy.ndarray`. Raises as `from_torch` does."""
    cupy = require_cupy()
    if not isinstance(array, cupy.ndarray):
        raise TypeError(f"from_cupy takes a cupy.ndarray, got {type(array).__name__}")
    if not array.flags.c_contiguous:
        raise ValueError(
            f"a {array.shape} array with strides {array.strides} is not contiguous, and JAX arrays are: "
            "pass cupy.ascontiguousarray(array)"
        )
    _reject_narrowing(str(array.dtype))
    _reject_unknown_device("cuda")
    return jax.dlpack.from_dlpack(array)


def to_cupy(array: jax.Array) -> Any:
    """A `cupy.ndarray` on the memory of an array on one GPU. Raises as `to_torch` does."""
    cupy = require_cupy()
    _require_one_device(array, "to_cupy")
    return cupy.from_dlpack(array)


def shards_from_torch(
    tensors: Sequence[torch.Tensor], mesh: jax.sharding.Mesh, spec: jax.sharding.PartitionSpec
) -> jax.Array:
    """One global array over `mesh` from one tensor per local device, in the order of `mesh.devices`.

    Each tensor is that device's shard, on that GPU, and is not copied. (Virtual CPU devices share one memory, of
    which JAX counts a tensor to the first: shards of the others are copied.) All shards have one shape and dtype.
    """
    me = jax.process_index()
    devices = [device for device in mesh.devices.flat if device.process_index == me]
    if len(tensors) != len(devices):
        raise ValueError(
            f"the mesh has {len(devices)} devices in this process, got {len(tensors)} tensors: give one for each"
        )
    if not tensors:
        raise ValueError("shards_from_torch needs at least one tensor")
    first = tensors[0]
    for index, tensor in enumerate(tensors):
        if tensor.shape != first.shape or tensor.dtype != first.dtype:
            raise ValueError(
                f"tensor 0 is {first.dtype} {tuple(first.shape)}, but tensor {index} is {tensor.dtype} "
                f"{tuple(tensor.shape)}: all shards must be alike"
            )
    sharding = jax.sharding.NamedSharding(mesh, spec)
    shards = []
    for index, (tensor, device) in enumerate(zip(tensors, devices, strict=True)):
        shard = from_torch(tensor)
        if shard.device != device:
            if device.platform != "cpu":
                raise ValueError(
                    f"tensor {index} is on {tensor.device}, but its place in the mesh is {device}: "
                    "move it there, or order the tensors as mesh.devices"
                )
            shard = jax.device_put(shard, device)
        shards.append(shard)
    shape = _global_shape(sharding, tuple(first.shape))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _global_shape(sharding: jax.sharding.NamedSharding, shard: tuple[int, ...]) -> tuple[int, ...]:
    names = [*sharding.spec, *[None] * (len(shard) - len(sharding.spec))]
    if len(names) > len(shard):
        raise ValueError(f"spec {sharding.spec} has more entries than the shards {shard} have dims")
    sizes = []
    for size, name in zip(shard, names, strict=True):
        axes = () if name is None else (name,) if isinstance(name, str) else tuple(name)
        for axis in axes:
            size *= sharding.mesh.shape[axis]
        sizes.append(size)
    return tuple(sizes)


def _reject_narrowing(dtype: str) -> None:
    if dtype in NARROWED and not jax.config.read("jax_enable_x64"):
        raise TypeError(
            f"{dtype} would be narrowed by a copy, because jax_enable_x64 is off: "
            "convert it to a 32-bit type first, or enable x64"
        )


def _reject_unknown_device(kind: str) -> None:
    platform = {"cuda": "gpu"}.get(kind, kind)
    known = sorted({device.platform for device in jax.devices()} | {"cpu"})
    if platform not in known:
        raise ValueError(f"the data is on {kind}, where JAX has no device: it has {', '.join(known)}")


def _require_one_device(array: jax.Array, what: str) -> None:
    if not isinstance(array, jax.Array):
        raise TypeError(f"{what} takes a jax.Array, got {type(array).__name__}")
    if isinstance(array, Tracer):
        raise TypeError(f"{what} takes an array with data, not one that is being traced ({array.aval})")
    if len(array.devices()) != 1:
        raise ValueError(
            f"a {array.shape} array lies on {len(array.devices())} devices: take one shard's, "
            "array.addressable_shards[i].data"
        )
