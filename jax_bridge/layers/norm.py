"""The zero-centred RMSNorm of Qwen3-Next, alone and as the place where an owed sum is paid."""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from core_torch.kernels.add_norm import check_add_norm
from core_torch.kernels.choice import NOT_ASKED, Answers, KernelOptions
from jax_bridge.kernels.add_norm import add_norm
from jax_bridge.kernels.norm import gated_rms_norm, rms_norm
from jax_bridge.layers.parameter import parameter
from jax_bridge.op import allreduce_residual_rmsnorm
from jax_bridge.partial_sum import PartialSum

WEIGHT_BIAS = 1.0  # the checkpoint stores w and the norm scales by 1 + w


class RMSNorm(nnx.Module):
    """x [..., D] -> normalised over D and scaled by 1 + weight."""

    def __init__(self, dim: int, eps: float) -> None:
        self.weight = parameter(dim)
        self.eps = eps
        self.compiled = NOT_ASKED

    def choose_kernels(self, options: KernelOptions) -> Answers:
        self.compiled = options.ask("add_norm", check_add_norm, hidden_size=self.weight.shape[0])
        return {"add_norm": self.compiled}

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        if self.compiled.usable:
            rows = x.reshape(-1, x.shape[-1])
            return add_norm(rows, None, self.weight[...], self.eps, WEIGHT_BIAS)[1].reshape(x.shape)
        return rms_norm(x, self.weight[...], eps=self.eps, weight_bias=WEIGHT_BIAS)

    def pay(self, owed: PartialSum, residual: Float[Array, "T D"]) -> tuple[jax.Array, jax.Array]:
        """Reduce `owed`, add it to the residual stream and norm: (residual [T, D], normed [T, D])."""
        return allreduce_residual_rmsnorm(
            owed.take(),
            residual,
            self.weight[...],
            axis_name=owed.axis.name,
            eps=self.eps,
            weight_bias=WEIGHT_BIAS,
            comm=owed.axis.comm,
            side=owed.axis.side,
            compiled=self.compiled.usable,
        )


class GatedRMSNorm(nnx.Module):
    """x, gate [..., D] -> weight * norm(x) * silu(gate); not zero-centred."""

    def __init__(self, dim: int, eps: float) -> None:
        self.weight = parameter(dim)
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"], gate: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return gated_rms_norm(x, gate, self.weight[...], eps=self.eps)
