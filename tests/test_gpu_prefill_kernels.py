"""The kernels of prefill on one GPU: against float64, with odd sizes, bit by bit, and how fast.

A kernel is judged by float64 beside the plain path: it may not be much further away. The last tests print tables of
microseconds, TFLOP/s, and shares of what a large product or copy reaches in the same run. Where Triton is installed,
`TRITON_INTERPRET=1 pytest tests/test_gpu_prefill_kernels.py` runs the rest without a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from core_torch.kernels import moe
from core_torch.kernels.moe_prefill import (
    Tile,
    Tiles,
    check_moe_prefill,
    choose_tiles,
    combine,
    down_product,
    gate_up_product,
    group_by_expert,
    route_prefill,
    routed_experts_prefill,
)
from tests.triton_interpreter import INTERPRETED, correct_bfloat16

pytestmark = [
    pytest.mark.timeout(280),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
    if INTERPRETED
    else pytest.mark.gpu,
]

DEVICE = "cpu" if INTERPRETED else "cuda"
SIZES = (1, 3, 67) if INTERPRETED else (1, 3, 63, 67, 1000)
SLACK = 1.1  # times the plain path's distance from float64

if INTERPRETED:
    correct_bfloat16()


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def distance(got: Tensor, want: Tensor) -> float:
    """In the 2-norm, relative; NaN stays NaN and fails every comparison."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def assert_as_close(got: Tensor, plain: Tensor, want: Tensor, slack: float = SLACK) -> None:
    mine, base = distance(got, want), distance(plain, want)
    assert mine <= slack * base + 1e-6, (mine, base)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
    if not INTERPRETED:
        torch.cuda.synchronize()  # a failed kernel fails its own test


