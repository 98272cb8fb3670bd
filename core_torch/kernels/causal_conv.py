"""Depthwise causal convolution + SiLU over a sequence that arrives in pieces.

Shapes: T tokens of one sequence, B sequences of one token each, C channels, K taps. A sequence's state is its
last K-1 inputs [C, K-1], oldest first; zeros before the first token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_conv(
    x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, C], state [C, K-1], weight [C, K] -> (silu(conv(x)) [T, C], new state [C, K-1])."""
    taps = weight.shape[-1]
    padded = torch.cat((state.to(x.dtype), x.T), dim=-1)
    out = F.silu(F.conv1d(padded[None], weight[:, None], groups=weight.shape[0])[0])
    return out.T, padded[:, padded.shape[-1] - (taps - 1) :]


def causal_conv_step(
    x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token each: x [B, C], state [B, C, K-1], weight [C, K] -> (out [B, C], new state [B, C, K-1])."""
    window = torch.cat((state.to(x.dtype), x[..., None]), dim=-1)
    out = (window.float() * weight.float()).sum(-1).to(x.dtype)
    return F.silu(out), window[..., 1:]


def causal_conv_reference(
    x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64, token by token."""
    window = state.double()
    rows = []
    for token in x.double():
        full = torch.cat((window, token[:, None]), dim=-1)
        rows.append((full * weight.double()).sum(-1))
        window = full[:, 1:]
    out = torch.stack(rows)
    return out / (1 + torch.exp(-out)), window
