"""A linear layer for few tokens, as decode steps have them: a compiled `torch.nn.functional.linear`.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_torch.kernels import native

MAX_ROWS = 32  # csrc/few_rows.cuh
MANY_OUTPUTS, MAX_ROWS_OF_MANY = 1024, 16  # above which cuBLAS is as fast (bench/results/LOG.md)


def check_few_rows(*, inputs: int, bias: bool, dtype: torch.dtype, device: torch.device) -> native.Answer:
    """Whether `few_rows` takes this layer, for up to MAX_ROWS tokens; ask once and keep the answer."""
    on_device = native.check_device(device)
    return native.first_failure(
        (on_device.usable, on_device.reason),
        (dtype == torch.bfloat16, f"few_rows takes bfloat16, not {dtype}"),
        (inputs % 8 == 0, f"few_rows takes a multiple of 8 inputs, not {inputs}"),
        (not bias, "few_rows adds no bias"),
    )


def is_worth_it(num_tokens: int, outputs: int) -> bool:
    """Whether `few_rows` beats cuBLAS."""
    return num_tokens <= (MAX_ROWS_OF_MANY if outputs > MANY_OUTPUTS else MAX_ROWS)


def few_rows(x: Tensor, weight: Tensor, *, launch_with_pdl: bool = True) -> Tensor:
    """x [T, I], weight [O, I] -> x @ weight.T [T, O], summed in float32, rounded once; capturable.

    A token's bits do not depend on the others. With `launch_with_pdl` the weights, constants, are on their way before
    the kernel in front ends.
    """
    out = x.new_empty(x.shape[0], weight.shape[0])
    native.function("few_rows", x.device)(x, weight, out, launch_with_pdl)
    return out
