"""The feed-forward half of a layer: a dense SwiGLU MLP, or a mixture of experts with a gated shared expert.

Shapes: T tokens, D hidden, I local intermediate, N experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import nn

from core_torch.kernels.allreduce import ReduceGroup
from core_torch.kernels.moe import route, routed_experts, swiglu
from core_torch.layers.linear import Linear, RowParallelLinear
from core_torch.partial_sum import PartialSum
from shared_config.checkpoint import div_even
from shared_config.model import Qwen3NextConfig


class MLP(nn.Module):
    """x [T, D] -> this rank's part of down(silu(gate(x)) * up(x)), [T, D].

    `scale` [T, 1] multiplies the part: a gate on the result may come before the sum.
    """

    def __init__(self, config: Qwen3NextConfig, intermediate: int, group: ReduceGroup, what: str) -> None:
        super().__init__()
        local = div_even(intermediate, group.size, what)
        self.gate_up_proj = Linear(config.hidden_size, 2 * local)
        self.down_proj = RowParallelLinear(local, config.hidden_size, group)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> PartialSum:
        part = self.down_proj(swiglu(self.gate_up_proj(x)))
        return part if scale is None else PartialSum(part.take() * scale, part.group)


class Experts(nn.Module):
    """The routed experts' weights: gate_up_proj [N, 2I, D], down_proj [N, D, I]."""

    def __init__(self, config: Qwen3NextConfig, group: ReduceGroup) -> None:
        super().__init__()
        N, D = config.num_experts, config.hidden_size
        local = div_even(config.moe_intermediate_size, group.size, "moe_intermediate_size")
        self.gate_up_proj = nn.Parameter(torch.empty(N, 2 * local, D), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(N, D, local), requires_grad=False)
        self.group = group

    def forward(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> PartialSum:
        return PartialSum(routed_experts(x, weights, experts, self.gate_up_proj, self.down_proj), self.group)


class SparseMoE(nn.Module):
    """x [T, D] -> routed experts + sigmoid(gate) * shared expert, as one partial sum."""

    def __init__(self, config: Qwen3NextConfig, group: ReduceGroup) -> None:
        super().__init__()
        self.top_k, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(config.hidden_size, config.num_experts)
        self.experts = Experts(config, group)
        self.shared_expert = MLP(
            config, config.shared_expert_intermediate_size, group, "shared_expert_intermediate_size"
        )
        self.shared_expert_gate = Linear(config.hidden_size, 1)

    def forward(self, x: torch.Tensor) -> PartialSum:
        weights, experts = route(self.gate(x), top_k=self.top_k, normalize=self.normalize)
        routed = self.experts(x, weights, experts)
        return routed + self.shared_expert(x, scale=self.shared_expert_gate(x).sigmoid())
