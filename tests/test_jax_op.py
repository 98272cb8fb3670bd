"""The reductions as functions: values, dtypes, batch dims, when they fuse, and what they refuse to trace."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P

import jax_bridge
from core_torch.kernels.contract import add_rmsnorm, sum_in_rank_order
from core_torch.kernels.counts import ReductionCounts
from core_torch.kernels.norm import rms_norm_reference
from shared_config import FusionError, FusionWarning
from tests.jax_case import (
    EPS,
    D,
    assert_close,
    decide,
    mesh_of,
    open_fused,
    operands,
    per_rank,
    reduce_norm,
    reduce_sum,
)

pytestmark = pytest.mark.timeout(60)


def to_torch(array: jax.Array) -> torch.Tensor:
    return jax_bridge.dlpack.to_torch(jax.device_put(array, jax.devices()[0]))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_fused_and_unfused_agree_with_float64(num_ranks: int, check_vma: bool) -> None:
    mesh, data = mesh_of(num_ranks), operands(num_ranks)
    run = per_rank(reduce_norm, mesh, check_vma)
    for residual, normed in (run(*data), run_fused(run, mesh, data)):
        expected = data.expected()
        assert_close(residual, expected[0])
        assert_close(normed, expected[1])


def run_fused(run, mesh, data):
    with open_fused(mesh):
        assert jax_bridge.explain(run, *data).counts == ReductionCounts(fused=1)
        return jax.block_until_ready(run(*data))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 3, 63, 64])
def test_the_kernel_rounds_as_the_contract_says(dtype: jnp.dtype, num_tokens: int) -> None:
    mesh, data = mesh_of(4), operands(4, num_tokens, dtype)
    with open_fused(mesh, dtype) as comm:
        for weight_bias in (0.0, 1.0):
            run = per_rank(lambda *xs, b=weight_bias: reduce_norm(*xs, weight_bias=b, comm=comm), mesh)
            residual, normed = run(*data)
            total = sum_in_rank_order(to_torch(data.partial))
            want = add_rmsnorm(total, to_torch(data.residual), to_torch(data.weight), EPS, weight_bias)
            assert torch.equal(to_torch(residual), want[0]), (
                "the residual is exact: sums in rank order, rounded"
            )
            # The mean of squares may be summed in another order.
            torch.testing.assert_close(
                to_torch(normed), want[1], rtol=1.6e-2 if dtype == jnp.bfloat16 else 2e-3, atol=1e-6
            )
            assert_close(normed, data.expected(weight_bias)[1], dtype)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_unfused_the_norm_is_of_the_residual_as_it_is_stored(dtype: jnp.dtype) -> None:
    """XLA may leave out the rounding to bfloat16 between the add and the norm, by a flag."""
    data = operands(2, 67, dtype, hidden_size=1000)
    tiny = jnp.full_like(data.residual, 3e-7)  # subnormal in float16
    run = per_rank(reduce_norm, mesh_of(2))
    results = []
    for excess_precision in (True, False):
        options = {"xla_allow_excess_precision": excess_precision}
        program = run.lower(*data).compile(compiler_options=options)
        results.append([np.asarray(part) for part in program(*data)])
        kept, _ = program(jnp.zeros_like(data.partial), tiny, data.weight)
        np.testing.assert_array_equal(kept, tiny)
    for part, same_part in zip(*results, strict=True):
        np.testing.assert_array_equal(part, same_part)
    stored, normed = (to_torch(part) for part in run(*data))
    expected = rms_norm_reference(stored, to_torch(data.weight), eps=EPS, weight_bias=1.0).to(stored.dtype)
    assert (normed != expected).float().mean() < 0.01  # 0.19 of a residual that was not rounded


def test_every_rank_gets_the_same_bits() -> None:
    mesh, data = mesh_of(4), operands(4, 7, jnp.bfloat16)
    with open_fused(mesh, jnp.bfloat16):
        run = per_rank(reduce_norm, mesh, check_vma=False, out_specs=P("tp"))
        for result in run(*data):
            shards = [np.asarray(shard.data).view(np.uint16) for shard in result.addressable_shards]
            assert all((shard == shards[0]).all() for shard in shards)


@pytest.mark.parametrize("fused", [True, False])
def test_the_plain_sum(fused: bool) -> None:
    mesh, data = mesh_of(4), operands(4)
    run = per_rank(lambda partial, *_: reduce_sum(partial), mesh)
    with open_fused(mesh, decision=decide(4, mode="on" if fused else "off")):
        report = jax_bridge.explain(run, *data)
        assert [call.fused for call in report.calls] == [fused]
        assert report.counts == ReductionCounts(plain=1)
        assert_close(run(*data), np.asarray(data.partial).astype(np.float64).sum(0))


@pytest.mark.parametrize("lead", [(), (2,), (2, 1, 3)])
def test_leading_dims_are_tokens(lead: tuple[int, ...]) -> None:
    mesh, data = mesh_of(2), operands(2, math.prod(lead))
    partial = data.partial.reshape(2, *lead, D)
    residual = data.residual.reshape(*lead, D)
    with open_fused(mesh):
        got = jax.block_until_ready(per_rank(reduce_norm, mesh)(partial, residual, data.weight))
    for result, expected in zip(got, data.expected(), strict=True):
        assert result.shape == (*lead, D)
        assert_close(result, expected.reshape(*lead, D))


def test_one_group_per_slice_of_the_other_axes() -> None:
    """A mesh of 2 x 2 x 2: the sums of different slices must not mix, whichever axis is reduced."""
    mesh = mesh_of(2, 2, 2, names=("dp", "tp", "ep"))
    data = operands(8, 3)
    by_axis = data.partial.reshape(2, 2, 2, 3, D)
    residual = jnp.stack([data.residual * float(1 + dp) for dp in range(2)])

    def step(partial, residual, weight):
        return reduce_norm(partial[0, 0, 0], residual[0], weight)[0][None, None]

    for check_vma in (True, False):
        run = jax.jit(
            jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(P("dp", "tp", "ep"), P("dp"), P()),
                out_specs=P("dp", "ep"),
                check_vma=check_vma,
            )
        )
        with open_fused(mesh):
            assert jax_bridge.explain(run, by_axis, residual, data.weight).counts.fused == 1
            got = jax.block_until_ready(run(by_axis, residual, data.weight))
        assert_close(got, np.asarray(by_axis.sum(1) + residual[:, None]))


def test_a_mesh_with_explicit_axes() -> None:
    mesh = jax.make_mesh((2,), ("tp",), devices=jax.devices()[:2])
    data = operands(2)
    partial = jax.device_put(data.partial, jax.sharding.NamedSharding(mesh, P("tp")))
    residual, weight = jax.device_put((data.residual, data.weight), jax.sharding.NamedSharding(mesh, P()))
    with open_fused(mesh):
        got = jax.block_until_ready(per_rank(reduce_norm, mesh)(partial, residual, weight))
    assert_close(got[1], data.expected()[1])


def test_two_communicators_over_two_axes() -> None:
    mesh = mesh_of(2, 2, names=("tp", "ep"))
    data = operands(4)
    partial = data.partial.reshape(2, 2, 5, D)

    def step(partial, residual, weight):
        residual, _ = reduce_norm(partial[0, 0], residual, weight)
        return jax_bridge.allreduce_residual_rmsnorm(residual, residual, weight, axis_name="ep", eps=EPS)[0]

    run = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(P("tp", "ep"), P(), P()), out_specs=P(), check_vma=False)
    )
    with (
        open_fused(mesh) as first,
        jax_bridge.fused_communicator(mesh, "ep", D, jnp.float32, decide(2), max_tokens=64) as second,
    ):
        assert (first.id, second.id) == (0, 1)
        # The first result varies over "ep", so it is no residual to share: the rendezvous finds that out.
        with pytest.raises(jax.errors.JaxRuntimeError, match="residual differs between ranks"):
            jax.block_until_ready(run(partial, data.residual, data.weight))
        same = jnp.broadcast_to(partial[:, :1], partial.shape)
        assert jax_bridge.explain(run, same, data.residual, data.weight).counts.fused == 2


class TestFallback:
    """Everything that does not fuse runs unfused with the same numbers, and says why."""

    def check(self, run, data, reason: str) -> None:
        report = jax_bridge.explain(run, *data)
        assert report.counts == ReductionCounts(unfused=1)
        assert reason in report.calls[0].reason
        assert reason in str(report)
        assert_close(run(*data)[1], data.expected()[1], data.partial.dtype)

    def test_no_communicator(self) -> None:
        self.check(
            per_rank(reduce_norm, mesh_of(2)), operands(2), "no fused communicator is open for axis 'tp'"
        )

    def test_auto_on_cpu(self) -> None:
        decision = decide(2, mode="auto", backend="auto")
        with open_fused(mesh_of(2), decision=decision) as comm:
            assert not comm.decision.enabled
            self.check(per_rank(reduce_norm, mesh_of(2)), operands(2), "no CUDA GPU was found")

    def test_switched_off(self) -> None:
        with open_fused(mesh_of(2), decision=decide(2, mode="off")):
            self.check(per_rank(reduce_norm, mesh_of(2)), operands(2), "switched off by the user")

    def test_above_the_decision_s_limit(self) -> None:
        decision = decide(2, max_bytes=4 * D * 4)
        with open_fused(mesh_of(2), decision=decision):
            self.check(per_rank(reduce_norm, mesh_of(2)), operands(2, 5), "above the limit of 4")

    def test_above_the_workspace(self) -> None:
        with open_fused(mesh_of(2), max_tokens=4) as comm:
            assert comm.max_tokens == 4
            self.check(per_rank(reduce_norm, mesh_of(2)), operands(2, 5), "above the workspace's 4")

    def test_another_hidden_size(self) -> None:
        with open_fused(mesh_of(2)):
            self.check(per_rank(reduce_norm, mesh_of(2)), operands(2, hidden_size=16), "hidden size 16")

    def test_another_dtype(self) -> None:
        with open_fused(mesh_of(2)):
            self.check(per_rank(reduce_norm, mesh_of(2)), operands(2, dtype=jnp.bfloat16), "bfloat16 is not")

    def test_another_mesh(self) -> None:
        with open_fused(mesh_of(2)):
            self.check(per_rank(reduce_norm, mesh_of(4)), operands(4), "this code runs over {'tp': 4}")

    def test_axes_that_are_not_manual(self) -> None:
        mesh = mesh_of(2, 2, names=("dp", "tp"))
        data = operands(2)
        with open_fused(mesh):
            run = jax.jit(
                jax.shard_map(
                    lambda partial, *rest: reduce_norm(partial[0], *rest),
                    mesh=mesh,
                    in_specs=(P("tp"), P(), P()),
                    out_specs=P(),
                    axis_names={"tp"},
                )
            )
            self.check(run, data, "mesh axes ['dp'] are not manual")

    def test_deterministic_sums_in_rank_order(self) -> None:
        """In bfloat16 the order of a sum shows: the pinned order is the contract's."""
        data = operands(8, 7, jnp.bfloat16)
        decision = decide(8, mode="auto", deterministic=True, itemsize=2)
        for check_vma in (True, False):
            with open_fused(mesh_of(8), jnp.bfloat16, decision):
                run = per_rank(reduce_norm, mesh_of(8), check_vma)
                self.check(run, data, "deterministic")
                residual, _ = run(*data)
            total = sum_in_rank_order(to_torch(data.partial))
            assert torch.equal(to_torch(residual), to_torch(data.residual) + total)

    def test_a_group_of_one_counts_nothing(self) -> None:
        run = per_rank(reduce_norm, mesh_of(1))
        data = operands(1)
        assert jax_bridge.explain(run, *data).calls == ()
        assert_close(run(*data)[1], data.expected()[1])

    def test_no_tokens(self) -> None:
        with open_fused(mesh_of(2)):
            assert per_rank(reduce_norm, mesh_of(2))(*operands(2, 0))[1].shape == (0, D)

    def test_gpu_decision_on_a_cpu_mesh(self) -> None:
        decision = decide(2)
        gpu = type(decision)(**{**decision.__dict__, "backend": "trtllm", "mode": "auto"})
        opening = open_fused(mesh_of(2), decision=gpu)
        with pytest.warns(FusionWarning, match="the mesh is of cpus"):
            comm = opening.__enter__()
        assert comm.decision.decided_by == "JAX mesh"
        opening.__exit__(None, None, None)
        demanded = type(decision)(**{**decision.__dict__, "backend": "trtllm"})
        with (
            pytest.raises(FusionError, match="the mesh is of cpus"),
            open_fused(mesh_of(2), decision=demanded),
        ):
            pass


