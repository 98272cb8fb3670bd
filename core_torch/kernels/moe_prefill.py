"""Routing and experts for many tokens: `route` and `routed_experts` on tensor cores, sorted and combined on the device.

Shapes: T tokens, D hidden, N experts, K experts per token, I intermediate (this rank's share). Nothing here waits for
the device, so the host runs ahead; and no sum depends on the order in which programs end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from core_torch.kernels.contract import check_operands
from core_torch.kernels.native import Answer, first_failure
from core_torch.kernels.triton_kernels import Launch, check_triton, launch

MAX_EXPERTS, MAX_CHOICES = 1024, 32
MAX_WHOLE = 256  # values of a row of `hidden` up to which `down` holds 192 rows: 96 KiB of shared memory
MIN_BLOCK = 16  # of the inner dim of a product on tensor cores
CHUNK = 1024  # pairs that one program of the sort takes (jit/moe_prefill.py: LANE_BITS)
BLOCK_CHUNKS, BLOCK_TILES = 16, 16
for_all_layers = lru_cache(maxsize=256)  # of a pass, and for passes of a length that comes again


@dataclass(frozen=True)
class Tile:
    """What one program multiplies: up to `parts` times `rows` tokens of one expert with `cols` rows of its weights."""

    rows: int
    parts: int
    cols: int
    block: int  # of the inner dim
    warps: int
    stages: int
    whole: bool = False  # of `down`: a program holds its rows whole and does all columns, `cols` at a time


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


def choose_tiles(tokens_per_expert: float, intermediate_size: int) -> Tiles:
    """The fewest parts of 64 tokens that most experts fit into: an expert's weights then leave memory and L2 once."""
    parts = 1 if tokens_per_expert <= 48 else 2 if tokens_per_expert <= 104 else 3
    down = Tile(rows=64, parts=parts, cols=128, block=64, warps=4, stages=2)
    if parts == 3 and intermediate_size <= MAX_WHOLE:
        block = max(_power_of_two(intermediate_size), MIN_BLOCK)
        down = Tile(rows=64, parts=parts, cols=64, block=block, warps=4, stages=3, whole=True)
    return Tiles(Tile(rows=64, parts=parts, cols=256, block=64, warps=8, stages=4), down)


def every_choice(intermediate_size: int) -> list[Tiles]:
    return [choose_tiles(tokens, intermediate_size) for tokens in (48, 104, 105)]


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
    T, shared = logits.shape[0], logits.shape[1] - num_experts
    weights = logits.new_empty(T, top_k + shared)
    experts = logits.new_empty(T, top_k + shared, dtype=torch.int32)
    run = route_launch(T, logits.stride(0), num_experts, top_k, shared, normalize)
    launch(run, logits, weights, experts, T)
    return weights, experts


@for_all_layers
def route_launch(
    num_tokens: int, stride: int, num_experts: int, top_k: int, shared: int, normalize: bool
) -> Launch:
    """`stride`: elements from one row of logits to the next; `shared`: 1 for a shared expert's gate behind them."""
    sizes = {
        "STRIDE": stride,
        "N": num_experts,
        "K": top_k,
        "SHARED": shared,
        "NORMALIZE": normalize,
        "ROWS": 1,
        "BLOCK_N": _power_of_two(num_experts),
        "BLOCK_K": _power_of_two(top_k + shared),
    }
    return Launch("moe_prefill", "route", (num_tokens, 1), sizes, warps=1)


@dataclass(frozen=True)
class Grouping:
    """order [T * K]: pairs t * K + k, sorted; tiles [M, 4]: expert (-1: no tile), first place, number of pairs."""

    order: Tensor
    tiles: Tensor


@dataclass(frozen=True)
class Sorting:
    """A stable counting sort of pairs by expert: two kernels, and the sizes of what they write."""

    count: Launch
    scatter: Launch
    chunks: int
    bins: int
    tiles: int  # at most


