"""What a sequence leaves behind: paged KV for attention layers, state slots for Gated DeltaNet layers.

A rank caches its own share of the heads: `head_shares` ranks split them (attention-TP x CP).

Shapes: one more page and one more slot than can be handed out (number 0 takes padding rows' writes), G local KV
heads, d head_dim, C local conv channels, K taps, HV local value heads, dk, dv head dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared_config.checkpoint import head_share
from shared_config.model import Qwen3NextConfig


@dataclass
class KVCache:
    """k, v [pages + 1, page_size, G, d]."""

    k: torch.Tensor
    v: torch.Tensor


@dataclass
class StateCache:
    """conv [slots + 1, C, K-1] in the model's dtype, recurrent [slots + 1, HV, dk, dv] in float32."""

    conv: torch.Tensor
    recurrent: torch.Tensor


LayerCache = KVCache | StateCache


def _layer_shapes(config: Qwen3NextConfig, head_shares: int, page_size: int) -> tuple[tuple[int, ...], ...]:
    kv_heads = len(head_share(config.num_key_value_heads, 0, head_shares, "num_key_value_heads"))
    return (
        (page_size, kv_heads, config.head_dim),
        (config.conv_dim // head_shares, config.linear_conv_kernel_dim - 1),
        (
            config.linear_num_value_heads // head_shares,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        ),
    )


def cache_bytes(
    config: Qwen3NextConfig, *, head_shares: int, page_size: int, itemsize: int
) -> tuple[int, int]:
    """(bytes of one page, bytes of one slot) over all layers of one rank."""
    kv, conv, recurrent = (torch.Size(s).numel() for s in _layer_shapes(config, head_shares, page_size))
    attention = config.layer_types.count("full_attention")
    linear = len(config.layer_types) - attention
    return 2 * kv * itemsize * attention, (conv * itemsize + recurrent * 4) * linear


def make_cache(
    config: Qwen3NextConfig,
    *,
    head_shares: int,
    num_pages: int,
    page_size: int,
    num_slots: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[LayerCache]:
    """One zeroed cache a layer."""
    kv, conv, recurrent = _layer_shapes(config, head_shares, page_size)

    def zeros(count: int, shape: tuple[int, ...], dt: torch.dtype) -> torch.Tensor:
        return torch.zeros(count + 1, *shape, dtype=dt, device=device)

    return [
        KVCache(zeros(num_pages, kv, dtype), zeros(num_pages, kv, dtype))
        if kind == "full_attention"
        else StateCache(zeros(num_slots, conv, dtype), zeros(num_slots, recurrent, torch.float32))
        for kind in config.layer_types
    ]