class TestErrors:
    """All of them at trace time, naming both sides."""

    def trace(self, function, *shapes: tuple[tuple[int, ...], object]) -> None:
        arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        step = jax.shard_map(function, mesh=mesh_of(2), in_specs=P(), out_specs=P(), check_vma=False)
        jax.eval_shape(step, *arguments)

    def test_residual_shape(self) -> None:
        with pytest.raises(
            ValueError, match=r"residual must have shape \(5, 32\) .*partial \(5, 32\), got \(4, 32\)"
        ):
            self.trace(reduce_norm, ((5, D), jnp.float32), ((4, D), jnp.float32), ((D,), jnp.float32))

    def test_weight_shape(self) -> None:
        with pytest.raises(
            ValueError, match=r"weight must have shape \(32,\) .*partial \(5, 32\), got \(1, 32\)"
        ):
            self.trace(reduce_norm, ((5, D), jnp.float32), ((5, D), jnp.float32), ((1, D), jnp.float32))

    def test_dtypes(self) -> None:
        with pytest.raises(TypeError, match=r"partial is bfloat16\[5, 32\], weight is float32\[32\]"):
            self.trace(reduce_norm, ((5, D), jnp.bfloat16), ((5, D), jnp.bfloat16), ((D,), jnp.float32))
        with pytest.raises(TypeError, match="x must be one of float16, bfloat16, float32, got int32"):
            self.trace(reduce_sum, ((5, D), jnp.int32))

    def test_scalars(self) -> None:
        with pytest.raises(ValueError, match=r"x must be \[..., hidden_size\], got shape \(\)"):
            self.trace(reduce_sum, ((), jnp.float32))

    def test_not_an_array(self) -> None:
        with pytest.raises(TypeError, match=r"x must be a jax.Array, got ndarray"):
            reduce_sum(np.ones((5, D), np.float32))  # pyright: ignore[reportArgumentType]

    @pytest.mark.parametrize("eps", [-1.0, float("nan")])
    def test_eps(self, eps: float) -> None:
        shapes = (((5, D), jnp.float32), ((5, D), jnp.float32), ((D,), jnp.float32))
        with pytest.raises(ValueError, match="eps must be"):
            self.trace(lambda *xs: reduce_norm(*xs, eps=eps), *shapes)
        with pytest.raises(ValueError, match="side must be"):
            self.trace(lambda *xs: reduce_norm(*xs, side="left"), *shapes)

    def test_outside_of_shard_map(self) -> None:
        with pytest.raises(ValueError, match=r"axis_name 'tp' is not bound here: .*shard_map"):
            reduce_sum(jnp.ones((5, D)))
        with pytest.raises(ValueError, match="an axis of vmap here, not of a mesh"):
            jax.vmap(reduce_sum, axis_name="tp")(jnp.ones((2, 5, D)))
        with pytest.raises(TypeError, match="the name of a mesh axis or a tuple of names, got 3"):
            jax_bridge.allreduce(jnp.ones((5, D)), axis_name=3)  # pyright: ignore[reportArgumentType]

    def test_a_communicator_that_cannot_serve(self) -> None:
        mesh = mesh_of(2, 2, names=("tp", "ep"))
        with open_fused(mesh) as comm:
            with pytest.raises(ValueError, match="the communicator reduces over 'tp'"):
                jax.eval_shape(
                    jax.shard_map(
                        lambda x: jax_bridge.allreduce(x, axis_name="ep", comm=comm),
                        mesh=mesh,
                        in_specs=P("ep"),
                        out_specs=P(),
                    ),
                    jnp.ones((4, D)),
                )
            with pytest.raises(
                ValueError, match=r"the communicator's mesh is .* but this code runs over {'tp': 2}"
            ):
                self.trace(lambda x: reduce_sum(x, comm=comm), ((5, D), jnp.float32))
        with pytest.raises(ValueError, match="communicator 0 is closed"):
            self.trace(lambda x: reduce_sum(x, comm=comm), ((5, D), jnp.float32))


