"""Gated DeltaNet over the prompts of a pass, in Triton: convolution, gates, chunks in parallel, their states in turn.

Shapes: T rows of all sequences, S sequences, N chunks of C = 64 rows of one sequence (its last one may be short), H key
heads, HV value heads, dk = dv = DIM head dims, K taps, CH = (2 H + HV) DIM channels; `STRIDE` is the width of a row of
the projection: q, k, v, z, b, a. `mixed` [T, CH] are q, k, v after the convolution, q and k with length one.

sequences [S, 5]: first row, rows, slot, whether it goes on from what the slot holds, first chunk. chunks [N, 4]: first
row, rows (0: nothing to do), how many rows of its sequence lie before it, sequence.

Within a chunk, with G the sum of log decays from its start and A_ij = beta_i exp(G_i - G_j) k_i k_j for i > j,
(I + A) solves for the corrections: v' = (I + A)^-1 (beta v - beta exp(G) k S), S the state that the chunk begins with
(the "UT transform" of Yang et al., arXiv 2406.06484, with decay).
"""

from __future__ import annotations

import triton
import triton.language as tl

SQUARE = tl.constexpr(16)  # rows that are solved one after another; four such blocks in a chunk


@triton.jit
def _rows(chunks, chunk):
    """(first row of the chunk, its rows)."""
    return tl.load(chunks + chunk * 4).to(tl.int64), tl.load(chunks + chunk * 4 + 1)


@triton.jit
def mix(
    projected,
    conv,
    conv_weight,
    a_log,
    dt_bias,
    mixed,
    decay,
    beta,
    chunks,
    sequences,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    DIM: tl.constexpr,
    TAPS: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """ROWS rows of one head's channels through convolution and SiLU, q and k l2-normalised; or a chunk's gates: decay
    [T, HV], log decays summed up from the chunk's start, and beta [T, HV], both float32."""
    parts: tl.constexpr = C // ROWS
    block = tl.program_id(1)
    part = tl.program_id(0) % parts
    chunk = tl.program_id(0) // parts
    first, count = _rows(chunks, chunk)
    CH: tl.constexpr = (2 * H + HV) * DIM
    if block == 2 * H + HV:
        if part > 0:
            return
        row = tl.arange(0, C)
        live = row < count
        rows = first + row
        head = tl.arange(0, BLOCK_H)
        kept = live[:, None] & (head < HV)[None, :]
        at_b = projected + rows[:, None] * STRIDE + CH + HV * DIM + head[None, :]
        b = tl.load(at_b, mask=kept, other=0.0).to(tl.float32)
        a = tl.load(at_b + HV, mask=kept, other=0.0).to(tl.float32)
        x = a + tl.load(dt_bias + head, mask=head < HV, other=0.0).to(tl.float32)[None, :]
        rate = tl.exp(tl.load(a_log + head, mask=head < HV, other=0.0).to(tl.float32))[None, :]
        g = -rate * tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))
        total = tl.cumsum(tl.where(kept, g, 0.0), axis=0)
        tl.store(decay + rows[:, None] * HV + head[None, :], total, mask=kept)
        tl.store(beta + rows[:, None] * HV + head[None, :], tl.sigmoid(b), mask=kept)
        return
    channel = block * DIM + tl.arange(0, DIM)
    before = tl.load(chunks + chunk * 4 + 2)  # rows of the sequence
    row = part * ROWS + tl.arange(0, ROWS)
    live = row < count
    rows = first + row
    row += before
    total = tl.zeros([ROWS, DIM], tl.float32)
    for back in tl.static_range(TAPS):
        weight = tl.load(conv_weight + channel * TAPS + (TAPS - 1 - back)).to(tl.float32)
        kept = (live & (row >= back))[:, None]
        x = tl.load(projected + (rows - back)[:, None] * STRIDE + channel[None, :], mask=kept, other=0.0)
        total += x.to(tl.float32) * weight[None, :]
    sequence = sequences + tl.load(chunks + chunk * 4 + 3) * 5
    if (before + part == 0) & (tl.load(sequence + 3) > 0):
        slot = tl.load(sequence + 2).to(tl.int64)
        kept_inputs = conv + (slot * CH + channel)[None, :] * (TAPS - 1)
        for back in tl.static_range(1, TAPS):
            weight = tl.load(conv_weight + channel * TAPS + (TAPS - 1 - back)).to(tl.float32)
            kept = (live & (row < back))[:, None]
            x = tl.load(kept_inputs + (row - back + TAPS - 1)[:, None], mask=kept, other=0.0)
            total += x.to(tl.float32) * weight[None, :]
    value = total * tl.sigmoid(total)
    if block < 2 * H:
        value *= tl.rsqrt(tl.sum(value * value, axis=1) + 1e-6)[:, None]
    tl.store(mixed + rows[:, None] * CH + channel[None, :], value.to(tl.bfloat16), mask=live[:, None])


