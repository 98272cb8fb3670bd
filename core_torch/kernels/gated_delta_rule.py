"""The gated delta rule: a linear-attention state that decays, and is corrected towards each new value.

    S_t = exp(g_t) S_{t-1} + k_t outer beta_t (v_t - k_t^T exp(g_t) S_{t-1}),    o_t = q_t^T S_t / sqrt(dk)

with q and k l2-normalised per head (Yang et al., "Gated Delta Networks", arXiv 2412.06464). One state serves a
value head; `HV / H` consecutive value heads share a query/key head.

Shapes: T tokens of one sequence, B sequences of one token each, H key heads, HV value heads, dk, dv head dims,
C chunk length. States are float32 [HV, dk, dv]; g is the log of the decay (<= 0), beta in (0, 1).
"""

from __future__ import annotations

import torch

L2_EPS = 1e-6


def l2_normalize(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def gated_delta_gates(
    a: torch.Tensor, b: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(g, beta) in float32 from the projections a, b [T, HV]: g = -exp(A_log) * softplus(a + dt_bias)."""
    g = -a_log.float().exp() * torch.nn.functional.softplus(a.float() + dt_bias.float())
    return g, b.sigmoid().float()


def _prepare(q: torch.Tensor, k: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise in float32, scale q, and repeat both to the value heads (dim -2)."""
    q32 = l2_normalize(q.float()) * q.shape[-1] ** -0.5
    k32 = l2_normalize(k.float())
    repeat = heads // k.shape[-2]
    return q32.repeat_interleave(repeat, dim=-2), k32.repeat_interleave(repeat, dim=-2)


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    chunk: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [T, H, dk], v [T, HV, dv], g, beta [T, HV], state [HV, dk, dv] -> (o [T, HV, dv], new state).

    Within a chunk the corrections obey a unit lower-triangular system, solved at once (the "UT transform" of
    Yang et al., arXiv 2406.06484, with decay); chunks follow one another through the state. o has v's dtype.
    """
    T, HV, dv = v.shape
    q32, k32 = _prepare(q, k, HV)
    pad = -T % chunk
    count = (T + pad) // chunk

    def chunked(x: torch.Tensor) -> torch.Tensor:  # [T, HV, ...] -> [HV, count, C, ...]
        x = torch.nn.functional.pad(x.float(), (0, 0) * (x.dim() - 1) + (0, pad))
        return x.reshape(count, chunk, *x.shape[1:]).movedim(2, 0)

    qc, kc, vc, gc, bc = (chunked(x) for x in (q32, k32, v, g, beta))
    decay = gc.cumsum(-1)  # log decay from the chunk's start, [HV, count, C]
    upper = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device).triu(1)
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(upper, float("-inf")).exp()

    k_beta = kc * bc[..., None]
    system = (k_beta @ kc.transpose(-1, -2)) * between  # its diagonal is taken as ones
    right = torch.cat((vc * bc[..., None], k_beta * decay.exp()[..., None]), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new_values, reads = solved[..., :dv], solved[..., dv:]
    scores = (qc @ kc.transpose(-1, -2)) * between
    q_in = qc * decay.exp()[..., None]
    k_out = kc * (decay[..., -1:] - decay).exp()[..., None]
    carry = decay[..., -1].exp()

    out = torch.empty(HV, count, chunk, dv, dtype=torch.float32, device=v.device)
    state = state.float()
    for i in range(count):
        correction = new_values[:, i] - reads[:, i] @ state
        out[:, i] = q_in[:, i] @ state + scores[:, i] @ correction
        state = state * carry[:, i, None, None] + k_out[:, i].transpose(-1, -2) @ correction
    return out.reshape(HV, -1, dv)[:, :T].transpose(0, 1).to(v.dtype), state


def gated_delta_rule_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token each: q, k [B, H, dk], v [B, HV, dv], g, beta [B, HV], state [B, HV, dk, dv] -> (o, new state)."""
    q32, k32 = _prepare(q, k, v.shape[-2])
    state = state * g.exp()[..., None, None]
    correction = (v.float() - (state * k32[..., None]).sum(-2)) * beta[..., None]
    state = state + k32[..., None] * correction[..., None, :]
    return (state * q32[..., None]).sum(-2).to(v.dtype), state


def gated_delta_rule_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64, token by token and head by head, straight from the recurrence above."""
    T, HV, dv = v.shape
    dk, group = q.shape[-1], HV // k.shape[-2]
    out = torch.zeros(T, HV, dv, dtype=torch.float64)
    state = state.double().clone()
    for t in range(T):
        for h in range(HV):
            query, key = q[t, h // group].double(), k[t, h // group].double()
            query = query / torch.sqrt((query * query).sum() + L2_EPS)
            key = key / torch.sqrt((key * key).sum() + L2_EPS)
            decayed = state[h] * torch.exp(g[t, h].double())
            correction = beta[t, h].double() * (v[t, h].double() - key @ decayed)
            state[h] = decayed + torch.outer(key, correction)
            out[t, h] = query @ state[h] / dk**0.5
    return out, state
