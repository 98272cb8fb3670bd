"""Routing and experts for many tokens: `route` and `routed_experts` on tensor cores, sorted and combined on the device.

Shapes: T tokens, D hidden, N experts, K experts per token, I intermediate (this rank's share). Nothing here waits for
the device, so the host runs ahead; and no sum depends on the order in which programs end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core_torch.kernels.native import Answer, first_failure
from core_torch.kernels.triton_kernels import check_triton, require_jit

MAX_EXPERTS, MAX_CHOICES = 1024, 32
CHUNK = 1024  # pairs that one program of the sort takes (jit/moe_prefill.py: LANE_BITS)
BLOCK_CHUNKS, BLOCK_TILES, ROUTE_ROWS = 16, 16, 4


@dataclass(frozen=True)
class Tile:
    """What one program multiplies: up to `parts` times `rows` tokens of one expert with `cols` rows of its weights."""

    rows: int
    parts: int
    cols: int
    block: int  # of the inner dim
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Both products' tiles; they share the list of tiles, so `rows * parts` must be the same."""

    gate_up: Tile
    down: Tile

    def __post_init__(self) -> None:
        if self.gate_up.rows * self.gate_up.parts != self.tokens:
            raise ValueError(f"both products must have tiles of as many tokens, got {self}")

    @property
    def tokens(self) -> int:
        return self.down.rows * self.down.parts


def choose_tiles(tokens_per_expert: float) -> Tiles:
    """The fewest parts of 64 tokens that most experts fit into: an expert's weights then leave memory and L2 once."""
    parts = 1 if tokens_per_expert <= 48 else 2 if tokens_per_expert <= 104 else 3
    return Tiles(
        gate_up=Tile(rows=64, parts=parts, cols=256, block=64, warps=8, stages=4),
        down=Tile(rows=64, parts=parts, cols=128, block=64, warps=4, stages=2),
    )


EVERY_CHOICE = tuple(choose_tiles(tokens) for tokens in (48, 104, 105))


