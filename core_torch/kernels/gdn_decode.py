"""One decode step of Gated DeltaNet from the projections to the gated norm: in one kernel, or in plain torch.

Shapes: B sequences of one token each, H key heads, HV value heads, dk, dv head dims, K taps, C = 2 H dk + HV dv
channels, S slots. Slot 0 belongs to nobody: rows that pad a batch have it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core_torch.kernels import native
from core_torch.kernels.causal_conv import causal_conv_step
from core_torch.kernels.gated_delta_rule import gated_delta_gates, gated_delta_rule_step
from core_torch.kernels.norm import gated_rms_norm

# csrc/gdn_decode.cuh: registers a thread, shared memory, units of 32 columns in a cluster.
MAX_K_DIM, MAX_V_DIM, TAPS, UNIT_COLUMNS, MAX_UNITS = 128, 256, 4, 32, 32


def check_gdn_decode(
    *,
    num_k_heads: int,
    num_v_heads: int,
    k_dim: int,
    v_dim: int,
    taps: int,
    dtype: torch.dtype,
    device: torch.device,
) -> native.Answer:
    """Whether `gdn_decode` takes this rank's shapes; ask once and keep the answer."""
    on_device = native.check_device(device)
    units = num_v_heads // num_k_heads * -(-v_dim // UNIT_COLUMNS)
    return native.first_failure(
        (on_device.usable, on_device.reason),
        (dtype == torch.bfloat16, f"gdn_decode takes bfloat16, not {dtype}"),
        (taps == TAPS, f"gdn_decode takes {TAPS} taps, not {taps}"),
        (
            k_dim % 8 == 0 and v_dim % 8 == 0 and k_dim <= MAX_K_DIM and v_dim <= MAX_V_DIM,
            f"gdn_decode takes multiples of 8 up to {MAX_K_DIM}, {MAX_V_DIM} as head dims, not {k_dim}, {v_dim}",
        ),
        (
            num_v_heads % num_k_heads == 0 and units <= MAX_UNITS,
            f"gdn_decode takes {MAX_UNITS * UNIT_COLUMNS} columns of state a key head, not {units * UNIT_COLUMNS}",
        ),
    )


def gdn_decode(
    projected: Tensor,
    conv: Tensor,
    state: Tensor,
    slots: Tensor,
    *,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    units_per_block: int = 1,
    ahead: Sequence[Tensor] = (),
    launch_with_pdl: bool = True,
) -> Tensor:
    """`gdn_decode_plain` in one kernel that reads and writes each state once; capturable.

    Rows of slot 0 (or less) read nothing and leave nothing; their result is that of an empty state. `units_per_block`
    (1, 2 or 4), `launch_with_pdl` (the kernel may start while the one before it ends) and `ahead` (up to two contiguous
    tensors, weights that later kernels read, fetched into the L2 cache meanwhile) change the time alone.
    """
    out = projected.new_empty(projected.shape[0], state.shape[1] * state.shape[3])
    native.function("gdn_decode_ahead", projected.device, of="gdn_decode")(
        projected,
        conv,
        state,
        slots,
        conv_weight,
        a_log,
        dt_bias,
        norm_weight,
        out,
        eps,
        units_per_block,
        launch_with_pdl,
        *native.ahead_operands(ahead),
    )
    return out


def gdn_decode_plain(
    projected: Tensor,
    conv: Tensor,
    state: Tensor,
    slots: Tensor,
    *,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> Tensor:
    """projected [B, C + HV dv + 2 HV] -> [B, HV dv], ready for the output projection; conv and state in place.

    projected holds q, k, v, z, b, a; conv [S, C, K-1] the last inputs, oldest first; state [S, HV, dk, dv] float32;
    slots [B] int32 or int64; conv_weight [C, K], a_log and dt_bias [HV] float32, norm_weight [dv].
    """
    HV, dk, dv = state.shape[1:]
    channels = conv.shape[1]
    key, value = (channels - HV * dv) // 2, HV * dv
    qkv, z, b, a = projected.split([channels, value, HV, HV], dim=-1)
    mixed, conv[slots] = causal_conv_step(qkv, conv[slots], conv_weight)
    q, k, v = mixed.split([key, key, value], dim=-1)
    out, state[slots] = gated_delta_rule_step(
        q.unflatten(-1, (-1, dk)),
        k.unflatten(-1, (-1, dk)),
        v.unflatten(-1, (-1, dv)),
        *gated_delta_gates(a, b, a_log, dt_bias),
        state[slots],
    )
    return gated_rms_norm(out, z.reshape(out.shape), norm_weight, eps=eps).flatten(1)
