"""The zero-centred RMSNorm of Qwen3-Next, alone and as the place where an owed sum is paid."""

from __future__ import annotations

import torch
from torch import nn

from core_torch.kernels.add_norm import add_norm, check_add_norm
from core_torch.kernels.allreduce import allreduce_residual_rmsnorm
from core_torch.kernels.choice import NOT_ASKED, Answers, KernelOptions
from core_torch.kernels.norm import gated_rms_norm, rms_norm
from core_torch.partial_sum import PartialSum

WEIGHT_BIAS = 1.0  # the checkpoint stores w and the norm scales by 1 + w


class RMSNorm(nn.Module):
    """x [..., D] -> normalised over D and scaled by 1 + weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.eps = eps
        self.compiled = NOT_ASKED

    def choose_kernels(self, options: KernelOptions) -> Answers:
        self.compiled = options.ask("add_norm", check_add_norm, hidden_size=len(self.weight))
        return {"add_norm": self.compiled}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.compiled.usable:
            rows = x.reshape(-1, len(self.weight))
            return add_norm(rows, None, self.weight, self.eps, WEIGHT_BIAS)[1].view(x.shape)
        return rms_norm(x, self.weight, eps=self.eps, weight_bias=WEIGHT_BIAS)

    def pay(self, owed: PartialSum, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reduce `owed`, add it to the residual stream and norm: (residual [T, D], normed [T, D])."""
        return allreduce_residual_rmsnorm(
            owed.take_as_it_is(),
            residual,
            self.weight,
            group=owed.group,
            eps=self.eps,
            weight_bias=WEIGHT_BIAS,
        )


class GatedRMSNorm(nn.Module):
    """x, gate [..., D] -> weight * norm(x) * silu(gate); not zero-centred."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return gated_rms_norm(x, gate, self.weight, eps=self.eps)
