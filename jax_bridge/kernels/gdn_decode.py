"""One decode step of Gated DeltaNet from the projections to the gated norm: in one kernel, or in plain JAX.

Shapes: B sequences of one token each, H key heads, HV value heads, dk, dv head dims, K taps, X = 2 H dk + HV dv
channels, S slots. Slot 0 belongs to nobody: rows that pad a batch have it.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jax_bridge.kernels.causal_conv import causal_conv_step
from jax_bridge.kernels.compiled import call
from jax_bridge.kernels.gated_delta_rule import gated_delta_gates, gated_delta_rule_step
from jax_bridge.kernels.norm import gated_rms_norm
from jax_bridge.transports.base import like

Step = tuple[Float[Array, "B HV*dv"], Float[Array, "S X K-1"], Float[Array, "S HV dk dv"]]


def gdn_decode(
    projected: Float[Array, "B P"],
    conv: Float[Array, "S X K-1"],
    state: Float[Array, "S HV dk dv"],
    slots: Int32[Array, " B"],
    *,
    conv_weight: Float[Array, "X K"],
    a_log: Float[Array, " HV"],
    dt_bias: Float[Array, " HV"],
    norm_weight: Float[Array, " dv"],
    eps: float,
    units_per_block: int = 1,
    launch_with_pdl: bool = True,
) -> Step:
    """`gdn_decode_plain` in one kernel that reads and writes each state once, in place where the caches are donated.

    Takes what `core_torch.kernels.gdn_decode.check_gdn_decode` says. Rows of slot 0 leave nothing.
    """
    HV, dv = state.shape[1], state.shape[3]
    out = jax.ShapeDtypeStruct((projected.shape[0], HV * dv), projected.dtype)
    out, conv, state = call(
        "gdn_decode",
        (projected, conv, state, slots, conv_weight, a_log, dt_bias, norm_weight),
        (out, like(conv), like(state)),
        in_place={1: 1, 2: 2},
        eps=eps,
        units_per_block=units_per_block,
        launch_with_pdl=launch_with_pdl,
    )
    return out, conv, state


def gdn_decode_plain(
    projected: Float[Array, "B P"],
    conv: Float[Array, "S X K-1"],
    state: Float[Array, "S HV dk dv"],
    slots: Int32[Array, " B"],
    *,
    conv_weight: Float[Array, "X K"],
    a_log: Float[Array, " HV"],
    dt_bias: Float[Array, " HV"],
    norm_weight: Float[Array, " dv"],
    eps: float,
) -> Step:
    """projected (q, k, v, z, b, a) -> (what the output projection takes, conv, state)."""
    HV, dk, dv = state.shape[1:]
    channels, lead = conv.shape[1], projected.shape[:1]
    key, value = (channels - HV * dv) // 2, HV * dv
    qkv, z, b, a = jnp.split(projected, (channels, channels + value, channels + value + HV), axis=-1)
    mixed, last = causal_conv_step(qkv, conv[slots], conv_weight)
    q, k, v = jnp.split(mixed, (key, 2 * key), axis=-1)
    out, updated = gated_delta_rule_step(
        q.reshape(*lead, -1, dk),
        k.reshape(*lead, -1, dk),
        v.reshape(*lead, HV, dv),
        *gated_delta_gates(a, b, a_log, dt_bias),
        state[slots],
    )
    normed = gated_rms_norm(out, z.reshape(out.shape), norm_weight, eps=eps)
    return (
        normed.reshape(*lead, -1),
        conv.at[slots].set(last.astype(conv.dtype)),
        state.at[slots].set(updated),
    )