def check_moe_prefill(
    *,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Answer:
    """Whether the functions below take these experts; ask once and keep the answer.

    A shared expert that is handled as one more counts in `num_experts` and `top_k`.
    """
    on_device = check_triton(device)
    return first_failure(
        (on_device.usable, on_device.reason),
        (dtype == torch.bfloat16, f"moe_prefill takes bfloat16, not {dtype}"),
        (num_experts <= MAX_EXPERTS, f"moe_prefill takes {MAX_EXPERTS} experts, not {num_experts}"),
        (top_k <= MAX_CHOICES, f"moe_prefill takes {MAX_CHOICES} experts a token, not {top_k}"),
        (
            hidden_size % 16 == 0 and intermediate_size % 16 == 0,
            f"moe_prefill takes sizes that are multiples of 16, not {hidden_size} and {intermediate_size}",
        ),
    )


def route_prefill(logits: Tensor, *, num_experts: int, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """`moe.route` in one kernel; of equal logits the lower expert comes first.

    logits [T, N] bfloat16 -> (weights [T, K] bfloat16, experts [T, K] int32), K = top_k. With logits [T, N + 1] the
    last column is the gate of a shared expert: it becomes expert number N and choice K of every token, weighted by
    sigmoid(gate). Rows may be strided.
    """
    jit, T = require_jit("moe_prefill"), logits.shape[0]
    shared = logits.shape[1] - num_experts
    weights = logits.new_empty(T, top_k + shared)
    experts = logits.new_empty(T, top_k + shared, dtype=torch.int32)
    jit.route[(-(-T // ROUTE_ROWS),)](
        logits,
        weights,
        experts,
        T,
        logits.stride(0),
        N=num_experts,
        K=top_k,
        SHARED=shared,
        NORMALIZE=normalize,
        ROWS=ROUTE_ROWS,
        BLOCK_N=_power_of_two(num_experts),
        BLOCK_K=_power_of_two(top_k + shared),
        num_warps=4,
    )
    return weights, experts


@dataclass(frozen=True)
class Grouping:
    """order [T * K]: pairs t * K + k, sorted; tiles [M, 4]: expert (-1: no tile), first place, number of pairs."""

    order: Tensor
    tiles: Tensor


def group_by_expert(experts: Tensor, *, num_experts: int, tile_tokens: int) -> Grouping:
    """A stable counting sort in three kernels. experts [T, K] int32 or int64; ids outside 0..N-1: no expert."""
    jit, pairs = require_jit("moe_prefill"), experts.numel()
    chunks, bins = -(-pairs // CHUNK), _power_of_two(num_experts)
    counts, shifts = experts.new_empty(2, chunks, bins, dtype=torch.int32)
    ends = experts.new_empty(bins, dtype=torch.int32)
    order = experts.new_empty(pairs, dtype=torch.int32)
    num_tiles = pairs // tile_tokens + min(num_experts, pairs)  # each expert's last tile may be short
    tiles = experts.new_empty(num_tiles, 4, dtype=torch.int32)
    sizes = {"N": num_experts, "CHUNK": CHUNK, "BLOCK_N": bins}
    jit.count[(chunks,)](experts, counts, pairs, **sizes, num_warps=4)
    jit.place[(1,)](counts, shifts, ends, chunks, BLOCK_N=bins, BLOCK_C=BLOCK_CHUNKS, num_warps=8)
    jit.scatter[(chunks,)](
        experts,
        shifts,
        ends,
        order,
        tiles,
        pairs,
        num_tiles,
        **sizes,
        TILE=tile_tokens,
        BLOCK_TILES=BLOCK_TILES,
        num_warps=4,
    )
    return Grouping(order, tiles)


def gate_up_product(x: Tensor, group: Grouping, gate_up: Tensor, *, top_k: int, tile: Tile) -> Tensor:
    """silu(gate(x)) * up(x) of every pair, sorted: x [T, D], gate_up [N, 2I, D] -> [T * top_k, I]."""
    D, I = x.shape[1], gate_up.shape[1] // 2  # noqa: E741
    hidden = x.new_empty(len(group.order), I)
    require_jit("moe_prefill").gate_up[(len(group.tiles) * -(-2 * I // tile.cols),)](
        x,
        group.order,
        group.tiles,
        gate_up,
        hidden,
        D=D,
        I=I,
        K=top_k,
        ROWS=tile.rows,
        PARTS=tile.parts,
        COLS=tile.cols,
        BLOCK_D=tile.block,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return hidden


def down_product(hidden: Tensor, group: Grouping, down: Tensor, weights: Tensor, *, tile: Tile) -> Tensor:
    """weight * down(hidden), each pair at its own place: hidden [T * K, I] sorted, down [N, D, I] -> [T * K, D]."""
    D, I = down.shape[1:]  # noqa: E741
    parts = hidden.new_empty(len(hidden), D)
    require_jit("moe_prefill").down[(len(group.tiles) * -(-D // tile.cols),)](
        hidden,
        group.order,
        group.tiles,
        down,
        weights,
        parts,
        D=D,
        I=I,
        ROWS=tile.rows,
        PARTS=tile.parts,
        COLS=tile.cols,
        BLOCK_I=tile.block,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return parts


def combine(parts: Tensor, experts: Tensor, *, num_experts: int) -> Tensor:
    """The float32 sum of each token's parts [T * K, D], in the order of its choices; those without an expert add 0."""
    (T, K), D = experts.shape, parts.shape[1]
    out, block = parts.new_empty(T, D), min(_power_of_two(D), 2048)
    require_jit("moe_prefill").combine[(T, -(-D // block))](
        parts, experts, out, N=num_experts, D=D, K=K, BLOCK_D=block, num_warps=4
    )
    return out


def routed_experts_prefill(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, *, tiles: Tiles | None = None
) -> Tensor:
    """`moe.routed_experts` in six kernels; a token's bits do not depend on the other tokens, for one choice of `tiles`.

    x [T, D], weights [T, K] bfloat16; experts [T, K] int32 or int64, where an id outside 0..N-1 stands for no expert;
    gate_up [N, 2I, D] (gate rows first), down [N, D, I] -> this rank's partial sum [T, D]. `tiles` (default: by the
    mean number of tokens an expert) change the time, and in theory the last bit.
    """
    K, N = experts.shape[1], len(down)
    tiles = tiles or choose_tiles(experts.numel() / N)
    group = group_by_expert(experts, num_experts=N, tile_tokens=tiles.tokens)
    hidden = gate_up_product(x, group, gate_up, top_k=K, tile=tiles.gate_up)
    return combine(down_product(hidden, group, down, weights, tile=tiles.down), experts, num_experts=N)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
