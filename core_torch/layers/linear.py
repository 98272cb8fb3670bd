"""Linear layers of one rank. A column-parallel layer is a plain `Linear` over its share of the outputs.

Shapes: T tokens, I inputs, O outputs (this rank's share of whichever is split).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from core_torch.kernels.allreduce import ReduceGroup
from core_torch.kernels.choice import NOT_ASKED, Answers, KernelOptions
from core_torch.kernels.few_rows import check_few_rows, few_rows, is_worth_it
from core_torch.partial_sum import PartialSum


class Product(nn.Module):
    """What the layers below share: weight [O, I], bias, and a compiled product for few tokens."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None
        self.compiled = NOT_ASKED

    def choose_kernels(self, options: KernelOptions) -> Answers:
        self.compiled = options.ask(
            "few_rows", check_few_rows, inputs=self.weight.shape[1], bias=self.bias is not None
        )
        return {"few_rows": self.compiled}

    def multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.compiled.usable and is_worth_it(x.shape[0], weight.shape[0]):
            return few_rows(x, weight)
        return F.linear(x, weight, bias)


class Linear(Product):
    """x [T, I] -> x @ weight.T + bias, [T, O]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x, self.weight, self.bias)


class RowParallelLinear(Product):
    """x [T, this rank's inputs] -> this rank's part of the output [T, O]; `group` owes the sum.

    The bias belongs to the sum, so one rank alone adds it.
    """

    def __init__(self, inputs: int, outputs: int, group: ReduceGroup, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias)
        self.group = group

    def forward(self, x: torch.Tensor) -> PartialSum:
        bias = self.bias if self.group.rank == 0 else None
        return PartialSum(self.multiply(x, self.weight, bias), self.group)


Ahead = tuple[Product, ...]  # at most two, whose weights a decode kernel fetches for those after it
