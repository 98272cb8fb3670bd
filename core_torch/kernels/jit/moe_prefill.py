"""Routing and experts for many tokens, in Triton.

Shapes: T tokens, D hidden, N experts (a shared one counted), K choices of a token, P = T K pairs of a token and its
choice, numbered t * K + k, I intermediate. Pairs are sorted by expert; an expert's pairs are cut into tiles of rows
that one program works on, so a tile never mixes experts and no row is padded in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANE_BITS = tl.constexpr(10)  # a sort key is expert << LANE_BITS | place in the chunk
LOWEST = tl.constexpr(-(2**31))


@triton.jit
def route(
    logits,
    weights,
    experts,
    T,
    STRIDE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Softmax and top-k of bfloat16 logits [T, N (+ 1)]: bits and column make one integer key, so that each choice is
    one integer maximum, and of equal logits the lower expert comes first."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < T
    cols = tl.arange(0, BLOCK_N)
    at = logits + tl.minimum(rows, T - 1).to(tl.int64)[:, None] * STRIDE
    x = tl.load(at + cols[None, :], mask=(cols < N)[None, :], other=float("-inf"))
    bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    ordered = tl.where(bits < 0, bits ^ 0x7FFF, bits)
    key = tl.where((cols < N)[None, :], ordered * 65536 + (65535 - cols)[None, :], LOWEST)
    choice = tl.arange(0, BLOCK_K)
    best = tl.full([ROWS, BLOCK_K], LOWEST, tl.int32)
    for k in tl.static_range(K):
        top = tl.max(key, axis=1)
        best = tl.where((choice == k)[None, :], top[:, None], best)
        key = tl.where(key == top[:, None], LOWEST, key)
    high = best >> 16
    value = tl.where(high < 0, high ^ 0x7FFF, high).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    chosen = (choice < K)[None, :]
    largest = tl.max(tl.where(chosen, value, float("-inf")), axis=1)
    part = tl.where(chosen, tl.exp(value - largest[:, None]), 0.0)
    whole = part if NORMALIZE else tl.exp(x.to(tl.float32) - largest[:, None])
    weight = part / tl.sum(whole, axis=1)[:, None]
    expert = 65535 - (best & 0xFFFF)
    if SHARED:
        gate = tl.load(at + N).to(tl.float32)
        weight = tl.where((choice == K)[None, :], tl.sigmoid(gate), weight)
        expert = tl.where((choice == K)[None, :], N, expert)
    places = rows[:, None] * (K + SHARED) + choice[None, :]
    kept = live[:, None] & (choice < K + SHARED)[None, :]
    tl.store(weights + places, weight.to(tl.bfloat16), mask=kept)
    tl.store(experts + places, expert, mask=kept)


@triton.jit
def count(experts, counts, P, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr):
    """counts [chunks, BLOCK_N]: how often each expert was chosen among a chunk's pairs."""
    chunk = tl.program_id(0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(experts + at, mask=at < P, other=-1).to(tl.int32)
    found = tl.histogram(expert, BLOCK_N, mask=(expert >= 0) & (expert < N))
    tl.store(counts + chunk * BLOCK_N + tl.arange(0, BLOCK_N), found)


@triton.jit
def scatter(
    experts,
    counts,
    order,
    tiles,
    P,
    chunks,
    num_tiles,
    N: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """order [P]: pairs sorted by expert, those of one expert in their own order (pairs without an expert are left out).

    tiles [num_tiles, 4]: expert, first place in `order`, number of pairs; expert -1 where there are fewer tiles. A
    program has a chunk of pairs, if there is one for it, and its share of the tiles. Each adds up all of `counts`
    [chunks, BLOCK_N], which is faster than one kernel more that does it for all.
    """
    chunk = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    at = chunk * CHUNK + lane
    expert = tl.load(experts + at, mask=at < P, other=-1).to(tl.int32)
    expert = tl.where((expert >= 0) & (expert < N), expert, BLOCK_N)

    bins = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_N], tl.int32)
    earlier = tl.zeros([BLOCK_N], tl.int32)
    for block in range(0, chunks, BLOCK_C):
        row = (block + rows)[:, None]
        found = tl.load(counts + row * BLOCK_N + bins[None, :], mask=row < chunks, other=0)
        total += tl.sum(found, axis=0)
        earlier += tl.sum(tl.where(row < chunk, found, 0), axis=0)
    end = tl.cumsum(total, axis=0)
    first = end - total
    own = tl.load(counts + chunk * BLOCK_N + bins, mask=(bins < BLOCK_N) & (chunk < chunks), other=0)
    # What to add to a pair's place in its sorted chunk to find its place among all.
    shifts = first + earlier - (tl.cumsum(own, axis=0) - own)

    key = tl.sort((expert << LANE_BITS) | lane)
    expert = key >> LANE_BITS
    found = expert < BLOCK_N
    shift = tl.gather(shifts, tl.where(found, expert, 0), axis=0)
    tl.store(order + shift + lane, chunk * CHUNK + (key & (CHUNK - 1)), mask=found)

    own = (total + TILE - 1) // TILE
    tile_end = tl.cumsum(own, axis=0)
    for block in range(chunk, tl.cdiv(num_tiles, BLOCK_TILES), tl.num_programs(0)):
        tile = block * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
        # Each tile asks all experts whether it is theirs.
        mine = (tile[:, None] >= (tile_end - own)[None, :]) & (tile[:, None] < tile_end[None, :])
        start = first[None, :] + (tile[:, None] - (tile_end - own)[None, :]) * TILE
        which = tl.sum(tl.where(mine, bins[None, :] + 1, 0), axis=1) - 1
        begin = tl.sum(tl.where(mine, start, 0), axis=1)
        size = tl.sum(tl.where(mine, tl.minimum(end[None, :] - start, TILE), 0), axis=1)
        kept = tile < num_tiles
        tl.store(tiles + tile * 4, which, mask=kept)
        tl.store(tiles + tile * 4 + 1, begin, mask=kept)
        tl.store(tiles + tile * 4 + 2, size, mask=kept)


