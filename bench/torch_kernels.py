"""Times the project's own kernels one by one, each after a look at whether it computes what plain torch does."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.clock import samples_us
from bench.codec import from_plain, to_plain
from bench.kernel_cases import Case, cases
from bench.kernel_operands import Rank
from bench.rates import cache_bytes
from bench.result import KernelPart, KernelRow, KernelSpec
from bench.stats import Timing, summarize
from core_torch.kernels.choice import Answers, describe

FURTHEST = 0.03  # apart: both round to bfloat16 where the other does not
LEAST_NORM = 1e-6  # a result may be zero, such as an embedding's rows that another rank holds
PLAIN_REPEATS = 3  # in prefill, where a call of plain torch may take a tenth of a second


def run(plain: dict[str, Any]) -> dict[str, Any]:
    """The part of `launch.run_part`. RuntimeError for a kernel whose result is not plain torch's."""
    spec = from_plain(KernelSpec, plain)
    device = torch.device(spec.device)
    torch.manual_seed(0)
    rows: list[KernelRow] = []
    answers: Answers = {}
    with torch.inference_mode():
        rank = Rank(spec, device, cache_bytes(spec.device))
        for case in tqdm(cases(rank), desc="kernels", unit="case", leave=False):
            answers[case.module] = case.answer
            rows.append(measure(case, spec.repeats, device))
    return to_plain(KernelPart(tuple(rows), (f"kernels {describe(answers)}",)))


def measure(case: Case, repeats: int, device: torch.device) -> KernelRow:
    decodes = case.phase == "decode"
    apart = timing = None
    if case.answer.usable:
        apart = distance(case)
        check_distance(case, apart)
        calls = [partial(case.compiled, i) for i in range(case.num_sets)]
        timing = summarize(samples_us(calls, repeats, device))
    calls = [partial(case.plain, i) for i in range(case.num_sets if decodes else 1)]
    # An engine in plain torch captures its decode steps too, but not its prefill.
    plain = samples_us(calls, repeats if decodes else min(repeats, PLAIN_REPEATS), device, in_graph=decodes)
    return kernel_row(case, timing, summarize(plain), apart)


def kernel_row(case: Case, timing: Timing | None, plain: Timing, apart: float | None) -> KernelRow:
    return KernelRow(
        kernel=case.kernel,
        phase=case.phase,
        num_tokens=case.num_tokens,
        length=case.length,
        timing=timing,
        plain=plain,
        memory_bytes=case.memory_bytes,
        flops=case.flops,
        wire_bytes=case.wire_bytes,
        floor_us=None,
        apart=apart,
    )


def distance(case: Case) -> float:
    """Between the two results in the 2-norm, relative to plain torch's."""
    case.restore()
    got = case.compiled(0).double()
    case.restore()
    want: Tensor = case.plain(0).double()
    return ((got - want).norm() / want.norm().clamp(min=LEAST_NORM)).item()


def check_distance(case: Case, *distances: float) -> None:
    """RuntimeError for one that is more than rounding."""
    for apart in distances:
        if not apart <= FURTHEST:  # written so that NaN is too far
            raise RuntimeError(
                f"{case.kernel} with {case.num_tokens} tokens is {apart:.3g} apart from plain torch, "
                f"and at most {FURTHEST} is rounding"
            )
