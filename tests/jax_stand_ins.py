"""Plain torch in place of the compiled decode kernels: what XLA calls on CPU through the custom calls of GPUs.

A stand-in gets what the kernel gets, by position, from the same adaptor, and works on XLA's memory.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import tvm_ffi

from core_torch.kernels import attention, gdn_decode, moe, moe_decode, norm_rope, vocabulary
from core_torch.kernels.contract import add_rmsnorm
from core_torch.kernels.few_rows import MAX_ROWS
from jax_bridge.kernels.compiled import TARGETS, open_target


def on_memory_of(tensor: Any) -> torch.Tensor:
    """A view that C++ lends may not be exported through DLPack, only looked at. Rows may be apart."""
    dtype = jnp.dtype(str(tensor.dtype))
    shape, strides = tuple(tensor.shape), tuple(stride * dtype.itemsize for stride in tensor.strides)
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_uint8 * (last + dtype.itemsize)).from_address(tensor.data_ptr())
    is_bf16 = dtype == jnp.bfloat16  # which torch does not take from NumPy
    values = np.ctypeslib.as_array(memory).view(np.int16 if is_bf16 else dtype)
    tensor = torch.from_numpy(np.lib.stride_tricks.as_strided(values, shape, strides))
    return tensor.view(torch.bfloat16) if is_bf16 else tensor


class StandIns:
    """Registered for a process once; `calls` counts what ran."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        for name in TARGETS:
            open_target(name, tvm_ffi.convert(self._counted(name)), platform="cpu")

    def _counted(self, name: str) -> Any:
        function = getattr(self, f"_{name}")

        def run(*values: Any) -> None:
            self.calls[name] += 1
            with torch.inference_mode():
                function(*(on_memory_of(v) if hasattr(v, "data_ptr") else v for v in values))

        return run

    def _add_norm(self, summed, residual, weight, out_residual, out_normed, eps, weight_bias, overlap):
        assert overlap == 1
        assert (residual is None) == (out_residual is None)
        stream, normed = add_rmsnorm(summed, residual, weight, eps, weight_bias)
        out_normed.copy_(normed)
        if out_residual is not None:
            out_residual.copy_(stream)

    _norm = _add_norm

    def _few_rows(self, x, weight, out, overlap):
        assert overlap == 1
        assert x.shape[0] <= MAX_ROWS
        out.copy_(torch.nn.functional.linear(x, weight))

    def _vocabulary_argmax(self, logits, keys, first, overlap):
        assert (first, overlap) == (0, True)
        keys.copy_(vocabulary.largest_keys_plain(logits, first=first))

    def _gdn_decode(
        self, projected, conv, state, slots, conv_weight, a_log, dt_bias, norm_weight, out, *attrs
    ):
        eps, units_per_block, launch_with_pdl = attrs
        assert (units_per_block, launch_with_pdl) == (1, True)
        weights = {"conv_weight": conv_weight, "a_log": a_log, "dt_bias": dt_bias, "norm_weight": norm_weight}
        out.copy_(gdn_decode.gdn_decode_plain(projected, conv, state, slots, **weights, eps=eps))

    def _norm_rope(self, projected, positions, slots, q_weight, k_weight, k_cache, v_cache, q, *attrs):
        rotary_dim, theta, eps, weight_bias, launch_with_pdl = attrs
        assert launch_with_pdl is True
        q.copy_(
            norm_rope.norm_rope_plain(
                projected,
                positions,
                slots,
                k_cache,
                v_cache,
                q_weight=q_weight,
                k_weight=k_weight,
                num_heads=q.shape[1],
                rotary_dim=rotary_dim,
                theta=theta,
                eps=eps,
                weight_bias=weight_bias,
            )
        )

    def _paged_decode(self, q, k_cache, v_cache, tables, lengths, values, sums, out, gate, scale, overlap):
        assert overlap is True
        assert values.shape[:-1] == sums.shape[:-1]
        assert (values.shape[-1], sums.shape[-1]) == (q.shape[-1], 2)
        attended = attention.decode_attention(q, k_cache, v_cache, tables, lengths, scale=scale)
        out.copy_(attended * gate.sigmoid().view(out.shape))

    def _moe_route(self, logits, weights, experts, tiles, num_experts, normalize, overlap):
        assert overlap == 1
        assert logits.shape[1] == num_experts
        chosen = moe.route(logits, top_k=weights.shape[1], normalize=bool(normalize))
        weights.copy_(chosen[0])
        experts.copy_(chosen[1])
        self._moe_group(experts, tiles, num_experts, overlap)

    def _moe_group(self, experts, tiles, num_experts, overlap):
        assert overlap == 1
        assert int(experts.max()) < num_experts
        assert tiles.shape == (experts.numel() + 1, 16)
        tiles[0] = experts.numel()

    def _moe_decode(self, x, weights, experts, tiles, gate_up, down, hidden, parts, out, overlap):
        assert overlap == (len(x) < moe_decode.MANY_TOKENS)
        assert (tiles[0] == experts.numel()).all(), "the list was made for other experts"
        assert hidden.shape == (experts.numel(), down.shape[2])
        assert parts.shape == (experts.numel(), x.shape[1])
        chosen = torch.where(experts < 0, 0, experts)
        kept = torch.where(experts < 0, 0, weights)
        out.copy_(moe.routed_experts(x, kept, chosen.long(), gate_up, down))
