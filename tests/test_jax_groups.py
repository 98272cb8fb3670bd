"""Groups along mesh axes: one axis or several, several groups of each, several communicators of one mesh."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_bridge
from core_torch.kernels.contract import sum_in_rank_order
from core_torch.kernels.counts import ReductionCounts
from jax_bridge.axes import axes_of, in_mesh_order
from jax_bridge.devices import AxisGroups
from shared_config import ParallelLayout
from tests.jax_case import EPS, D, assert_close, decide, mesh_of, operands

pytestmark = pytest.mark.timeout(60)

NAMES = ("cp", "tp", "ep")
CUBE = functools.partial(mesh_of, 2, 2, 2, names=NAMES)


def open_over(mesh: Mesh, axis_name: Any, decision: Any = None, dtype: Any = jnp.float32) -> Any:
    size = math.prod(mesh.shape[name] for name in axes_of(axis_name))
    decision = decision or decide(size, mode="on" if size > 1 else "auto")
    return jax_bridge.fused_communicator(mesh, axis_name, D, dtype, decision, max_tokens=64, timeout_s=10.0)


def reduced_over(mesh: Mesh, axis_name: Any, check_vma: bool = True) -> Any:
    """partial [2, 2, 2, T, D], one a device, and a residual [2, 2, 2, T, D] -> the new residuals, one a device."""
    lead = P(*mesh.axis_names)
    own = P(*(name if name not in axes_of(axis_name) else None for name in mesh.axis_names))

    def step(partial: jax.Array, residual: jax.Array, weight: jax.Array) -> jax.Array:
        index = (0,) * mesh.devices.ndim
        op = jax_bridge.allreduce_residual_rmsnorm
        return op(partial[index], residual[index], weight, axis_name=axis_name, eps=EPS)[0][
            (None,) * mesh.devices.ndim
        ]

    return jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(lead, own, P()), out_specs=own, check_vma=check_vma)
    )


@pytest.mark.parametrize("axis_name", ["cp", "tp", ("cp", "ep"), ("ep", "cp"), NAMES, ()], ids=str)
def test_each_group_sums_its_own(axis_name: Any) -> None:
    """On a cube of 8 devices every slice has its own sum and its own residual, fused and unfused."""
    mesh, data = CUBE(), operands(8, 3)
    partial = data.partial.reshape(2, 2, 2, 3, D)
    axes = tuple(NAMES.index(name) for name in axes_of(axis_name))
    residual = np.arange(8, dtype=np.float32).reshape(2, 2, 2, 1, 1) + np.asarray(data.residual)
    residual = jnp.asarray(residual[tuple(slice(1) if axis in axes else slice(None) for axis in range(3))])
    expected = np.asarray(partial).astype(np.float64).sum(axes, keepdims=True) + np.asarray(residual)
    for check_vma in (True, False):
        run = reduced_over(mesh, axis_name, check_vma)
        assert_close(run(partial, residual, data.weight), expected)
        with open_over(mesh, axis_name) as comm:
            assert comm.axis_size == 2 ** len(axes)
            counts = jax_bridge.explain(run, partial, residual, data.weight).counts
            assert counts == (ReductionCounts(fused=1) if axes else ReductionCounts())
            assert_close(jax.block_until_ready(run(partial, residual, data.weight)), expected)


def test_groups_of_ranks_that_are_not_neighbours() -> None:
    """Over the first axis of 2 x 2 ranks the groups are [0, 2] and [1, 3]."""
    mesh = mesh_of(2, 2, names=("cp", "tp"))
    groups = AxisGroups.of(mesh, "cp")
    assert [[device.id for device in row] for row in groups.devices] == [[0, 2], [1, 3]]
    data = operands(4)
    partial = data.partial.reshape(2, 2, 5, D)
    residual = jnp.stack([data.residual, -data.residual])[None]
    with open_over(mesh, "cp"):
        got = jax.block_until_ready(reduced_over(mesh, "cp")(partial, residual, data.weight))
    assert_close(got, np.asarray(partial.sum(0, keepdims=True) + residual))


def test_several_axes_count_ranks_in_the_mesh_s_order() -> None:
    mesh = CUBE()
    for axis_name in (("cp", "ep"), ("ep", "cp")):
        ids = [[device.id for device in row] for row in AxisGroups.of(mesh, axis_name).devices]
        assert ids == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert in_mesh_order(("ep", "cp"), NAMES) == ("cp", "ep")
    assert in_mesh_order(("tp",), NAMES) == "tp"
    with pytest.raises(ValueError, match="names an axis twice"):
        in_mesh_order(("tp", "tp"), NAMES)
    with pytest.raises(ValueError, match="'dp' is not an axis of the mesh"):
        in_mesh_order(("tp", "dp"), NAMES)
    with pytest.raises(TypeError, match="or a tuple of names, got"):
        in_mesh_order(["tp"], NAMES)  # pyright: ignore[reportArgumentType]


def test_pinned_order_over_several_axes() -> None:
    """`deterministic` adds in rank order in float32; in bfloat16 another order would show."""
    mesh, data = CUBE(), operands(8, 7, jnp.bfloat16)
    partial, residual = data.partial.reshape(2, 2, 2, 7, D), data.residual[None, None, None]
    decision = decide(8, mode="auto", deterministic=True, itemsize=2)
    with open_over(mesh, NAMES, decision, jnp.bfloat16):
        got = reduced_over(mesh, NAMES)(partial, residual, data.weight)[0, 0, 0]
    total = sum_in_rank_order(torch.from_numpy(np.asarray(data.partial, np.float32)).bfloat16())
    want = torch.from_numpy(np.asarray(data.residual, np.float32)).bfloat16() + total
    assert (np.asarray(got, np.float32) == want.float().numpy()).all()


def test_gradients_over_several_axes() -> None:
    mesh, data = CUBE(), operands(8, 3)

    def loss(partial: jax.Array, residual: jax.Array, weight: jax.Array, check_vma: bool) -> jax.Array:
        def step(partial: jax.Array, residual: jax.Array, weight: jax.Array) -> Any:
            return jax_bridge.allreduce_residual_rmsnorm(
                partial[0], residual, weight, axis_name=("ep", "cp", "tp"), eps=EPS
            )

        run = jax.shard_map(
            step, mesh=mesh, in_specs=(P(NAMES), P(), P()), out_specs=P(), check_vma=check_vma
        )
        new_residual, normed = run(partial, residual, weight)
        return (new_residual * normed).sum()

    def plain(partial: jax.Array, residual: jax.Array, weight: jax.Array) -> jax.Array:
        s = residual + partial.sum(0)
        return (s * s * jax.lax.rsqrt((s * s).mean(-1, keepdims=True) + EPS) * (1 + weight)).sum()

    expected = jax.grad(plain, (0, 1, 2))(*data)
    with open_over(mesh, NAMES):
        for check_vma in (True, False):
            got = jax.jit(jax.grad(functools.partial(loss, check_vma=check_vma), (0, 1, 2)))(*data)
            for one, other in zip(jax.block_until_ready(got), expected, strict=True):
                assert_close(one, np.asarray(other))


class TestTwoGroups:
    """Attention over all four ranks, the MoE within slices of two: each sum is for its own communicator."""

    LAYOUT = ParallelLayout(tp_size=4, moe_dp_size=2)
    ALL = ("moe_dp", "tp")

    def layer(self, partial: jax.Array, residual: jax.Array, weight: jax.Array) -> jax.Array:
        pay = functools.partial(jax_bridge.allreduce_residual_rmsnorm, eps=EPS)
        residual, normed = pay(partial[0, 0], residual, weight, axis_name=self.ALL)
        rank = jax.lax.axis_index("tp").astype(jnp.float32)
        return pay(normed * (rank + 1), residual, weight, axis_name="tp", side="mlp")[0]

    def run(self, mesh: Mesh, data: Any) -> Any:
        step = jax.shard_map(self.layer, mesh=mesh, in_specs=(P(*self.ALL), P(), P()), out_specs=P())
        return jax.jit(step), (data.partial.reshape(2, 2, 5, D), data.residual, data.weight)

    def test_each_is_paid_to_its_own(self) -> None:
        mesh, data = mesh_of(2, 2, names=self.ALL), operands(4)
        run, arguments = self.run(mesh, data)
        residual, normed = data.expected()
        decision = decide(4, layout=self.LAYOUT)
        with open_over(mesh, self.ALL, decision) as first, open_over(mesh, "tp", decision) as second:
            assert (first.id, second.id) == (0, 1)
            report = jax_bridge.explain(run, *arguments)
            assert [(call.fused, call.axis_name) for call in report.calls] == [(True, self.ALL), (True, "tp")]
            assert "over ('moe_dp', 'tp')" in str(report)
            assert_close(jax.block_until_ready(run(*arguments)), residual + 3 * normed)

    def test_another_group_s_communicator_is_refused(self) -> None:
        mesh, data = mesh_of(2, 2, names=self.ALL), operands(4)
        decision = decide(4, layout=self.LAYOUT)
        with open_over(mesh, self.ALL, decision) as comm:
            with pytest.raises(ValueError, match=r"axis_name is 'tp', but the communicator reduces over \("):
                jax.eval_shape(
                    jax.shard_map(
                        lambda x: jax_bridge.allreduce(x, axis_name="tp", comm=comm),
                        mesh=mesh,
                        in_specs=P("tp"),
                        out_specs=P(),
                    ),
                    data.residual[:4],
                )
            # Without a communicator of its own the MoE's sum is unfused, not the other group's.
            run, arguments = self.run(mesh, data)
            report = jax_bridge.explain(run, *arguments)
            assert [call.fused for call in report.calls] == [True, False]
            assert report.calls[1].reason == "no fused communicator is open for axis 'tp'"
            answer = comm.answer((5, D), jnp.dtype("float32"), side="mlp")
            assert answer.reason == "the sum is owed to ranks [0, 1], the op reduces over [0, 1, 2, 3]"

    def test_the_mlp_rules_hold(self) -> None:
        """The gather over context-parallel ranks, and experts with tensor parallelism, as the decision has them."""
        mesh = mesh_of(2, 2, names=("cp", "tp"))
        layout = ParallelLayout(tp_size=4, attn_cp_size=2)
        with open_over(mesh, ("cp", "tp"), decide(4, layout=layout)) as comm:
            answer = comm.answer((5, D), jnp.dtype("float32"), side="mlp")
            assert "attn_cp_size 2 is above moe_dp_size 1" in answer.reason
        layout = ParallelLayout(tp_size=4, ep_size=2)
        with open_over(mesh, ("cp", "tp"), decide(4, layout=layout)) as comm:
            assert comm.answer((5, D), jnp.dtype("float32"), side="mlp").fuses
