"""Order: kept by data, found when it is lost, and what happens to a group after a rank went another way."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
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

NUM_CALLS = 12


def independent_sums(partial: jax.Array, *_rest: jax.Array) -> jax.Array:
    """Sums that XLA may run in any order: their operands have nothing to do with each other."""
    return jnp.stack([reduce_sum(partial * float(i)) for i in range(NUM_CALLS)])


def ordered_sums(partial: jax.Array, *_rest: jax.Array) -> jax.Array:
    order, totals = jax_bridge.CallOrder.start(), []
    for i in range(NUM_CALLS):
        total, order = order.allreduce(partial * float(i), axis_name="tp")
        totals.append(total)
    return jnp.stack(totals)


def expected_sums(data: Any) -> np.ndarray:
    total = np.asarray(data.partial).astype(np.float64).sum(0)
    return np.stack([total * i for i in range(NUM_CALLS)])


class TestCallOrder:
    @pytest.mark.parametrize("check_vma", [True, False])
    def test_independent_calls(self, check_vma: bool) -> None:
        mesh, data = mesh_of(4), operands(4)
        run = per_rank(ordered_sums, mesh, check_vma)
        with open_fused(mesh):
            assert jax_bridge.explain(run, *data).counts == ReductionCounts(plain=NUM_CALLS)
            for _ in range(20):
                assert_close(run(*data), expected_sums(data))

    def test_without_a_communicator(self) -> None:
        data = operands(4)
        assert_close(per_rank(ordered_sums, mesh_of(4))(*data), expected_sums(data))

    def test_both_reductions_share_one_order(self) -> None:
        mesh, data = mesh_of(4), operands(4)

        def function(partial, residual, weight):
            order = jax_bridge.CallOrder.start()
            total, order = order.allreduce(partial, axis_name="tp")
            (_, normed), order = order.allreduce_residual_rmsnorm(
                partial, residual, weight, axis_name="tp", eps=EPS
            )
            again, order = order.allreduce(partial, axis_name="tp")
            return total, normed, again, order.number

        run = per_rank(function, mesh)
        with open_fused(mesh):
            total, normed, again, number = jax.block_until_ready([run(*data) for _ in range(20)])[-1]
        assert_close(normed, data.expected()[1])
        np.testing.assert_array_equal(total, again)
        assert number == 3, "the CPU kernel counts the calls"

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_a_loop_carries_it(self, check_vma: bool) -> None:
        mesh, data = mesh_of(4), operands(4)

        def function(partial, *_rest):
            def body(order, scale):
                total, order = order.allreduce(partial * scale, axis_name="tp")
                again, order = order.allreduce(partial * (scale + 1), axis_name="tp")
                return order, (total, again)

            return jax.lax.scan(body, jax_bridge.CallOrder.start(), jnp.arange(1.0, 4.0))[1]

        with open_fused(mesh):
            run = per_rank(function, mesh, check_vma)
            assert jax_bridge.explain(run, *data).counts == ReductionCounts(plain=6)
            total, again = jax.block_until_ready(run(*data))
        np.testing.assert_array_equal(total[1:], again[:-1])

    def test_it_passes_in_and_out_of_jit(self) -> None:
        mesh, data = mesh_of(2), operands(2)
        step = jax.jit(
            jax.shard_map(
                lambda x, order: order.allreduce(x[0], axis_name="tp"),
                mesh=mesh,
                in_specs=(P("tp"), P()),
                out_specs=(P(), P()),
            )
        )
        order = jax_bridge.CallOrder.start()
        with open_fused(mesh):
            total, order = step(data.partial, order)
            for _ in range(2):
                total, order = step(data.partial, order)
            assert jax.block_until_ready(order).number == 3
        assert_close(total, np.asarray(data.partial).sum(0))

    def test_gradients_pass_through(self) -> None:
        mesh, data = mesh_of(2), operands(2)

        def ordered(partial, residual, weight):
            order = jax_bridge.CallOrder.start()
            outputs, _ = order.allreduce_residual_rmsnorm(partial, residual, weight, axis_name="tp", eps=EPS)
            return outputs

        def gradients(function: Callable[..., Any]) -> Any:
            run = per_rank(function, mesh)
            gradient = jax.grad(lambda *xs: jnp.sum(jnp.sin(run(*xs)[1])), argnums=(0, 1, 2))
            return jax.block_until_ready(gradient(*data))

        with open_fused(mesh):
            got, want = gradients(ordered), gradients(reduce_norm)
        for one, other in zip(got, want, strict=True):
            np.testing.assert_array_equal(one, other)

    def test_vmap_may_close_over_it_but_not_batch_it(self) -> None:
        mesh, data = mesh_of(2), operands(2, 6)
        partial = data.partial.reshape(2, 3, 2, D)

        def closed_over(partial, *_rest):
            order = jax_bridge.CallOrder.start()
            return jax.vmap(lambda x: order.allreduce(x, axis_name="tp")[0])(partial)

        def batched(partial, *_rest):
            orders = jax_bridge.CallOrder(jnp.zeros((3, 1), jnp.int32))
            return jax.vmap(lambda x, order: order.allreduce(x, axis_name="tp")[0])(partial, orders)

        with open_fused(mesh):
            total = jax.block_until_ready(per_rank(closed_over, mesh)(partial, data.residual, data.weight))
            assert_close(total, np.asarray(partial).sum(0))
            with pytest.raises(ValueError, match="a CallOrder cannot be batched"):
                per_rank(batched, mesh)(partial, data.residual, data.weight)


class TestLostOrder:
    def test_unordered_calls_are_right_or_an_error(self) -> None:
        """Never wrong numbers. XLA's CPU threads decide which of the two it is."""
        mesh, data = mesh_of(4), operands(4)
        run, errors = per_rank(independent_sums, mesh), []
        for _ in range(5):
            with open_fused(mesh, timeout_s=2.0):
                try:
                    for _ in range(5):
                        assert_close(run(*data), expected_sums(data))
                except jax.errors.JaxRuntimeError as error:
                    errors.append(str(error))
        assert all("jax_bridge.CallOrder" in error or "waited" in error for error in errors), errors

    def fails(self, function: Callable[..., Any], message: str, timeout_s: float = 10.0) -> None:
        mesh, data = mesh_of(4), operands(4)
        good = per_rank(reduce_norm, mesh)
        with open_fused(mesh, timeout_s=timeout_s):
            with pytest.raises(jax.errors.JaxRuntimeError, match=message):
                jax.block_until_ready(per_rank(function, mesh, check_vma=False)(*data))
            started = time.monotonic()
            with pytest.raises(jax.errors.JaxRuntimeError, match=message):
                jax.block_until_ready(good(*data))
            assert time.monotonic() - started < 5, "a poisoned group fails at once, with the first reason"
        with open_fused(mesh):
            assert_close(jax.block_until_ready(good(*data))[1], data.expected()[1])

    def test_ranks_in_different_calls(self) -> None:
        def function(partial, residual, weight):
            def one(x):
                return reduce_sum(x)

            def other(x):
                return reduce_sum(x * 2)

            return jax.lax.cond(jax.lax.axis_index("tp") == 2, one, other, partial)

        self.fails(function, "the ranks met in different calls: rank 0 is in call .* rank 2 in call")

    def test_ranks_in_different_reductions(self) -> None:
        def function(partial, residual, weight):
            order = jax_bridge.CallOrder.start()
            return jax.lax.cond(
                jax.lax.axis_index("tp") == 1,
                lambda: order.allreduce(partial, axis_name="tp")[0],
                lambda: order.allreduce_residual_rmsnorm(partial, residual, weight, axis_name="tp", eps=EPS)[
                    0
                ][1],
            )

        self.fails(
            function, r"rank 0 is in call 0 \[5, 32\] sum\+residual\+norm, rank 1 in call 0 \[5, 32\] sum"
        )

    def test_a_rank_that_does_not_come(self) -> None:
        def function(partial, residual, weight):
            return jax.lax.cond(jax.lax.axis_index("tp") == 3, lambda x: x, reduce_sum, partial)

        self.fails(function, r"waited 500 ms in call .* for rank\(s\) 3", timeout_s=0.5)

    def test_a_residual_that_differs(self) -> None:
        def function(partial, residual, weight):
            return reduce_norm(partial, partial, weight)

        self.fails(function, "residual differs between ranks: .* must be replicated over the axis")

    def test_a_weight_that_differs(self) -> None:
        def function(partial, residual, weight):
            return reduce_norm(partial, residual, partial[0])

        self.fails(function, "weight differs between ranks")

    def test_a_call_that_runs_when_the_communicator_closes(self) -> None:
        mesh, data = mesh_of(2), operands(2)

        def function(partial, residual, weight):
            return jax.lax.cond(jax.lax.axis_index("tp") == 1, lambda x: x, reduce_sum, partial)

        with open_fused(mesh, timeout_s=30.0):
            result = per_rank(function, mesh, check_vma=False)(*data)
        with pytest.raises(
            jax.errors.JaxRuntimeError, match="block_until_ready before its `with` block ends"
        ):
            jax.block_until_ready(result)


