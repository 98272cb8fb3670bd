"""Linear layers of one rank. A column-parallel layer is a plain `Linear` over its share of the outputs.

Shapes: T tokens, I inputs, O outputs (this rank's share of whichever is split).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from core_torch.kernels.allreduce import ReduceGroup
from core_torch.partial_sum import PartialSum


class Linear(nn.Module):
    """x [T, I] -> x @ weight.T + bias, [T, O]."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """x [T, this rank's inputs] -> this rank's part of the output [T, O]; `group` owes the sum.

    The bias belongs to the sum, so one rank alone adds it.
    """

    def __init__(self, inputs: int, outputs: int, group: ReduceGroup, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None
        self.group = group

    def forward(self, x: torch.Tensor) -> PartialSum:
        bias = self.bias if self.group.rank == 0 else None
        return PartialSum(F.linear(x, self.weight, bias), self.group)


Ahead = tuple[
    Linear | RowParallelLinear, ...
]  # at most two whose weights a decode kernel fetches for those after it
