"""The reductions under JAX's transformations: gradients against dense autodiff, loops, vmap, donation, export."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_bridge
from core_torch.kernels.counts import ReductionCounts
from tests.jax_case import (
    EPS,
    D,
    assert_close,
    mesh_of,
    open_fused,
    operands,
    per_rank,
    reduce_norm,
    reduce_sum,
)

pytestmark = pytest.mark.timeout(60)

F = 16  # the inner width of the test's MLP


class Network:
    """A tensor-parallel MLP stack with a reduction after each layer, and the same on one device."""

    def __init__(self, num_layers: int = 3, num_tokens: int = 5) -> None:
        keys = jax.random.split(jax.random.key(0), 7)
        self.num_layers = num_layers
        self.arguments = (
            jax.random.normal(keys[0], (num_tokens, D)),
            jax.random.normal(keys[1], (num_tokens, D)),
            0.1 * jax.random.normal(keys[2], (D,)),
            jax.random.normal(keys[3], (D, F)) / 4,
            jax.random.normal(keys[4], (F, D)) / 4,
        )
        self.specs = (P(), P(), P(), P(None, "tp"), P("tp", None))
        self.cotangents = jax.random.normal(keys[5], (2, num_tokens, D))

    def split(self, hidden, residual, weight, up, down):
        for _ in range(self.num_layers):
            residual, hidden = reduce_norm(jnp.tanh(hidden @ up) @ down, residual, weight)
        return hidden, residual

    def dense(self, hidden, residual, weight, up, down):
        for _ in range(self.num_layers):
            residual = residual + jnp.tanh(hidden @ up) @ down
            scale = jax.lax.rsqrt(jnp.mean(residual * residual, -1, keepdims=True) + EPS)
            hidden = residual * scale * (1 + weight)
        return hidden, residual

    def loss(self, forward: Callable[..., Any]) -> Callable[..., jax.Array]:
        def loss(*arguments):
            hidden, residual = forward(*arguments)
            return jnp.sum(hidden * self.cotangents[0]) + jnp.sum(jnp.sin(residual) * self.cotangents[1])

        return loss

    def dense_gradients(self) -> tuple[jax.Array, ...]:
        return jax.grad(self.loss(self.dense), argnums=(0, 1, 2, 3, 4))(*self.arguments)


def assert_gradients(got: Any, want: Any) -> None:
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4, err_msg=f"argument {index}")


class TestGradients:
    @pytest.mark.parametrize("check_vma", [True, False])
    @pytest.mark.parametrize("num_ranks", [2, 4])
    def test_around_shard_map(self, num_ranks: int, check_vma: bool) -> None:
        network, mesh = Network(), mesh_of(num_ranks)
        split = jax.shard_map(
            network.split, mesh=mesh, in_specs=network.specs, out_specs=(P(), P()), check_vma=check_vma
        )
        gradients = jax.jit(jax.grad(network.loss(split), argnums=(0, 1, 2, 3, 4)))
        assert_gradients(gradients(*network.arguments), network.dense_gradients())
        with open_fused(mesh):
            assert jax_bridge.explain(gradients, *network.arguments).counts == ReductionCounts(fused=3)
            assert_gradients(gradients(*network.arguments), network.dense_gradients())

    def test_inside_shard_map(self) -> None:
        network, mesh = Network(), mesh_of(4)
        gradients = jax.jit(
            jax.shard_map(
                jax.grad(network.loss(network.split), argnums=(0, 1, 2, 3, 4)),
                mesh=mesh,
                in_specs=network.specs,
                out_specs=network.specs,
            )
        )
        with open_fused(mesh):
            assert_gradients(gradients(*network.arguments), network.dense_gradients())

    @pytest.mark.parametrize("fused", [True, False])
    def test_no_collective_is_added_where_types_say_that_results_are_alike(self, fused: bool) -> None:
        """check_vma=True: the backward pass of a reduction is local. False: exactly one psum each."""
        network = Network(num_layers=1)
        for check_vma, added in ((True, 0), (False, 1)):
            gradient = jax.grad(lambda partial, *rest: jnp.sum(reduce_norm(partial, *rest)[1]), argnums=0)
            inside = jax.shard_map(
                lambda partial, *rest, g=gradient: g(partial[0], *rest)[None],
                mesh=mesh_of(2),
                in_specs=(P("tp"), P(), P()),
                out_specs=P("tp"),
                check_vma=check_vma,
            )
            data = operands(2)
            if fused:
                with open_fused(mesh_of(2)):
                    text = str(jax.make_jaxpr(inside)(*data))
                forward = 0
            else:
                text = str(jax.make_jaxpr(inside)(*data))
                forward = 1
            assert text.count(" psum") == forward + added, text
        del network

    def test_a_residual_that_may_differ_between_ranks(self) -> None:
        """Then nobody can say that the results are alike, and both types and gradients follow plain psum."""
        mesh, data = mesh_of(2), operands(2)
        residual = jnp.stack([data.residual, data.residual])

        def plain(partial, residual, weight):
            residual = residual + jax.lax.psum(partial, "tp")
            scale = jax.lax.rsqrt(jnp.mean(residual * residual, -1, keepdims=True) + EPS)
            return residual, residual * scale * (1 + weight)

        results = []
        for function in (reduce_norm, plain):
            run = jax.shard_map(
                lambda partial, residual, weight, f=function: tuple(
                    x[None] for x in f(partial[0], residual[0], weight)
                ),
                mesh=mesh,
                in_specs=(P("tp"), P("tp"), P()),
                out_specs=(P("tp"), P("tp")),
            )
            gradients = jax.grad(
                lambda *xs, run=run: sum(jnp.sum(jnp.sin(x)) for x in run(*xs)), argnums=(0, 1, 2)
            )
            with open_fused(mesh):
                results.append(jax.block_until_ready(jax.jit(gradients)(data.partial, residual, data.weight)))
        assert_gradients(*results)

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_the_plain_sum(self, check_vma: bool) -> None:
        mesh, data = mesh_of(4), operands(4)

        def gradient_of(total: Callable[[jax.Array], jax.Array]) -> jax.Array:
            run = jax.shard_map(
                lambda x: total(x[0]), mesh=mesh, in_specs=P("tp"), out_specs=P(), check_vma=check_vma
            )
            return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(run(x)))))(data.partial)

        with open_fused(mesh):
            assert_gradients([gradient_of(reduce_sum)], [gradient_of(lambda x: jax.lax.psum(x, "tp"))])

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_short_dtypes_keep_their_dtype(self, dtype: Any) -> None:
        mesh, data = mesh_of(2), operands(2, dtype=dtype)
        run = per_rank(lambda *xs: jnp.sum(reduce_norm(*xs)[1].astype(jnp.float32)), mesh)
        with open_fused(mesh, dtype):
            gradients = jax.block_until_ready(jax.grad(run, argnums=(0, 1, 2))(*data))
        wide = operands(2)
        want = jax.grad(per_rank(lambda *xs: jnp.sum(reduce_norm(*xs)[1]), mesh), argnums=(0, 1, 2))(*wide)
        for got, expected in zip(gradients, want, strict=True):
            assert got.dtype == dtype
            np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=0.15)

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_checkpoint_of_each_layer(self, check_vma: bool) -> None:
        network, mesh = Network(), mesh_of(4)

        def rematerialised(hidden, residual, weight, up, down):
            layer = jax.checkpoint(lambda h, r: reduce_norm(jnp.tanh(h @ up) @ down, r, weight)[::-1])
            for _ in range(network.num_layers):
                hidden, residual = layer(hidden, residual)
            return hidden, residual

        split = jax.shard_map(
            rematerialised, mesh=mesh, in_specs=network.specs, out_specs=(P(), P()), check_vma=check_vma
        )
        gradients = jax.jit(jax.grad(network.loss(split), argnums=(0, 1, 2, 3, 4)))
        with open_fused(mesh):
            assert jax_bridge.explain(gradients, *network.arguments).counts == ReductionCounts(fused=6)
            for _ in range(10):
                assert_gradients(gradients(*network.arguments), network.dense_gradients())


class TestControlFlow:
    def run_both(self, function: Callable[..., Any], num_ranks: int = 4) -> ReductionCounts:
        """The same numbers in a communicator and out of it; the counts in it."""
        mesh, data = mesh_of(num_ranks), operands(num_ranks)
        for check_vma in (True, False):
            run = per_rank(function, mesh, check_vma)
            want = np.asarray(run(*data))
            with open_fused(mesh):
                counts = jax_bridge.explain(run, *data).counts
                np.testing.assert_allclose(run(*data), want, rtol=1e-4, atol=1e-4)
        assert counts.unfused == 0
        return counts

    def test_scan(self) -> None:
        def function(partial, residual, weight):
            def layer(residual, scale):
                return reduce_norm(partial * scale, residual, weight)

            return jax.lax.scan(layer, residual, jnp.linspace(0.5, 1.5, 7))[0]

        assert self.run_both(function) == ReductionCounts(fused=7)

    def test_while_loop(self) -> None:
        def function(partial, residual, weight):
            def body(state):
                step, residual = state
                return step + 1, reduce_norm(partial, residual, weight)[0]

            return jax.lax.while_loop(lambda state: state[0] < 5, body, (jnp.int32(0), residual))[1]

        assert self.run_both(function) == ReductionCounts(fused=1), "a while loop's body counts once"

    def test_cond_taken_alike(self) -> None:
        def function(partial, residual, weight):
            def twice(residual):
                residual = reduce_norm(partial, residual, weight)[0]
                return reduce_norm(partial, residual, weight)[0]

            def once(residual):
                return reduce_norm(partial, residual, weight)[0]

            return jax.lax.cond(jnp.sum(weight) > 1e3, twice, once, residual)

        assert self.run_both(function) == ReductionCounts(fused=2), "the branch with the most"

    def test_nested_jit_shared_by_two_calls(self) -> None:
        layer = jax.jit(lambda partial, residual, weight: reduce_norm(partial, residual, weight)[0])

        def function(partial, residual, weight):
            return layer(partial, layer(partial, residual, weight), weight)

        assert self.run_both(function) == ReductionCounts(fused=2)


class TestVmap:
    @pytest.mark.parametrize("check_vma", [True, False])
    @pytest.mark.parametrize("axes", [(0, 0, None), (0, None, None), (None, 0, None), (1, 1, None)])
    def test_a_batch_is_one_launch(self, axes: tuple[int | None, ...], check_vma: bool) -> None:
        mesh, batch = mesh_of(2), 3
        data = operands(2, 4 * batch)
        partial = data.partial.reshape(2, batch, 4, D)
        residual = data.residual.reshape(batch, 4, D)
        partial = partial[:, 0] if axes[0] is None else partial
        residual = residual[0] if axes[1] is None else residual
        if axes[0] == 1:
            partial, residual = partial.swapaxes(1, 2), residual.swapaxes(0, 1)
        run = per_rank(jax.vmap(reduce_norm, in_axes=axes), mesh, check_vma)
        want = run(partial, residual, data.weight)
        with open_fused(mesh):
            report = jax_bridge.explain(run, partial, residual, data.weight)
            assert report.counts == ReductionCounts(fused=1)
            assert report.calls[0].shape == (batch, 4, D)
            got = jax.block_until_ready(run(partial, residual, data.weight))
        assert_close(got[1], np.asarray(want[1]))

    def test_a_weight_for_each_element(self) -> None:
        mesh, data = mesh_of(2), operands(2, 3)
        weights = jnp.stack([data.weight, data.weight * 2, data.weight * 3])
        run = per_rank(lambda p, r, w: jax.vmap(reduce_norm, in_axes=(None, 0, 0))(p, r, w), mesh)
        residuals = jnp.stack([data.residual] * 3)
        want = run(data.partial, residuals, weights)
        with open_fused(mesh):
            assert jax_bridge.explain(run, data.partial, residuals, weights).counts.fused == 3
            got = jax.block_until_ready(run(data.partial, residuals, weights))
        assert_close(got[1], np.asarray(want[1]))

    def test_a_batch_above_the_limit_is_not_fused(self) -> None:
        mesh, data = mesh_of(2), operands(2, 48)
        run = per_rank(jax.vmap(reduce_norm, in_axes=(0, 0, None)), mesh)
        arguments = (data.partial.reshape(2, 3, 16, D), data.residual.reshape(3, 16, D), data.weight)
        with open_fused(mesh, max_tokens=32):
            assert jax_bridge.explain(run, *arguments).counts == ReductionCounts(unfused=1)
            assert_close(jax.block_until_ready(run(*arguments))[1], data.expected()[1].reshape(3, 16, D))

    def test_gradient_of_vmap(self) -> None:
        mesh, data = mesh_of(2), operands(2, 6)
        arguments = (data.partial.reshape(2, 2, 3, D), data.residual.reshape(2, 3, D), data.weight)
        batched = per_rank(jax.vmap(reduce_norm, in_axes=(0, 0, None)), mesh)
        whole = per_rank(reduce_norm, mesh)

        def loss(run: Callable[..., Any]) -> Callable[..., jax.Array]:
            return lambda *xs: jnp.sum(jnp.sin(run(*xs)[1]))

        want = jax.grad(loss(whole), argnums=(0, 1, 2))(*data)
        with open_fused(mesh):
            got = jax.block_until_ready(jax.grad(loss(batched), argnums=(0, 1, 2))(*arguments))
        assert_gradients(got, [w.reshape(a.shape) for w, a in zip(want, arguments, strict=True)])


class TestBuffers:
    def test_donation_reuses_the_residual_s_buffer(self) -> None:
        mesh, data = mesh_of(2), operands(2)
        expected = data.expected()
        replicated = jax.sharding.NamedSharding(mesh, P())
        step = jax.jit(per_rank(reduce_norm, mesh), donate_argnums=1)
        with open_fused(mesh):
            residual = jax.device_put(data.residual, replicated)
            pointers = [shard.data.unsafe_buffer_pointer() for shard in residual.addressable_shards]
            partial = jax.device_put(data.partial, jax.sharding.NamedSharding(mesh, P("tp")))
            got = jax.block_until_ready(step(partial, residual, jax.device_put(data.weight, replicated)))
            assert residual.is_deleted()
            assert [s.data.unsafe_buffer_pointer() for s in got[0].addressable_shards] == pointers
        assert_close(got[1], expected[1])

    def test_without_donation_the_residual_is_kept(self) -> None:
        mesh, data = mesh_of(2), operands(2)
        before = np.array(data.residual)
        with open_fused(mesh):
            jax.block_until_ready(per_rank(reduce_norm, mesh)(*data))
        np.testing.assert_array_equal(before, data.residual)

    @pytest.mark.parametrize(("in_place", "copies"), [(True, 4), (False, 0)])
    def test_residuals_that_are_kept_are_copied_unless_the_caller_says_so(
        self, in_place: bool, copies: int
    ) -> None:
        """A call in place would write over what a later call, or the caller, reads."""
        mesh, data = mesh_of(2), operands(2)
        in_turn = functools.partial(reduce_norm, in_place=in_place)

        def four_calls(partial, residual, weight):
            for _ in range(4):
                _, partial = in_turn(partial, residual, weight)
            return partial

        run = per_rank(four_calls, mesh, check_vma=False, out_specs=P("tp"))
        expected = run(*data)
        with open_fused(mesh):
            program = run.lower(*data).compile()
            assert program.as_text().count(" copy(") == copies
            assert_close(program(*data), np.asarray(expected))

    def test_a_chain_in_place_copies_nothing_but_its_first_residual(self) -> None:
        mesh, data = mesh_of(2), operands(2)

        def chain(partial, residual, weight):
            for _ in range(4):
                residual, partial = reduce_norm(partial, residual, weight)
            return residual, partial

        run = per_rank(chain, mesh, check_vma=False, out_specs=P("tp"))
        with open_fused(mesh):
            assert run.lower(*data).compile().as_text().count(" copy(") == 1

    def test_the_residual_may_be_used_again(self) -> None:
        """XLA copies it then: the call may not write over what a later one reads."""
        mesh, data = mesh_of(2), operands(2)

        def function(partial, residual, weight):
            doubled = residual + residual
            new_residual, _ = reduce_norm(partial, doubled, weight)
            return new_residual - doubled

        with open_fused(mesh):
            got = jax.block_until_ready(per_rank(function, mesh)(*data))
        assert_close(got, np.asarray(data.partial).sum(0))


class TestCompiledFunctions:
    def test_export_and_call_in_a_new_communicator(self) -> None:
        pytest.importorskip("flatbuffers")  # what jax.export serialises with
        mesh, data = mesh_of(2), operands(2)
        with open_fused(mesh) as comm:
            checks = jax_bridge.export_checks(comm)
            exported = jax.export.export(per_rank(reduce_norm, mesh), disabled_checks=checks)(*data)
            blob = exported.serialize()
        loaded = jax.export.deserialize(bytearray(blob))
        sharding = [jax.sharding.NamedSharding(mesh, spec) for spec in (P("tp"), P(), P())]
        arguments = [jax.device_put(x, s) for x, s in zip(data, sharding, strict=True)]
        with open_fused(mesh) as again:
            assert again.id == comm.id
            residual, _ = jax.block_until_ready(jax.jit(loaded.call)(*arguments))
        assert_close(residual, data.expected()[0])

    def test_a_compiled_function_after_its_communicator_is_an_error(self) -> None:
        mesh, data = mesh_of(2), operands(2)
        with open_fused(mesh):
            compiled = per_rank(reduce_norm, mesh).lower(*data).compile()
            sharding = [jax.sharding.NamedSharding(mesh, spec) for spec in (P("tp"), P(), P())]
            arguments = [jax.device_put(x, s) for x, s in zip(data, sharding, strict=True)]
            jax.block_until_ready(compiled(*arguments))
        with pytest.raises(jax.errors.JaxRuntimeError, match="fused communicator 0 is closed"):
            jax.block_until_ready(compiled(*arguments))

    def test_reloading_registers_nothing_again(self) -> None:
        """In a process of its own: a reload leaves classes behind that other tests have imported."""
        program = """
            import importlib, jax, jax_tvm_ffi
            from tests.jax_case import mesh_of, open_fused, operands, per_rank, reduce_norm

            def run():
                with open_fused(mesh_of(2)):
                    jax.block_until_ready(per_rank(reduce_norm, mesh_of(2))(*operands(2)))
                return jax_tvm_ffi.registered_count()

            before = run()
            for name in ("transports.base", "transports.rendezvous", "native", "communicator", "opening"):
                importlib.reload(importlib.import_module(f"jax_bridge.{name}"))
            assert run() == before == 2, (run(), before)
        """
        root = Path(__file__).parent.parent
        subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=root, check=True, timeout=60)