class TestManyCalls:
    @pytest.mark.parametrize("num_ranks", [2, 4, 8])
    def test_200_repetitions(self, num_ranks: int) -> None:
        """A chain of norms and ordered sums, without waiting in between: no hang, no change."""
        mesh, data = mesh_of(num_ranks), operands(num_ranks)

        def function(partial, residual, weight):
            order = jax_bridge.CallOrder.start()
            hidden = partial
            for _ in range(4):
                (residual, hidden), order = order.allreduce_residual_rmsnorm(
                    hidden, residual, weight, axis_name="tp", eps=EPS
                )
                total, order = order.allreduce(partial, axis_name="tp")
                hidden = hidden / float(num_ranks) + total
            return hidden, residual

        with open_fused(mesh):
            run = per_rank(function, mesh)
            first = jax.block_until_ready(run(*data))
            for _ in range(20):  # more than 32 in flight stall XLA on CPU, with its own collectives too
                for result in jax.block_until_ready([run(*data) for _ in range(10)]):
                    assert all(np.array_equal(one, other) for one, other in zip(result, first, strict=True))

    def test_two_threads_that_dispatch(self) -> None:
        mesh, data = mesh_of(4), operands(4)
        failures: list[BaseException] = []

        def dispatch(run: Callable[..., Any], expected: np.ndarray) -> None:
            try:
                for _ in range(50):
                    assert_close(run(*data)[1], expected)
            except BaseException as error:
                failures.append(error)

        with open_fused(mesh):
            runs = [
                jax_bridge.one_at_a_time(per_rank(lambda *xs, b=bias: reduce_norm(*xs, weight_bias=b), mesh))
                for bias in (0.0, 1.0)
            ]
            threads = [
                threading.Thread(target=dispatch, args=(run, data.expected(bias)[1]))
                for run, bias in zip(runs, (0.0, 1.0), strict=True)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not failures, failures


def test_a_program_that_never_starts_ends_the_process_with_its_stacks() -> None:
    program = (
        "import time\nfrom jax_bridge.dispatch import ends_within\n"
        "def quick():\n    with ends_within(0.5):\n        pass\n    time.sleep(0.7)\n"
        "def waits_for_a_gpu():\n    with ends_within(0.5):\n        time.sleep(40)\n"
        "quick()\nwaits_for_a_gpu()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=35)
    assert done.returncode == 1
    assert "Timeout (0:00:00.5" in done.stderr
    assert "in waits_for_a_gpu" in done.stderr
