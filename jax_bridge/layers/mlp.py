"""The feed-forward half of a layer: a dense SwiGLU MLP, or a mixture of experts with a gated shared expert.

Shapes: T tokens, D hidden, I local intermediate, N local experts, K experts per token.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from core_torch.kernels import native
from core_torch.kernels.choice import NOT_ASKED, Answers, KernelOptions
from core_torch.kernels.moe_decode import MAX_TOKENS, check_moe_decode
from core_torch.kernels.moe_prefill import check_moe_prefill
from jax_bridge.axes import MeshAxis
from jax_bridge.kernels.activation import sigmoid
from jax_bridge.kernels.moe import route, routed_experts, swiglu
from jax_bridge.kernels.moe_decode import route_decode, routed_experts_decode
from jax_bridge.kernels.moe_prefill import route_prefill, routed_experts_prefill
from jax_bridge.layers.linear import Linear, RowParallelLinear
from jax_bridge.layers.parameter import parameter
from jax_bridge.partial_sum import PartialSum, ReduceAxis
from shared_config.checkpoint import div_even
from shared_config.model import Qwen3NextConfig


class MLP(nnx.Module):
    """x [T, D] -> this rank's part of down(silu(gate(x)) * up(x)), [T, D].

    `scale` [T, 1] multiplies the part: a gate on the result may come before the sum.
    """

    def __init__(self, config: Qwen3NextConfig, intermediate: int, axis: ReduceAxis, what: str) -> None:
        local = div_even(intermediate, axis.size, what)
        self.gate_up_proj = Linear(config.hidden_size, 2 * local, axis)
        self.down_proj = RowParallelLinear(local, config.hidden_size, axis)

    def __call__(self, x: Float[Array, "T D"], scale: Float[Array, "T 1"] | None = None) -> PartialSum:
        part = self.down_proj(swiglu(self.gate_up_proj(x)))
        return part if scale is None else PartialSum(part.take() * scale, part.axis)


class Experts(nnx.Module):
    """The routed experts' weights: gate_up_proj [N, 2I, D], down_proj [N, D, I].

    The ranks of `blocks`, which is part of `axis`, hold blocks of experts, the others along `axis` shares of each. A
    rank computes its own experts for all rows; the axis' sum has the others'.
    """

    def __init__(self, config: Qwen3NextConfig, axis: ReduceAxis, blocks: MeshAxis) -> None:
        N, D = div_even(config.num_experts, blocks.size, "num_experts"), config.hidden_size
        within = axis.without(blocks)
        local = div_even(config.moe_intermediate_size, within.size, "moe_intermediate_size")
        self.gate_up_proj = parameter(N, 2 * local, D, split={0: blocks, 1: within})
        self.down_proj = parameter(N, D, local, split={0: blocks, 2: within})
        self.num_experts, self.local, self.axis, self.blocks = N, local, axis, blocks

    def __call__(
        self,
        x: Float[Array, "T D"],
        weights: Float[Array, "T K"],
        experts: Int32[Array, "T K"],
        tiles: jax.Array | None = None,
        many_on: torch.device | None = None,
    ) -> PartialSum:
        """With `tiles` (of `route_decode`) in the kernels for few tokens, with `many_on` (a GPU) in those for many.
        An id below 0 stands for no expert."""
        own = self.gate_up_proj[...], self.down_proj[...]
        if tiles is not None:
            part = routed_experts_decode(x, weights, experts, *own, tiles=tiles)
        elif many_on is not None:
            part = routed_experts_prefill(x, weights, self._own(experts), *own, device=many_on)
        else:
            part = routed_experts(x, weights, self._own(experts), *own)
        return PartialSum(part, self.axis)

    def _own(self, experts: jax.Array) -> jax.Array:
        """Ids among this rank's experts; -1 for others'."""
        if self.blocks.size == 1:
            return experts
        local = experts - self.blocks.rank() * self.num_experts
        return jnp.where((local >= 0) & (local < self.num_experts), local, jnp.int32(-1))


class SparseMoE(nnx.Module):
    """x [T, D] -> routed experts + sigmoid(gate) * shared expert, as one partial sum."""

    def __init__(self, config: Qwen3NextConfig, axis: ReduceAxis, blocks: MeshAxis) -> None:
        self.top_k, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(config.hidden_size, config.num_experts)
        self.experts = Experts(config, axis, blocks)
        self.shared_expert = MLP(
            config, config.shared_expert_intermediate_size, axis, "shared_expert_intermediate_size"
        )
        self.shared_expert_gate = Linear(config.hidden_size, 1)
        self.few = self.many = NOT_ASKED
        self.device: torch.device | None = None  # a GPU of this process, once kernels are chosen

    def choose_kernels(self, options: KernelOptions) -> Answers:
        shapes = {
            "num_experts": self.experts.num_experts,
            "top_k": self.top_k,
            "hidden_size": self.experts.down_proj.shape[1],
            "intermediate_size": self.experts.local,
        }
        self.many = options.ask("moe_prefill", check_moe_prefill, **shapes)
        self.few = (
            options.ask("moe_decode", check_moe_decode, **shapes)
            if self.experts.blocks.size == 1
            else native.Answer(False, "moe_decode takes all experts, not one block of them (ep_size > 1)")
        )
        self.device = options.device
        return {"moe_decode": self.few, "moe_prefill": self.many}

    def __call__(self, x: Float[Array, "T D"], real: Bool[Array, " T"] | None = None) -> PartialSum:
        """`real`: which rows are tokens. Those that pad a batch are all alike, and would crowd a few experts."""
        if self.few.usable and x.shape[0] <= MAX_TOKENS:
            return self._few_tokens(x) + self._shared(x)
        many_on = self.device if self.many.usable else None
        choose = route if many_on is None else partial(route_prefill, device=many_on)
        weights, experts = choose(self.gate(x), top_k=self.top_k, normalize=self.normalize)
        if real is not None:
            experts = jnp.where(real[:, None], experts, jnp.int32(-1))
        return self.experts(x, weights, experts, many_on=many_on) + self._shared(x)

    def _few_tokens(self, x: jax.Array) -> PartialSum:
        routing = route_decode(self.gate(x), top_k=self.top_k, normalize=self.normalize)
        return self.experts(x, routing.weights, routing.experts, routing.tiles)

    def _shared(self, x: jax.Array) -> PartialSum:
        return self.shared_expert(x, scale=sigmoid(self.shared_expert_gate(x)))