class TestOpening:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"axis_name": "ep"}, "'ep' is not an axis of the mesh"),
            ({"hidden_size": 64}, "hidden_size is 64, but the decision was made for 32"),
            ({"dtype": jnp.float64}, "dtype must be float16, bfloat16 or float32, got float64"),
            ({"decision": decide(4)}, "has 2 devices, but the decision was made for groups of 4"),
            ({"transport": "mpi"}, "transport must be one of ffi, cupy, got 'mpi'"),
        ],
    )
    def test_arguments_are_checked(self, change: dict, message: str) -> None:
        arguments = {
            "mesh": mesh_of(2),
            "axis_name": "tp",
            "hidden_size": D,
            "dtype": jnp.float32,
            "decision": decide(2),
            **change,
        }
        with pytest.raises(ValueError, match=message), jax_bridge.fused_communicator(**arguments):
            pass

    def test_jitted_functions_follow_the_communicator(self) -> None:
        """jit traces anew inside and outside, so a cached fused program never outlives its workspace."""
        mesh, data = mesh_of(2), operands(2)
        run = per_rank(reduce_norm, mesh)
        texts = []
        for _ in range(2):
            run(*data)
            texts.append(run.lower(*data).as_text())
            with open_fused(mesh):
                run(*data)
                texts.append(run.lower(*data).as_text())
        assert ["crossfuse.cpu" in text for text in texts] == [False, True, False, True]

    def test_programs_name_no_rank_pointer_or_process(self) -> None:
        """All ranks compile the same program; opened again it is the same text but for the place in the trace."""
        mesh, data = mesh_of(4), operands(4)
        attributes = []
        for _ in range(2):
            with open_fused(mesh):
                text = per_rank(reduce_norm, mesh).lower(*data).as_text()
                line = next(line for line in text.splitlines() if "crossfuse.cpu" in line)
                attributes.append(line[line.index("{") : line.index("}")])
        assert attributes[0] == attributes[1]
        assert "communicator = 0 : i64" in attributes[0]
        assert "rank" not in attributes[0]

    def test_ids_are_reused_and_serials_are_not(self) -> None:
        with open_fused(mesh_of(2)) as first, open_fused(mesh_of(4)) as second:
            assert (first.id, second.id) == (0, 1)
        with open_fused(mesh_of(2)) as third:
            assert third.id == 0
            assert third.serial > second.serial
            assert third.is_open
            assert not first.is_open

    def test_the_innermost_communicator_of_an_axis_is_found(self) -> None:
        mesh, data = mesh_of(2), operands(2)
        run = per_rank(reduce_norm, mesh)
        with open_fused(mesh), open_fused(mesh, decision=decide(2, mode="off")):
            assert jax_bridge.explain(run, *data).counts == ReductionCounts(unfused=1)
