"""Sparse mixture of experts: routing, and the routed experts' SwiGLU MLPs.

Shapes: T tokens, D hidden, N experts (this rank's, or all), K experts per token, I intermediate (this rank's share).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def route(logits: torch.Tensor, *, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, N] -> (weights [T, K] in logits' dtype, expert ids [T, K]); softmax and top-k in float32."""
    weights, experts = logits.float().softmax(-1).topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), experts


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half, over the last dim."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def routed_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    first: int | None = None,
) -> torch.Tensor:
    """sum over a token's experts of weight * down(silu(gate(x)) * up(x)), as this rank's partial sum [T, D].

    x [T, D], weights and experts [T, K], gate_up [N, 2I, D] (gate rows first), down [N, D, I]. Rows are sorted by
    expert so that each expert's weights are read once; every shape but the groups' sizes is fixed, and those stay
    on the device where `grouped_mm` takes them (bf16 on GPUs), so that the step can be captured in a CUDA graph.

    With `first` (expert parallelism) the N experts are numbers first..first+N-1, and all others add nothing.
    """
    (T, K), N = experts.shape, gate_up.shape[0]
    ids, mine = experts.flatten(), None
    if first is not None:
        ids = ids - first
        mine = (ids >= 0) & (ids < N)
        ids = ids.where(mine, N)  # the others' rows sort last, behind those of every expert here
    order = ids.argsort(stable=True)
    rows = x[order // K]
    counts = torch.zeros(N + 1, dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, ids, torch.ones_like(order, dtype=torch.int32))
    if x.is_cuda and x.dtype == torch.bfloat16:
        ends = counts[:N].cumsum(0, dtype=torch.int32)
        hidden = swiglu(F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends))
        out = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends)
    else:
        *groups, others = rows.split(counts.tolist())
        outs = [F.linear(swiglu(F.linear(p, gate_up[n])), down[n]) for n, p in enumerate(groups) if len(p)]
        out = torch.cat([*outs, others])
    unsorted = torch.empty_like(out)
    unsorted[order] = out
    if mine is not None:  # whatever was left in the others' rows
        unsorted.masked_fill_(~mine[:, None], 0)
    return (unsorted.view(T, K, -1).float() * weights[..., None].float()).sum(1).to(x.dtype)


def routed_experts_reference(
    x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """float64, token by token and expert by expert."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    size = down.shape[-1]
    for t in range(x.shape[0]):
        for weight, n in zip(weights[t].tolist(), experts[t].tolist(), strict=True):
            both = gate_up[n].double() @ x[t].double()
            gate, up = both[:size], both[size:]
            out[t] += weight * (down[n].double() @ (gate / (1 + torch.exp(-gate)) * up))
    return out
