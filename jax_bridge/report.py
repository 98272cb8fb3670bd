"""What a traced function will do: which reductions are fused, which are not, and why.

Fused or not is decided when a function is traced. Each decision leaves a note in the jaxpr, an identity on one
operand that lowers to nothing, so the answer comes from the program itself: a scan's body counts once per
iteration, and code that was never traced counts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.extend.core import Primitive, jaxprs_in_params
from jax.interpreters import mlir

from core_torch.kernels.counts import ReductionCounts
from jax_bridge.axes import AxisName


@dataclass(frozen=True)
class CallRecord:
    """One reduction in a program. `repeats` is how often it runs each time the program does.

    `repeats` counts scans; a `while_loop` runs its body an unknown number of times, and counts once.
    """

    op: str  # "allreduce_residual_rmsnorm" or "allreduce"
    axis_name: AxisName
    shape: tuple[int, ...]
    dtype: str
    fused: bool
    reason: str
    repeats: int = 1

    def __str__(self) -> str:
        how = "fused" if self.fused else "unfused"
        times = f" x{self.repeats}" if self.repeats > 1 else ""
        shape = ", ".join(map(str, self.shape))
        return f"{how:7}  {self.op}{times}  {self.dtype}[{shape}] over {self.axis_name!r}: {self.reason}"


@dataclass(frozen=True)
class TraceReport:
    """All reductions of one traced function, in program order; `print` it to read it."""

    calls: tuple[CallRecord, ...]

    @property
    def counts(self) -> ReductionCounts:
        """Reductions in one execution, counted as the PyTorch core counts: sums without a norm are `plain`."""
        counts = ReductionCounts()
        for call in self.calls:
            if call.op == "allreduce":
                counts.add(plain=call.repeats)
            elif call.fused:
                counts.add(fused=call.repeats)
            else:
                counts.add(unfused=call.repeats)
        return counts

    def __str__(self) -> str:
        counts = self.counts
        head = f"{counts.fused} fused, {counts.unfused} unfused, {counts.plain} plain reductions an execution"
        return "\n".join([head, *(f"  {call}" for call in self.calls)])


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> TraceReport:
    """Traces `function(*args, **kwargs)` without running it, and reports its reductions.

    `args` may be arrays or `jax.ShapeDtypeStruct`s. Call it where the function will be called: inside the `with`
    block of its communicator. A `cond` counts the branch with the most reductions.
    """
    # A jitted function traces itself: inside another trace it may not have compiler options.
    trace = getattr(function, "trace", None)
    jaxpr = trace(*args, **kwargs).jaxpr if trace else jax.make_jaxpr(function)(*args, **kwargs)
    return TraceReport(tuple(_records(jaxpr.jaxpr)))


def _records(jaxpr: Any) -> Iterator[CallRecord]:
    for eqn in jaxpr.eqns:
        if eqn.primitive is _note:
            yield eqn.params["record"]
        elif eqn.primitive.name == "cond":
            branches = [list(_records(branch)) for branch in jaxprs_in_params(eqn.params)]
            yield from max(branches, key=lambda branch: sum(call.repeats for call in branch))
        else:
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            for inner in jaxprs_in_params(eqn.params):
                for call in _records(inner):
                    yield replace(call, repeats=call.repeats * times)


def note(x: jax.Array, record: CallRecord) -> jax.Array:
    """`x`, with `record` written into the jaxpr."""
    return _note.bind(x, record=record)


_note = Primitive("crossfuse_note")
_note.def_impl(lambda x, **_record: x)
_note.def_abstract_eval(lambda x, **_record: x)
mlir.register_lowering(_note, lambda _context, x, **_record: [x])
