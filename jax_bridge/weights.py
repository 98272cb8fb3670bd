"""Fill a model's parameters, sharded over the mesh: from a checkpoint, from live PyTorch ranks, or at random.

Shapes: a parameter has one rank's shape in the model, and here that of all ranks' shares side by side along its
split dim. The shares are those of `core_torch`, so a rank's tensor there is a device's shard here.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from jax_bridge.axes import axes_of
from jax_bridge.dlpack import shards_from_torch
from jax_bridge.models.qwen3_next import Qwen3Next
from jax_bridge.parallel import Parallel
from shared_config.checkpoint import FLOAT32_PARAMETERS, Piece, check_names, is_packed, plan_rank
from shared_config.checkpoint_files import CheckpointFiles
from shared_config.model import Qwen3NextConfig

# Gives a model's parameters, by name, over the mesh: one of this file's functions with its last arguments bound.
Weights = Callable[[Qwen3Next, Parallel, jnp.dtype], dict[str, jax.Array]]


def named_parameters(model: Qwen3Next | nnx.State) -> dict[str, nnx.Param]:
    """A model's parameters, or those of its state, by the names of `shared_config.checkpoint`. A tied head has none."""
    return {
        ".".join(map(str, path)): parameter
        for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def parameter_specs(model: Qwen3Next) -> dict[str, PartitionSpec]:
    """How each parameter is split over the mesh."""
    return {
        name: PartitionSpec(*parameter.get_metadata("out_sharding"))
        for name, parameter in named_parameters(model).items()
    }


def parameter_dtype(name: str, dtype: jnp.dtype) -> jnp.dtype:
    """`dtype`, but for what must stay float32."""
    return jnp.dtype("float32") if name.rsplit(".", 1)[-1] in FLOAT32_PARAMETERS else dtype


def materialize(model: Qwen3Next, values: Mapping[str, jax.Array]) -> None:
    """Give an abstract model its arrays."""
    parameters = named_parameters(model)
    assert parameters.keys() == values.keys()
    state = nnx.state(model, nnx.Param)
    flat = [
        (path, parameter.replace(values[".".join(map(str, path))]))
        for path, parameter in nnx.to_flat_state(state)
    ]
    nnx.update(model, nnx.from_flat_state(flat))


def load_checkpoint(
    model: Qwen3Next,
    parallel: Parallel,
    dtype: jnp.dtype,
    *,
    config: Qwen3NextConfig,
    folder: Path,
    progress: bool,
) -> dict[str, jax.Array]:
    """The parameters from `folder`, each device's slices read and placed on it alone.

    Raises ValueError naming tensors that are missing, unexpected or misshapen.
    """
    files = CheckpointFiles(folder, "np")
    packed = is_packed(files.shapes)
    plans = [plan_rank(config, parallel.layout, rank, packed=packed) for rank in range(parallel.mesh.size)]
    check_names(plans[0], files.shapes, tied=config.tie_word_embeddings)
    pieces: list[dict[str, list[Piece]]] = [{} for _ in plans]
    for plan, by_name in zip(plans, pieces, strict=True):
        for piece in plan.pieces:
            by_name.setdefault(piece.parameter, []).append(piece)

    def reader(name: str, shape: tuple[int, ...], owners: dict[Any, int]) -> Callable[[Any], np.ndarray]:
        def read(index: tuple[slice, ...]) -> np.ndarray:
            """The shard at `index` of the whole parameter."""
            rank = owners[_start(index)]
            shard = np.zeros(shape, parameter_dtype(name, dtype))  # the vocabulary's padding rows stay zero
            for piece in pieces[rank][name]:
                box = shard[piece.parameter_box]
                box[...] = files.read(piece.source, piece.source_box).astype(shard.dtype).reshape(box.shape)
            return shard

        return read

    values = {}
    specs = parameter_specs(model)
    bar = tqdm(
        named_parameters(model).items(),
        desc="loading",
        unit="parameter",
        disable=not progress,
        leave=False,
    )
    for name, parameter in bar:
        shape, sharding = _whole(parameter.shape, specs[name], parallel.mesh)
        places = sharding.devices_indices_map(shape)
        # Of the ranks that hold the same shard any will do.
        owners = {_start(places[device]): rank for rank, device in enumerate(parallel.mesh.devices.flat)}
        values[name] = jax.make_array_from_callback(shape, sharding, reader(name, parameter.shape, owners))
    return values


def _start(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(part.start or 0 for part in index)


def take_torch_shards(
    model: Qwen3Next, parallel: Parallel, dtype: jnp.dtype, *, ranks: Sequence[Mapping[str, Any]]
) -> dict[str, jax.Array]:
    """The parameters on the memory of `ranks`: the named parameters of each rank of a `core_torch` model, detached.

    Nothing is copied on GPUs (see `jax_bridge.dlpack` for what sharing means). Raises ValueError naming a parameter
    that is missing or has another shape or dtype.
    """
    if len(ranks) != parallel.mesh.size:
        raise ValueError(
            f"ranks has {len(ranks)} entries for {parallel.mesh.size} devices; give one for each"
        )
    values = {}
    specs = parameter_specs(model)
    for name, parameter in named_parameters(model).items():
        wanted = (tuple(parameter.shape), parameter_dtype(name, dtype).name)
        for rank, tensors in enumerate(ranks):
            if name not in tensors:
                raise ValueError(f"ranks[{rank}] lacks {name!r}; give all named_parameters() of the model")
            tensor = tensors[name]
            got = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            if got != wanted:
                raise ValueError(
                    f"ranks[{rank}][{name!r}] is {got[1]} {got[0]}, expected {wanted[1]} {wanted[0]}"
                )
        values[name] = shards_from_torch([tensors[name] for tensors in ranks], parallel.mesh, specs[name])
    return values


def dummy_weights(
    model: Qwen3Next, parallel: Parallel, dtype: jnp.dtype, *, seed: int
) -> dict[str, jax.Array]:
    """Random weights of the real shapes, made on the devices, at scales that keep activations and routing alive.

    The distributions are those of `core_torch.weights.fill_dummy`; the numbers are not.
    """
    values = {}
    specs = parameter_specs(model)
    for name, parameter in named_parameters(model).items():
        shape, sharding = _whole(parameter.shape, specs[name], parallel.mesh)
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=4).digest()
        key = jax.random.key(int.from_bytes(digest, "little"))
        draw = _draw(_distribution(name, parameter.shape), shape, parameter_dtype(name, dtype), sharding)
        values[name] = draw(key)
    return values


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[str, float, float]:
    """("uniform", low, high) or ("normal", mean, deviation) for a parameter of one rank's `shape`."""
    if name.endswith("A_log"):
        return "uniform", math.log(0.01), math.log(16.0)
    if name.endswith("dt_bias"):
        return "uniform", -4.0, 1.0
    if len(shape) == 1:
        return "normal", float(name.endswith("mixer.norm.weight")), 0.1
    return "normal", 0.0, shape[-1] ** -0.5


@functools.cache
def _draw(
    distribution: tuple[str, float, float], shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding
) -> Callable[[jax.Array], jax.Array]:
    """Compiled once for all layers."""
    kind, a, b = distribution

    def draw(key: jax.Array) -> jax.Array:
        if kind == "uniform":
            return jax.random.uniform(key, shape, jnp.float32, a, b).astype(dtype)
        return (jnp.float32(a) + jnp.float32(b) * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)


def _whole(
    shape: tuple[int, ...], spec: PartitionSpec, mesh: jax.sharding.Mesh
) -> tuple[tuple[int, ...], NamedSharding]:
    """The shape of all ranks' shares of a parameter, and where they lie."""
    sizes = (math.prod(mesh.shape[name] for name in axes_of(axis or ())) for axis in spec)
    return tuple(n * size for n, size in zip(shape, sizes, strict=True)), NamedSharding(mesh, spec)