@triton.jit
def _rows(base, rows, width, live):
    """Pointers to the first element of `rows`, kept inside the tensor where not `live`."""
    return base + tl.where(live, rows, 0).to(tl.int64)[:, None] * width


@triton.jit
def _gate_up_rows(
    x,
    order,
    weights,
    hidden,
    start,
    size,
    column,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """PARTS * ROWS pairs of one expert times COLS rows of its weights, gate and up alternating."""
    place = tl.arange(0, COLS)
    source = column + place // 2
    inside = source < I
    k = tl.arange(0, BLOCK_D)
    b = weights + tl.where(inside, source + (place % 2) * I, 0)[None, :] * D + k[:, None]
    a = ()
    acc = ()
    live = ()
    for part in tl.static_range(PARTS):
        row = part * ROWS + tl.arange(0, ROWS)
        pair = tl.load(order + start + row, mask=row < size, other=0)
        a += (_rows(x, pair // K, D, row < size) + k[None, :],)
        live += ((row < size)[:, None],)
        acc += (tl.zeros([ROWS, COLS], tl.float32),)
    for at in range(0, D, BLOCK_D):
        inner = k < D - at
        if D % BLOCK_D == 0:
            w = tl.load(b + at, mask=inside[None, :], other=0.0)
        else:
            w = tl.load(b + at, mask=inside[None, :] & inner[:, None], other=0.0)
        more = ()
        for part in tl.static_range(PARTS):
            if D % BLOCK_D == 0:
                rows = tl.load(a[part] + at, mask=live[part], other=0.0)
            else:
                rows = tl.load(a[part] + at, mask=live[part] & inner[None, :], other=0.0)
            more += (tl.dot(rows, w, acc[part]),)
        acc = more
    out = column + tl.arange(0, COLS // 2)
    for part in tl.static_range(PARTS):
        gate, up = acc[part].reshape(ROWS, COLS // 2, 2).split()
        value = gate * tl.sigmoid(gate) * up
        row = start + part * ROWS + tl.arange(0, ROWS)
        at = hidden + row.to(tl.int64)[:, None] * I + out[None, :]
        tl.store(at, value.to(tl.bfloat16), mask=live[part] & (out < I)[None, :])


@triton.jit
def gate_up(
    x,
    order,
    tiles,
    weights,
    hidden,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden [P, I] in sorted order = silu(x gate^T) * (x up^T); x [T, D], weights [N, 2I, D] (gate rows first)."""
    blocks = tl.cdiv(I, COLS // 2)
    tile = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * (COLS // 2)
    expert = tl.load(tiles + tile * 4)
    if expert < 0:
        return
    start, size = tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    weights += expert.to(tl.int64) * (2 * I * D)
    # As many parts as the tile has: an expert with few tokens does not pay for many.
    for part in tl.static_range(PARTS):
        if (size > part * ROWS) & ((size <= (part + 1) * ROWS) | (part + 1 == PARTS)):
            _gate_up_rows(
                x, order, weights, hidden, start, size, column, D, I, K, ROWS, part + 1, COLS, BLOCK_D
            )


@triton.jit
def _down_rows(
    hidden,
    order,
    weights,
    scales,
    parts,
    start,
    size,
    column,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    out = column + tl.arange(0, COLS)
    inside = out < D
    k = tl.arange(0, BLOCK_I)
    b = weights + tl.where(inside, out, 0)[None, :] * I + k[:, None]
    a = ()
    acc = ()
    live = ()
    for part in tl.static_range(PARTS):
        row = part * ROWS + tl.arange(0, ROWS)
        a += (_rows(hidden, start + row, I, row < size) + k[None, :],)
        live += ((row < size)[:, None],)
        acc += (tl.zeros([ROWS, COLS], tl.float32),)
    for at in range(0, I, BLOCK_I):
        inner = k < I - at
        if I % BLOCK_I == 0:
            w = tl.load(b + at, mask=inside[None, :], other=0.0)
        else:
            w = tl.load(b + at, mask=inside[None, :] & inner[:, None], other=0.0)
        more = ()
        for part in tl.static_range(PARTS):
            if I % BLOCK_I == 0:
                rows = tl.load(a[part] + at, mask=live[part], other=0.0)
            else:
                rows = tl.load(a[part] + at, mask=live[part] & inner[None, :], other=0.0)
            more += (tl.dot(rows, w, acc[part]),)
        acc = more
    for part in tl.static_range(PARTS):
        row = part * ROWS + tl.arange(0, ROWS)
        pair = tl.load(order + start + row, mask=row < size, other=0)
        scale = tl.load(scales + pair, mask=row < size, other=0.0).to(tl.float32)
        at = parts + pair.to(tl.int64)[:, None] * D + out[None, :]
        value = acc[part] * scale[:, None]
        tl.store(at, value.to(tl.bfloat16), mask=live[part] & inside[None, :])


@triton.jit
def _down_whole_rows(
    hidden,
    order,
    weights,
    scales,
    parts,
    start,
    size,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """All columns, one block after the other: the rows stay where they are, and the next weights are on their way while
    a block's results are written."""
    k = tl.arange(0, BLOCK_I)
    inner = k < I
    a = ()
    scale = ()
    live = ()
    at = ()
    for part in tl.static_range(PARTS):
        row = part * ROWS + tl.arange(0, ROWS)
        kept = row < size
        rows = _rows(hidden, start + row, I, kept) + k[None, :]
        a += (tl.load(rows, mask=kept[:, None] & inner[None, :], other=0.0),)
        pair = tl.load(order + start + row, mask=kept, other=0)
        scale += (tl.load(scales + pair, mask=kept, other=0.0).to(tl.float32)[:, None],)
        live += (kept[:, None],)
        at += (parts + pair.to(tl.int64)[:, None] * D,)
    for column in range(0, D, COLS):
        out = column + tl.arange(0, COLS)
        inside = (out < D)[None, :]
        b = weights + tl.where(out < D, out, 0)[None, :] * I + k[:, None]
        w = tl.load(b, mask=inside & inner[:, None], other=0.0)
        for part in tl.static_range(PARTS):
            value = tl.dot(a[part], w) * scale[part]
            tl.store(at[part] + out[None, :], value.to(tl.bfloat16), mask=live[part] & inside)


@triton.jit
def down(
    hidden,
    order,
    tiles,
    weights,
    scales,
    parts,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """parts [P, D] = scale * hidden down^T, each row at its pair's own place; weights [N, D, I], scales [P].

    With WHOLE (I <= BLOCK_I) a program does all columns of its tile, otherwise COLS of them."""
    blocks = 1 if WHOLE else tl.cdiv(D, COLS)
    tile = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * COLS
    expert = tl.load(tiles + tile * 4)
    if expert < 0:
        return
    start, size = tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    weights += expert.to(tl.int64) * (D * I)
    for part in tl.static_range(PARTS):
        if (size > part * ROWS) & ((size <= (part + 1) * ROWS) | (part + 1 == PARTS)):
            if WHOLE:
                _down_whole_rows(
                    hidden, order, weights, scales, parts, start, size, D, I, ROWS, part + 1, COLS, BLOCK_I
                )
            else:
                _down_rows(
                    hidden,
                    order,
                    weights,
                    scales,
                    parts,
                    start,
                    size,
                    column,
                    D,
                    I,
                    ROWS,
                    part + 1,
                    COLS,
                    BLOCK_I,
                )


@triton.jit
def combine(parts, experts, out, N: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr):
    """out [T, D] = the sum over a token's choices in their order, in float32; choices without an expert are nothing."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(K):
        expert = tl.load(experts + token * K + k)
        at = parts + (token * K + k) * D + column
        kept = (column < D) & (expert >= 0) & (expert < N)
        total += tl.load(at, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + token * D + column, total.to(tl.bfloat16), mask=column < D)