class Moe:
    def __init__(self, N: int, K: int, D: int, I: int) -> None:  # noqa: E741
        self.N, self.K, self.D, self.I = N, K, D, I
        self.gate_up = torch.empty(N, 2 * I, D, dtype=torch.bfloat16, device=DEVICE).normal_(0, D**-0.5)
        self.down = torch.empty(N, D, I, dtype=torch.bfloat16, device=DEVICE).normal_(0, I**-0.5)

    def tokens(self, T: int, favourites: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """(x, weights, experts); `favourites` is added to the first experts' logits."""
        logits = randn(T, self.N)
        logits[:, : self.K] += favourites
        return randn(T, self.D), *moe.route(logits, top_k=self.K, normalize=True)

    def reference(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """float64, expert by expert."""
        out = torch.zeros(x.shape, dtype=torch.float64, device=DEVICE)
        for n in experts.unique().tolist():
            tokens, choices = (experts == n).nonzero(as_tuple=True)
            gate, up = (x[tokens].double() @ self.gate_up[n].double().T).chunk(2, dim=-1)
            result = (gate * gate.sigmoid() * up) @ self.down[n].double().T
            out.index_add_(0, tokens, weights[tokens, choices].double()[:, None] * result)
        return out


MOE_SHAPES = {"tiny": (16, 4, 256, 16), "80B-A3B": (512, 10, 2048, 256), "odd": (7, 3, 272, 48)}
if INTERPRETED:
    MOE_SHAPES = {"odd": (7, 3, 80, 48)}
TILES = {
    "1x64": choose_tiles(16),
    "2x64": choose_tiles(100),
    "3x64": choose_tiles(160),
    "128": Tiles(Tile(128, 1, 256, 64, 8, 3), Tile(64, 2, 128, 64, 4, 2)),
}


@pytest.fixture(scope="module", params=MOE_SHAPES)
def experts(request: pytest.FixtureRequest) -> Moe:
    torch.manual_seed(1)
    return Moe(*MOE_SHAPES[request.param])


@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("tiles", TILES)
def test_moe_prefill(experts: Moe, T: int, tiles: str) -> None:
    assert (
        INTERPRETED
        or check_moe_prefill(
            num_experts=experts.N,
            top_k=experts.K,
            hidden_size=experts.D,
            intermediate_size=experts.I,
            dtype=torch.bfloat16,
            device=torch.device("cuda"),
        ).usable
    )
    for favourites in (0.0, 8.0):  # 8: all tokens on the same experts
        tokens = experts.tokens(T, favourites)
        want = experts.reference(*tokens)
        plain = moe.routed_experts(*tokens, experts.gate_up, experts.down)
        got = routed_experts_prefill(*tokens, experts.gate_up, experts.down, tiles=TILES[tiles])
        assert_as_close(got, plain, want)


def test_moe_prefill_bits_do_not_depend_on_the_other_tokens(experts: Moe) -> None:
    x, weights, chosen = experts.tokens(130, favourites=1.0)
    run = partial(routed_experts_prefill, gate_up=experts.gate_up, down=experts.down, tiles=TILES["2x64"])
    want = run(x, weights, chosen)
    for rows in (slice(0, 1), slice(5, 8), slice(30, 97)):
        assert torch.equal(run(x[rows], weights[rows], chosen[rows].int()), want[rows])


def test_moe_prefill_skips_choices_without_experts(experts: Moe) -> None:
    x, weights, chosen = experts.tokens(70)
    chosen[5:60] = -1
    chosen[60:, 1:] = -1
    got = routed_experts_prefill(x, weights, chosen, experts.gate_up, experts.down)
    want = routed_experts_prefill(x[:5], weights[:5], chosen[:5], experts.gate_up, experts.down)
    assert torch.equal(got[:5], want)
    assert not got[5:60].any()
    alone = routed_experts_prefill(
        x[60:], weights[60:, :1].contiguous(), chosen[60:, :1].contiguous(), experts.gate_up, experts.down
    )
    assert torch.equal(got[60:], alone)


@pytest.mark.parametrize("N", [1, 7, 513] if INTERPRETED else [1, 7, 16, 513, 1024])
@pytest.mark.parametrize("pairs", [1, 3, 1025] if INTERPRETED else [1, 3, 1000, 1024, 90112])
def test_pairs_are_sorted_by_expert(N: int, pairs: int) -> None:
    for ids in (
        torch.randint(0, N, (pairs,), device=DEVICE),
        torch.randint(-1, N, (pairs,), device=DEVICE),
        torch.full((pairs,), N - 1, device=DEVICE),
        torch.full((pairs,), -1, device=DEVICE),
    ):
        group = group_by_expert(ids[:, None], num_experts=N, tile_tokens=64)
        order = ids.argsort(stable=True)
        order = order[ids[order] >= 0]
        assert torch.equal(group.order[: len(order)].long(), order)
        found = [tile[:3] for tile in group.tiles.tolist() if tile[0] >= 0]
        want = []
        for expert, size in zip(*(x.tolist() for x in ids[ids >= 0].unique(return_counts=True)), strict=True):
            first = int((ids[ids >= 0] < expert).sum())
            want += [[expert, first + at, min(64, size - at)] for at in range(0, size, 64)]
        assert found == want


@pytest.mark.parametrize(("N", "K"), [(16, 4), (512, 10), (600, 3), (7, 7)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shared", [False, True])
def test_moe_route(N: int, K: int, normalize: bool, shared: bool) -> None:
    for T in SIZES:
        logits = randn(T, N + shared + 5)[:, : N + shared]  # rows as they lie in a wider product
        weights, chosen = route_prefill(logits, num_experts=N, top_k=K, normalize=normalize)
        want_weights, want = moe.route(logits[:, :N], top_k=K, normalize=normalize)
        picked = chosen[:, :K].long()
        # torch may choose equal logits in any order, so the experts are compared by what they have.
        assert torch.equal(logits.gather(1, picked), logits.gather(1, want))
        assert all(len(set(row)) == K for row in picked.tolist())
        limit = 2.0**-8 * want_weights.float().max()
        assert (weights[:, :K].float() - want_weights.float()).abs().max() <= limit
        if shared:
            assert (chosen[:, K] == N).all()
            assert distance(weights[:, K], logits[:, N].sigmoid()) < 2e-3


def test_of_equal_logits_the_lower_expert_comes_first() -> None:
    logits = torch.zeros(3, 64, device=DEVICE, dtype=torch.bfloat16)
    logits[1, 40:] = -1.0
    logits[2, 50:] = 1.0
    _, chosen = route_prefill(logits, num_experts=64, top_k=4, normalize=True)
    assert chosen.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [50, 51, 52, 53]]


REPLAYS = 7
COPY_BYTES = 1 << 30


def median_us(calls: list[Callable[[], object]]) -> float:
    """Microseconds a call: all of `calls` in one CUDA graph. Together they touch far more than the L2 cache holds."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[REPLAYS // 2]


def peaks() -> tuple[float, float]:
    """(bytes per second of a device copy, read and written; FLOP/s of a large bfloat16 product)."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    copy_us = median_us([lambda: target.copy_(source)] * 4)
    a, b = randn(8192, 8192), randn(8192, 8192)
    return 2e6 * COPY_BYTES / copy_us, 2e6 * 8192**3 / median_us([lambda: a @ b] * 4)


Row = tuple[str, int, float, float, float]  # kernel, tokens, microseconds, bytes, FLOP

GATE_UP_TILES = [
    *(Tile(64, 3, 256, 64, 8, stages) for stages in (3, 4)),
    *(Tile(64, 3, 128, 64, 4, stages) for stages in (2, 3)),
    Tile(64, 3, 128, 64, 8, 4),
    *(Tile(128, 1, 256, 64, 8, stages) for stages in (3, 4)),
    Tile(128, 2, 128, 64, 8, 3),
    Tile(64, 2, 256, 64, 8, 3),
    *(Tile(64, 1, 256, 64, 4, stages) for stages in (2, 3)),
]
DOWN_TILES = [
    *(Tile(64, 3, 128, 64, 4, stages) for stages in (2, 3, 4)),
    *(Tile(64, 3, 256, 64, 8, stages) for stages in (2, 3)),
    *(Tile(64, 3, 128, 64, 8, stages) for stages in (2, 3)),
    Tile(64, 3, 64, 128, 4, 2),
    *(Tile(128, 1, 256, 64, 8, stages) for stages in (2, 3)),
    Tile(128, 1, 128, 64, 8, 3),
    *(Tile(64, 2, 128, 64, 4, stages) for stages in (2, 3)),
    *(Tile(64, 1, 256, 64, 4, stages) for stages in (2, 3)),
]


def time_moe(case: Moe, T: int) -> Iterator[Row]:
    """One layer's weights are 20 times what the L2 cache holds."""
    x, weights, experts = case.tokens(T)
    ids, D, I, K = experts.int(), case.D, case.I, case.K  # noqa: E741
    used = len(experts.unique())
    up_flop, down_flop = 4.0 * T * K * D * I, 2.0 * T * K * D * I
    up_bytes = used * 4.0 * D * I + T * D * 2 + T * K * I * 2
    down_bytes = used * 2.0 * D * I + T * K * (I + D) * 2
    logits = randn(T, case.N)
    options = {"num_experts": case.N, "top_k": K, "normalize": True}
    yield "route", T, median_us([partial(route_prefill, logits, **options)] * 4), logits.nbytes, 0.0
    us = median_us([partial(moe.route, logits, top_k=K, normalize=True)] * 4)
    yield "route plain", T, us, logits.nbytes, 0.0
    us = median_us([partial(group_by_expert, ids, num_experts=case.N, tile_tokens=192)] * 4)
    yield "sort by expert", T, us, ids.nbytes * 3.0, 0.0
    groups = {n: group_by_expert(ids, num_experts=case.N, tile_tokens=n) for n in (64, 128, 192, 256)}
    best: dict[str, tuple[float, Tile]] = {}
    for tile in GATE_UP_TILES:
        call = partial(gate_up_product, x, groups[tile.rows * tile.parts], case.gate_up, top_k=K, tile=tile)
        us = median_us([call] * 3)
        best["gate_up"] = min(best.get("gate_up", (us, tile)), (us, tile), key=lambda found: found[0])
        yield f"gate_up {name_of(tile)}", T, us, up_bytes, up_flop
    hidden = gate_up_product(x, groups[64], case.gate_up, top_k=K, tile=GATE_UP_TILES[-1])
    for tile in DOWN_TILES:
        call = partial(down_product, hidden, groups[tile.rows * tile.parts], case.down, weights, tile=tile)
        us = median_us([call] * 3)
        best["down"] = min(best.get("down", (us, tile)), (us, tile), key=lambda found: found[0])
        yield f"down {name_of(tile)}", T, us, down_bytes, down_flop
    for name, (us, tile) in best.items():
        moved, flop = (up_bytes, up_flop) if name == "gate_up" else (down_bytes, down_flop)
        yield f"best {name}: {name_of(tile)}", T, us, moved, flop
    parts = down_product(hidden, groups[64], case.down, weights, tile=DOWN_TILES[-1])
    sums = T * (K + 1) * D * 2.0
    yield "combine", T, median_us([partial(combine, parts, ids, num_experts=case.N)] * 4), sums, 0.0
    moved, flop = up_bytes + down_bytes + sums, up_flop + down_flop
    for name, function, chosen in (
        ("moe_prefill", routed_experts_prefill, ids),
        ("moe plain (grouped_mm)", moe.routed_experts, experts),
    ):
        us = median_us([partial(function, x, weights, chosen, case.gate_up, case.down)] * 3)
        yield name, T, us, moved, flop


def name_of(tile: Tile) -> str:
    return f"{tile.parts}x{tile.rows}x{tile.cols}x{tile.block} w{tile.warps} s{tile.stages}"


def all_moe() -> Iterator[Row]:
    experts = Moe(*MOE_SHAPES["80B-A3B"])
    return itertools.chain.from_iterable(time_moe(experts, T) for T in (8192, 2048, 512))


TIMED: dict[str, Callable[[], Iterator[Row]]] = {"moe": all_moe}


@pytest.mark.gpu
@pytest.mark.parametrize("what", TIMED)
def test_time(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints a table. Another program on the GPU may spoil any time, so only impossible ones fail."""
    bandwidth, flops = peaks()
    found = []
    with capsys.disabled():
        print(f"\ncopy: {bandwidth / 1e12:.2f} TB/s, product: {flops / 1e12:.0f} TFLOP/s")
        print(f"{'kernel':44} {'tokens':>6} {'us':>8} {'floor':>7} {'GB/s':>6} {'TFLOP/s':>8} {'share':>6}")
        for row in TIMED[what]():
            name, tokens, us, moved, flop = row
            floor = max(moved / bandwidth, flop / flops) * 1e6
            print(
                f"{name:44} {tokens:6} {us:8.1f} {floor:7.1f} {moved / us / 1e3:6.0f} {flop / us / 1e6:8.1f} "
                f"{floor / us:6.1%}",
                flush=True,
            )
            found.append((us, floor))
    assert all(us > 0 and floor < 1.5 * us for us, floor in found)