@for_all_layers
def sorting(pairs: int, num_experts: int, tile_tokens: int) -> Sorting:
    chunks, bins = -(-pairs // CHUNK), _power_of_two(num_experts)
    sizes, how = {"N": num_experts, "CHUNK": CHUNK, "BLOCK_N": bins}, partial(Launch, "moe_prefill")
    tiles = pairs // tile_tokens + min(num_experts, pairs)  # each expert's last tile may be short
    programs = max(chunks, -(-tiles // BLOCK_TILES))
    blocks = {"TILE": tile_tokens, "BLOCK_C": BLOCK_CHUNKS, "BLOCK_TILES": BLOCK_TILES}
    return Sorting(
        count=how("count", (chunks, 1), sizes),
        scatter=how("scatter", (programs, 1), {**sizes, **blocks}, warps=8),
        chunks=chunks,
        bins=bins,
        tiles=tiles,
    )


def group_by_expert(experts: Tensor, *, num_experts: int, tile_tokens: int) -> Grouping:
    """Pairs sorted by expert. experts [T, K] int32 or int64; ids outside 0..N-1: no expert."""
    pairs = experts.numel()
    run = sorting(pairs, num_experts, tile_tokens)
    counts = experts.new_empty(run.chunks, run.bins, dtype=torch.int32)
    order = experts.new_empty(pairs, dtype=torch.int32)
    tiles = experts.new_empty(run.tiles, 4, dtype=torch.int32)
    launch(run.count, experts, counts, pairs)
    launch(run.scatter, experts, counts, order, tiles, pairs, run.chunks, run.tiles)
    return Grouping(order, tiles)


def gate_up_product(x: Tensor, group: Grouping, gate_up: Tensor, *, top_k: int, tile: Tile) -> Tensor:
    """silu(gate(x)) * up(x) of every pair, sorted: x [T, D], gate_up [N, 2I, D] -> [T * top_k, I]."""
    D, I = x.shape[1], gate_up.shape[1] // 2  # noqa: E741
    hidden = x.new_empty(len(group.order), I)
    launch(gate_up_launch(len(group.tiles), D, I, top_k, tile), x, group.order, group.tiles, gate_up, hidden)
    return hidden


@for_all_layers
def gate_up_launch(
    num_tiles: int, hidden_size: int, intermediate_size: int, top_k: int, tile: Tile
) -> Launch:
    sizes = {"D": hidden_size, "I": intermediate_size, "K": top_k, **_tile_sizes(tile), "BLOCK_D": tile.block}
    grid = num_tiles * -(-2 * intermediate_size // tile.cols), 1
    return Launch("moe_prefill", "gate_up", grid, sizes, tile.warps, tile.stages)


def down_product(hidden: Tensor, group: Grouping, down: Tensor, weights: Tensor, *, tile: Tile) -> Tensor:
    """weight * down(hidden), each pair at its own place: hidden [T * K, I] sorted, down [N, D, I] -> [T * K, D]."""
    D, I = down.shape[1:]  # noqa: E741
    parts = hidden.new_empty(len(hidden), D)
    operands = hidden, group.order, group.tiles, down, weights, parts
    launch(down_launch(len(group.tiles), D, I, tile), *operands)
    return parts


@for_all_layers
def down_launch(num_tiles: int, hidden_size: int, intermediate_size: int, tile: Tile) -> Launch:
    sizes = {"D": hidden_size, "I": intermediate_size, **_tile_sizes(tile), "BLOCK_I": tile.block}
    sizes["WHOLE"] = tile.whole
    if tile.whole and intermediate_size > tile.block:
        raise ValueError(
            f"a tile that holds {intermediate_size} values of a row needs as large a block, got {tile}"
        )
    grid = num_tiles * (1 if tile.whole else -(-hidden_size // tile.cols)), 1
    return Launch("moe_prefill", "down", grid, sizes, tile.warps, tile.stages)


def combine(parts: Tensor, experts: Tensor, *, num_experts: int) -> Tensor:
    """The float32 sum of each token's parts [T * K, D], in the order of its choices; those without an expert add 0."""
    (T, K), D = experts.shape, parts.shape[1]
    out = parts.new_empty(T, D)
    launch(combine_launch(T, num_experts, D, K), parts, experts, out)
    return out


@for_all_layers
def combine_launch(num_tokens: int, num_experts: int, hidden_size: int, top_k: int) -> Launch:
    block = min(_power_of_two(hidden_size), 2048)
    sizes = {"N": num_experts, "D": hidden_size, "K": top_k, "BLOCK_D": block}
    return Launch("moe_prefill", "combine", (num_tokens, -(-hidden_size // block)), sizes)


def _tile_sizes(tile: Tile) -> dict[str, int]:
    return {"ROWS": tile.rows, "PARTS": tile.parts, "COLS": tile.cols}


@dataclass(frozen=True)
class ChoiceParts:
    """This rank's partial sum [T, D] before a token's choices are added: parts [T * K, D], weighted, of experts [T, K].

    A choice whose id is outside 0..num_experts-1 adds nothing, and its part is undefined.
    """

    parts: Tensor
    experts: Tensor
    num_experts: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of the sum."""
        return len(self.experts), self.parts.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts.dtype

    @property
    def itemsize(self) -> int:
        return self.parts.itemsize

    def check(self, weight: Tensor, residual: Tensor) -> None:
        """`check_operands` of the sum, before there is one."""
        if self.experts.dim() != 2 or self.experts.shape[1] == 0:
            raise ValueError(
                f"experts must be [num_tokens, choices of each], got shape {tuple(self.experts.shape)}"
            )
        if not (self.parts.is_contiguous() and self.experts.is_contiguous()):
            raise ValueError(
                f"parts and experts must be contiguous, got strides {self.parts.stride()} and {self.experts.stride()}"
            )
        if self.parts.dim() != 2 or len(self.parts) != self.experts.numel():
            raise ValueError(
                f"parts must have a row for each of experts {tuple(self.experts.shape)}, got shape "
                f"{tuple(self.parts.shape)}"
            )
        check_operands(self.parts[: self.shape[0]], weight, residual=residual)

    def sum(self) -> Tensor:
        return combine(self.parts, self.experts, num_experts=self.num_experts)


def expert_parts_prefill(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, *, tiles: Tiles | None = None
) -> ChoiceParts:
    """`moe.routed_experts` before its sum over a token's choices, in four kernels; a token's bits do not depend on the
    other tokens, for one choice of `tiles`.

    x [T, D], weights [T, K] bfloat16; experts [T, K] int32 or int64, where an id outside 0..N-1 stands for no expert;
    gate_up [N, 2I, D] (gate rows first), down [N, D, I]. `tiles` (default: by the mean number of tokens an expert)
    change the time, and in theory the last bit.
    """
    K, N = experts.shape[1], len(down)
    tiles = tiles or choose_tiles(experts.numel() / N, down.shape[2])
    group = group_by_expert(experts, num_experts=N, tile_tokens=tiles.tokens)
    hidden = gate_up_product(x, group, gate_up, top_k=K, tile=tiles.gate_up)
    return ChoiceParts(down_product(hidden, group, down, weights, tile=tiles.down), experts, N)


def routed_experts_prefill(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, *, tiles: Tiles | None = None
) -> Tensor:
    """`moe.routed_experts` in five kernels: `expert_parts_prefill` with its sum -> this rank's partial sum [T, D]."""
    return expert_parts_prefill(x, weights, experts, gate_up, down, tiles=tiles).sum()


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
