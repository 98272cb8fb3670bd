"""A known-answer test of the fused op on the real group, before anything depends on it.

Memory handles have been known to point at the wrong data on some machines (SGLang 19884, 20039), and the
only way to know is to reduce data whose sum is known. Every rank makes every other rank's data from seeds,
so no collective but the op under test runs. Shapes: T tokens, D hidden.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core_torch.kernels.moe_prefill import ChoiceParts
from core_torch.kernels.norm import rms_norm_reference
from core_torch.kernels.votes import FatalStepError

if TYPE_CHECKING:
    from core_torch.kernels.buffers import Buffers

EPS = 1e-6
TIMEOUT_S = 30.0
# Largest |error| / (1 + |expected|): some roundings of sums of size 1 to 4, far below what wrong data gives.
TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float32: 2e-5}


@dataclass(frozen=True)
class Case:
    """One call of the op: its operands on this rank, and outputs [T, D] filled with NaN. `choices`, where there are
    any, have the sum `partial` and come in its place."""

    index: int
    partial: Tensor
    choices: ChoiceParts | None
    residual: Tensor
    weight: Tensor
    weight_bias: float
    out_residual: Tensor
    out_normed: Tensor


def token_counts(max_tokens: int, most_tokens: int) -> list[int]:
    """Odd, small and full batches of each kernel, of which one takes up to `most_tokens`; a single token again after
    the full ones, when their data must be gone."""
    counts = sorted({1, 3, 64, min(max_tokens, most_tokens), max_tokens})
    return [tokens for tokens in counts if tokens <= max_tokens] + [1]


def choice_counts(buffers: Buffers, max_tokens: int, most_tokens: int) -> list[int]:
    """An odd batch of the kernel that adds choices, where there is one; its memory is that of sums."""
    tokens = min(max_tokens, most_tokens + 3)
    return [tokens] if buffers.adds_choices(tokens) else []


def prepare(
    *,
    world_size: int,
    rank: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    token_counts: list[int],
    choice_counts: list[int],
) -> list[Case]:
    """Everything that could fail on one rank alone, so that afterwards all ranks launch or none does: a case for each
    of `token_counts`, then one of choices for each of `choice_counts`."""
    cases = []
    for index, tokens in enumerate(token_counts + choice_counts):
        shape = (tokens, hidden_size)
        poisoned = torch.full(shape, torch.nan, dtype=dtype, device=device)
        partial = _partial(index, rank, world_size, shape, dtype).to(device)
        cases.append(
            Case(
                index=index,
                partial=partial,
                choices=_as_choices(partial) if index >= len(token_counts) else None,
                residual=_uniform(index, world_size, shape).to(dtype).to(device),
                weight=(_uniform(index, world_size + 1, (hidden_size,)) / 2).to(dtype).to(device),
                weight_bias=float(index % 2),
                out_residual=poisoned,
                out_normed=poisoned.clone(),
            )
        )
    return cases


def run(buffers: Buffers, cases: list[Case], world_size: int) -> None:
    """Launches every case, then compares with float64. RuntimeError on a wrong value.

    One case at a time: where ranks are threads, loading the next kernel could wait for one that waits for a peer.
    FatalStepError when the op gives no answer: then a kernel waits for a peer forever, and the GPU with it.
    """
    for case in cases:
        rest = (case.residual, case.weight, EPS, case.weight_bias, case.out_residual, case.out_normed)
        if case.choices is None:
            buffers.run(case.partial, *rest)
        else:
            buffers.run_choices(case.choices, *rest)
        _wait(case.partial.device)
    for case in cases:
        check(case, world_size)


def check(case: Case, world_size: int) -> None:
    """Raises RuntimeError unless both outputs are within TOLERANCE of the float64 answer."""
    shape, dtype = tuple(case.partial.shape), case.partial.dtype
    expected = case.residual.double()
    for rank in range(world_size):
        expected += _partial(case.index, rank, world_size, shape, dtype).to(expected.device)
    normed = rms_norm_reference(expected, case.weight, eps=EPS, weight_bias=case.weight_bias)
    for name, got, want in (("residual", case.out_residual, expected), ("norm", case.out_normed, normed)):
        error = (got.double() - want).abs() / (1 + want.abs())
        wrong = ~(error <= TOLERANCE[dtype])  # written so that NaN is wrong
        if wrong.any():
            raise RuntimeError(
                f"self-test: {int(wrong.sum())} of {wrong.numel()} values of the {name} are wrong for "
                f"{shape[0]} tokens (largest error {float(error.nan_to_num(torch.inf).max()):.2g}, "
                f"allowed {TOLERANCE[dtype]:.2g})"
            )


def _partial(index: int, rank: int, world_size: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One rank's part, on the CPU, scaled so that the sum stays of size 1 in any group."""
    return (_uniform(index, rank, shape) / world_size**0.5).to(dtype)


def _as_choices(partial: Tensor) -> ChoiceParts:
    """Two halves of each row, which add up to it exactly, with a choice between them that has no expert."""
    half = partial / 2
    parts = torch.stack((half, torch.full_like(half, torch.nan), half), dim=1).flatten(0, 1)
    experts = torch.tensor((0, -1, 0), dtype=torch.int32, device=partial.device)
    return ChoiceParts(parts, experts.repeat(len(partial), 1), 1)


def _uniform(index: int, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform in [-1, 1), float32, the same on every rank: the CPU's generator does not depend on the GPU."""
    generator = torch.Generator().manual_seed(1_000_003 * index + stream)
    return torch.rand(shape, generator=generator) * 2 - 1


def _wait(device: torch.device) -> None:
    """`torch.cuda.synchronize` with a deadline."""
    if device.type != "cuda":
        return
    with torch.cuda.device(device):
        done = torch.cuda.Event()
        done.record()
    deadline = time.monotonic() + TIMEOUT_S
    while not done.query():
        if time.monotonic() > deadline:
            raise FatalStepError(f"the fused op gave no answer in {TIMEOUT_S:g} s, and its GPU waits in it")
        time.sleep(0.001)
