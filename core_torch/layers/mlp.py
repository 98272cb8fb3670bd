"""The feed-forward half of a layer: a dense SwiGLU MLP, or a mixture of experts with a gated shared expert.

Shapes: T tokens, D hidden, I local intermediate, N local experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import nn

from core_torch.kernels import native
from core_torch.kernels.allreduce import ReduceGroup
from core_torch.kernels.choice import NOT_ASKED, Answers, KernelOptions
from core_torch.kernels.moe import route, routed_experts, swiglu
from core_torch.kernels.moe_decode import MAX_TOKENS, check_moe_decode, route_decode, routed_experts_decode
from core_torch.kernels.moe_prefill import (
    check_moe_prefill,
    every_choice,
    expert_parts_prefill,
    route_prefill,
)
from core_torch.layers.linear import Ahead, Linear, Product, RowParallelLinear
from core_torch.partial_sum import PartialSum
from shared_config.checkpoint import div_even
from shared_config.model import Qwen3NextConfig

WARM_UP_TOKENS = 512  # more than the kernels for few tokens and rows take
ROW_MULTIPLE = 8  # of the router's product: 16 bytes of logits, as cuBLAS's fast kernels want them


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
    """The routed experts' weights: gate_up_proj [N, 2I, D], down_proj [N, D, I].

    The group's ranks hold `ep_size` blocks of experts, each split over group.size / ep_size ranks. A rank computes its
    own experts for all rows; the group's sum has the others'. `with_shared` are the same tensors one expert longer,
    where the shared one lies behind them (see `SparseMoE`).
    """

    def __init__(self, config: Qwen3NextConfig, group: ReduceGroup, ep_size: int) -> None:
        super().__init__()
        N, D = div_even(config.num_experts, ep_size, "num_experts"), config.hidden_size
        tp_size = div_even(group.size, ep_size, "MoE-TP x EP size")
        local = div_even(config.moe_intermediate_size, tp_size, "moe_intermediate_size")
        self.first = None if ep_size == 1 else group.rank // tp_size * N
        self.gate_up_proj = nn.Parameter(torch.empty(N, 2 * local, D), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(N, D, local), requires_grad=False)
        self.group = group
        self.with_shared: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        tiles: torch.Tensor | None = None,
        ahead: Ahead = (),
        many: bool = False,
    ) -> PartialSum:
        """With `tiles` (of `route_decode`) in the kernels for few tokens, with `many` in those for many; in both,
        expert N is the shared one, if it lies there."""
        own = self.gate_up_proj, self.down_proj
        if tiles is not None:
            own, later = self.with_shared or own, [layer.weight for layer in ahead]
            part = routed_experts_decode(x, weights, experts, *own, tiles=tiles, ahead=later)
        elif many:
            own, local = self.with_shared or own, experts if self.first is None else experts - self.first
            part = expert_parts_prefill(x, weights, local, *own)
        else:
            part = routed_experts(x, weights, experts, *own, first=self.first)
        return PartialSum(part, self.group)


class SparseMoE(nn.Module):
    """x [T, D] -> routed experts + sigmoid(gate) * shared expert, as one partial sum.

    A shared expert of the routed ones' size lies behind them in memory, as expert number N, and its gate behind the
    router's rows: few tokens then need one product for all logits and no kernels of the shared expert's own. The
    parameters stay what they are by name and shape; they are views.
    """

    def __init__(self, config: Qwen3NextConfig, group: ReduceGroup, ep_size: int) -> None:
        super().__init__()
        self.top_k, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(config.hidden_size, config.num_experts)
        self.experts = Experts(config, group, ep_size)
        self.shared_expert = MLP(
            config, config.shared_expert_intermediate_size, group, "shared_expert_intermediate_size"
        )
        self.shared_expert_gate = Linear(config.hidden_size, 1)
        self.router_weight: torch.Tensor | None = None  # gate's rows, shared_expert_gate's, rows of zeros
        self.few = self.many = NOT_ASKED
        self.ahead: Ahead = ()  # the next layer's first

    @property
    def shares_shape(self) -> bool:
        shape = self.experts.gate_up_proj.shape[1:]
        return self.experts.first is None and self.shared_expert.gate_up_proj.weight.shape == shape

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Give the parameters that lie behind one another their memory, where the shapes allow it."""
        if not self.shares_shape:
            return
        experts, shared = self.experts, self.shared_expert
        experts.with_shared = (
            one_behind_the_other(experts, "gate_up_proj", shared.gate_up_proj, dtype, device),
            one_behind_the_other(experts, "down_proj", shared.down_proj, dtype, device),
        )
        self.router_weight = one_behind_the_other(
            self.gate, "weight", self.shared_expert_gate, dtype, device, multiple=ROW_MULTIPLE
        )

    def part_with_shared(self) -> None:
        """From now on the shared expert is computed on its own."""
        self.experts.with_shared = self.router_weight = None

    def choose_kernels(self, options: KernelOptions) -> Answers:
        N, D, local = self.experts.down_proj.shape
        more = self.router_weight is not None
        shapes = {
            "num_experts": N + more,
            "top_k": self.top_k + more,
            "hidden_size": D,
            "intermediate_size": local,
        }
        many = options.ask("moe_prefill", check_moe_prefill, **shapes)
        self.many = self.experts.group.agree("moe_prefill", many)
        self.few = (
            options.ask("moe_decode", check_moe_decode, **shapes)
            if self.experts.first is None
            else native.Answer(False, "moe_decode takes all experts, not one block of them (ep_size > 1)")
        )
        return {"moe_decode": self.few, "moe_prefill": self.many}

    def forward(self, x: torch.Tensor) -> PartialSum:
        few = self.few.usable and x.shape[0] <= MAX_TOKENS
        if not few and not self.many.usable:
            weights, experts = route(self.gate(x), top_k=self.top_k, normalize=self.normalize)
            return self.experts(x, weights, experts) + self._shared(x)
        N, logits = len(self.gate.weight), self._logits(x)
        options = {"num_experts": N, "top_k": self.top_k, "normalize": self.normalize}
        if few:
            routing = route_decode(logits, **options)
            part = self.experts(x, routing.weights, routing.experts, routing.tiles, self.ahead)
        else:
            part = self.experts(x, *route_prefill(logits, **options), many=True)
        return part if self.router_weight is not None else part + self._shared(x)

    @torch.inference_mode()
    def warm_up(self, device: torch.device) -> None:
        if not self.many.usable:
            return
        N, D = self.gate.weight.shape
        x = torch.zeros(WARM_UP_TOKENS, D, dtype=self.gate.weight.dtype, device=device)
        logits = self._logits(x)
        chosen = route_prefill(logits, num_experts=N, top_k=self.top_k, normalize=self.normalize)
        own = self.experts.with_shared or (self.experts.gate_up_proj, self.experts.down_proj)
        for tiles in every_choice(own[1].shape[2]):
            expert_parts_prefill(x, *chosen, *own, tiles=tiles).sum()

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """The router's [T, N], and the shared expert's gate behind them where it lies there."""
        if self.router_weight is None:
            return self.gate(x)
        return self.gate.multiply(x, self.router_weight, None)[:, : len(self.gate.weight) + 1]

    def _shared(self, x: torch.Tensor) -> PartialSum:
        return self.shared_expert(x, scale=self.shared_expert_gate(x).sigmoid())


def one_behind_the_other(
    module: nn.Module,
    name: str,
    other: Product,
    dtype: torch.dtype,
    device: torch.device,
    multiple: int = 1,
) -> torch.Tensor:
    """One tensor whose first rows become `module`'s parameter `name` [N, ...], and the next one(s) `other`'s weight.

    It has a multiple of `multiple` rows; those behind the two are zero.
    """
    first, second = getattr(module, name), other.weight
    rows = first.shape[0] + second.numel() // first[0].numel()
    both = torch.empty(-(-rows // multiple) * multiple, *first.shape[1:], dtype=dtype, device=device)
    both[rows:].zero_()
    setattr(module, name, nn.Parameter(both[: first.shape[0]], requires_grad=False))
    other.weight = nn.Parameter(both[first.shape[0] : rows].view(second.shape), requires_grad=False)
    return both