@triton.jit
def keep_inputs(
    projected,
    conv,
    sequences,
    STRIDE: tl.constexpr,
    CH: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The last TAPS - 1 inputs of each sequence into its slot; `mix` must have read what lay there."""
    sequence = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(sequences + sequence * 5).to(tl.int64)
    count = tl.load(sequences + sequence * 5 + 1)
    slot = tl.load(sequences + sequence * 5 + 2).to(tl.int64)
    goes_on = tl.load(sequences + sequence * 5 + 3) > 0
    inside = channel < CH
    state = conv + (slot * CH + channel) * (TAPS - 1)
    # A place is written after those that it is read for: a short chunk moves old inputs towards the front.
    for place in tl.static_range(TAPS - 1):
        row = count - (TAPS - 1) + place
        new = tl.load(projected + (first + row) * STRIDE + channel, mask=inside & (row >= 0), other=0.0)
        old = tl.load(state + row + (TAPS - 1), mask=inside & (row < 0) & goes_on, other=0.0)
        tl.store(state + place, tl.where(row >= 0, new, old), mask=inside)


@triton.jit
def solve(
    mixed,
    decay,
    beta,
    reads,
    values,
    chunks,
    H: tl.constexpr,
    HV: tl.constexpr,
    DIM: tl.constexpr,
    C: tl.constexpr,
):
    """reads [T, HV, DIM] = (I + A)^-1 (beta exp(G) k), values [T, HV, DIM] = (I + A)^-1 (beta v)."""
    head = tl.program_id(1)
    first, count = _rows(chunks, tl.program_id(0))
    i = tl.arange(0, C)
    live = i < count
    rows = first + i
    dim = tl.arange(0, DIM)
    CH: tl.constexpr = (2 * H + HV) * DIM
    BLOCKS: tl.constexpr = C // SQUARE
    at = mixed + rows[:, None] * CH + dim[None, :]
    key = tl.load(at + (H + head // (HV // H)) * DIM, mask=live[:, None], other=0.0)
    g = tl.load(decay + rows * HV + head, mask=live, other=0.0)
    b = tl.load(beta + rows * HV + head, mask=live, other=0.0)

    lower = (i[:, None] > i[None, :]) & live[:, None]
    exponent = tl.where(lower, g[:, None] - g[None, :], 0.0)
    a = tl.where(lower, tl.dot(key, tl.trans(key)) * tl.exp(exponent) * b[:, None], 0.0)

    # The blocks on the diagonal, [BLOCKS, SQUARE, SQUARE], inverted row by row, all at the same time.
    block = tl.arange(0, BLOCKS)
    same = block[:, None, None, None] == block[None, None, :, None]
    inverse = -tl.sum(tl.where(same, a.reshape(BLOCKS, SQUARE, BLOCKS, SQUARE), 0.0), axis=2)
    place = tl.arange(0, SQUARE)
    for step in range(2, SQUARE):
        mine = (place == step)[None, :, None]
        row = tl.sum(tl.where(mine, inverse, 0.0), axis=1)
        row += tl.sum(row[:, :, None] * inverse, axis=1)
        inverse = tl.where(mine, row[:, None, :], inverse)
    inverse += tl.where(place[:, None] == place[None, :], 1.0, 0.0)[None, :, :]
    spread = tl.where(same, inverse[:, :, None, :], 0.0).reshape(C, C)

    # I + A = (I + D)(I + N), D the diagonal's blocks and N what is below them, so that N^4 = 0.
    below = tl.where(i[:, None] // SQUARE > i[None, :] // SQUARE, a, 0.0)
    n = tl.dot(spread, below, input_precision="tf32")
    rest = tl.where(i[:, None] == i[None, :], 1.0, 0.0) - n
    rest = tl.dot(rest, tl.dot(n, n, input_precision="tf32"), rest, input_precision="tf32")
    solved = tl.dot(rest, spread, input_precision="tf32").to(tl.bfloat16)

    out = rows[:, None] * (HV * DIM) + (head * DIM + dim)[None, :]
    scaled = (key.to(tl.float32) * (b * tl.exp(g))[:, None]).to(tl.bfloat16)
    tl.store(reads + out, tl.dot(solved, scaled).to(tl.bfloat16), mask=live[:, None])
    value = tl.load(at + (2 * H + head) * DIM, mask=live[:, None], other=0.0)
    scaled = (value.to(tl.float32) * b[:, None]).to(tl.bfloat16)
    tl.store(values + out, tl.dot(solved, scaled).to(tl.bfloat16), mask=live[:, None])


@triton.jit
def carry(
    mixed,
    decay,
    reads,
    values,
    before,
    state,
    sequences,
    H: tl.constexpr,
    HV: tl.constexpr,
    DIM: tl.constexpr,
    C: tl.constexpr,
    COLS: tl.constexpr,
):
    """The recurrence from chunk to chunk, for COLS columns of one head's state: before [N, HV, DIM, DIM] gets the state
    that each chunk begins with, values become the corrections v', state [slots, HV, DIM, DIM] (float32) the last."""
    blocks: tl.constexpr = DIM // COLS
    column = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    head = tl.program_id(0) // blocks
    sequence = tl.program_id(1)
    first = tl.load(sequences + sequence * 5).to(tl.int64)
    count = tl.load(sequences + sequence * 5 + 1)
    slot = tl.load(sequences + sequence * 5 + 2).to(tl.int64)
    goes_on = tl.load(sequences + sequence * 5 + 3) > 0
    chunk = tl.load(sequences + sequence * 5 + 4).to(tl.int64)
    dim = tl.arange(0, DIM)
    square = dim[:, None] * DIM + column[None, :]
    CH: tl.constexpr = (2 * H + HV) * DIM
    mixed += first * CH + (H + head // (HV // H)) * DIM
    decay += first * HV + head
    reads += (first * HV + head) * DIM
    values += (first * HV + head) * DIM
    state += (slot * HV + head) * (DIM * DIM)
    before += (chunk * HV + head) * (DIM * DIM)
    s = tl.load(state + square, mask=tl.full([DIM, COLS], 1, tl.int1) & goes_on, other=0.0)
    for at in range(0, count, C):
        row = at + tl.arange(0, C)
        live = row < count
        tl.store(before + square, s.to(tl.bfloat16))
        before += HV * DIM * DIM
        read = tl.load(reads + row[:, None] * (HV * DIM) + dim[None, :], mask=live[:, None], other=0.0)
        at_value = values + row[:, None] * (HV * DIM) + column[None, :]
        value = tl.load(at_value, mask=live[:, None], other=0.0).to(tl.float32)
        key = tl.load(mixed + row[None, :] * CH + dim[:, None], mask=live[None, :], other=0.0)
        g = tl.load(decay + row * HV, mask=live, other=0.0)
        last = tl.load(decay + (tl.minimum(at + C, count) - 1) * HV)
        value -= tl.dot(read, s.to(tl.bfloat16))
        tl.store(at_value, value.to(tl.bfloat16), mask=live[:, None])
        # Rows past the end have no value, but their g of 0 may be far above `last`.
        faded = value * tl.exp(tl.where(live, last - g, 0.0))[:, None]
        s = tl.dot(key, faded.to(tl.bfloat16), s * tl.exp(last))
    tl.store(state + square, s)


@triton.jit
def finish(
    projected,
    mixed,
    decay,
    values,
    before,
    norm_weight,
    out,
    chunks,
    scale,
    eps,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    DIM: tl.constexpr,
    C: tl.constexpr,
):
    """out [T, HV DIM] = norm((q S exp(G) + tril(q k exp(G_i - G_j)) v') * scale) * norm_weight * silu(z)."""
    head = tl.program_id(1)
    chunk = tl.program_id(0)
    first, count = _rows(chunks, chunk)
    i = tl.arange(0, C)
    live = i < count
    rows = first + i
    dim = tl.arange(0, DIM)
    kept = live[:, None]
    CH: tl.constexpr = (2 * H + HV) * DIM
    at = mixed + rows[:, None] * CH + (head // (HV // H) * DIM + dim)[None, :]
    query = tl.load(at, mask=kept, other=0.0)
    key = tl.load(at + H * DIM, mask=kept, other=0.0)
    g = tl.load(decay + rows * HV + head, mask=live, other=0.0)
    seen = (i[:, None] >= i[None, :]) & kept
    exponent = tl.where(seen, g[:, None] - g[None, :], 0.0)
    scores = tl.where(seen, tl.dot(query, tl.trans(key)) * tl.exp(exponent), 0.0)
    s = tl.load(before + (chunk.to(tl.int64) * HV + head) * (DIM * DIM) + dim[:, None] * DIM + dim[None, :])
    o = tl.dot(query, s) * tl.exp(g)[:, None]
    place = head * DIM + dim
    value = tl.load(values + rows[:, None] * (HV * DIM) + place[None, :], mask=kept, other=0.0)
    o = tl.dot(scores.to(tl.bfloat16), value, o) * scale

    normed = o * tl.rsqrt(tl.sum(o * o, axis=1) / DIM + eps)[:, None]
    z = tl.load(projected + rows[:, None] * STRIDE + (CH + place)[None, :], mask=kept, other=0.0).to(
        tl.float32
    )
    weight = tl.load(norm_weight + dim).to(tl.float32)
    gated = normed * weight[None, :] * (z * tl.sigmoid(z))
    tl.store(out + rows[:, None] * (HV * DIM) + place[None, :], gated.to(tl.bfloat16), mask=kept)
