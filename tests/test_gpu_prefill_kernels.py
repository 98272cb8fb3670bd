"""The kernels of prefill on one GPU: against float64, with odd sizes, bit by bit.

A kernel is judged by float64 beside the plain path: it may not be much further away. The last test prints how fast each
choice of tiles is. Where Triton is installed, `TRITON_INTERPRET=1 pytest tests/test_gpu_prefill_kernels.py` runs the
rest without a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.clock import samples_us
from bench.stats import summarize
from core_torch.batch import Span
from core_torch.kernels import attention, causal_conv, gated_delta_rule, moe, norm
from core_torch.kernels.flash_prefill import (
    check_even_prefill,
    check_flash_prefill,
    flash_prefill,
    flat_slots,
    lay_out,
)
from core_torch.kernels.gdn_prefill import (
    CARRIES,
    Chunks,
    check_gdn_prefill,
    cut_into_chunks,
    gdn_prefill,
    gdn_prefill_plain,
)
from core_torch.kernels.moe_prefill import (
    Tile,
    check_moe_prefill,
    choose_tiles,
    down_product,
    gate_up_product,
    group_by_expert,
    route_prefill,
    routed_experts_prefill,
)
from tests.gpu_kernels import (
    DEVICE,
    EPS,
    assert_as_close,
    distance,
    randn,
    seeded,  # noqa: F401 (a fixture)
)
from tests.triton_interpreter import INTERPRETED, correct_bfloat16

pytestmark = [
    pytest.mark.timeout(280),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
    if INTERPRETED
    else pytest.mark.gpu,
]

SIZES = (1, 3, 67) if INTERPRETED else (1, 3, 63, 67, 1000)

if INTERPRETED:
    correct_bfloat16()


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
# Compiling takes most of the time, so each of the engine's choices is tested at one of the shapes, by their experts. A
# wide row is not held whole.
TILES = {
    16: [choose_tiles(16, 16)],
    512: [choose_tiles(160, 256), choose_tiles(160, 1024)],
    7: [choose_tiles(100, 48), choose_tiles(105, 48)],
}


@pytest.fixture(scope="module", params=MOE_SHAPES)
def experts(request: pytest.FixtureRequest) -> Moe:
    torch.manual_seed(1)
    return Moe(*MOE_SHAPES[request.param])


@pytest.mark.parametrize("T", SIZES)
def test_moe_prefill(experts: Moe, T: int) -> None:
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
        for tiles in TILES[experts.N]:
            got = routed_experts_prefill(*tokens, experts.gate_up, experts.down, tiles=tiles)
            assert_as_close(got, plain, want)


def test_moe_prefill_bits_do_not_depend_on_the_other_tokens(experts: Moe) -> None:
    x, weights, chosen = experts.tokens(130, favourites=1.0)
    for tiles in TILES[experts.N]:
        run = partial(routed_experts_prefill, gate_up=experts.gate_up, down=experts.down, tiles=tiles)
        want = run(x, weights, chosen)
        for rows in (slice(0, 1), slice(5, 8), slice(30, 97)):
            assert torch.equal(run(x[rows], weights[rows].clone(), chosen[rows].int()), want[rows])


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


# The last of the interpreted ones has more chunks than are added at once.
SORTS = (
    [*itertools.product((1, 7, 513), (1, 3, 1025)), (7, 17 * 1024 + 5)]
    if INTERPRETED
    else [*itertools.product((1, 7, 16, 513, 1024), (1, 3, 1000, 1024, 90112))]
)


@pytest.mark.parametrize(("N", "pairs"), SORTS)
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


class Gdn:
    """Inputs of one layer: sequences of `lengths` rows in shuffled slots, those in `going_on` with a past."""

    def __init__(
        self, lengths: tuple[int, ...], H: int, HV: int, dim: int, going_on: tuple[int, ...] = ()
    ) -> None:
        self.H, self.HV, self.dim = H, HV, dim
        self.channels = (2 * H + HV) * dim
        slots = (torch.randperm(len(lengths) + 1) + 1).tolist()
        firsts = [sum(lengths[:i]) for i in range(len(lengths))]
        self.pieces = [
            Span(first, length, 5 if i in going_on else 0, slot)
            for i, (first, length, slot) in enumerate(zip(firsts, lengths, slots, strict=False))
        ]
        self.projected = randn(sum(lengths), self.channels + HV * dim + 2 * HV)
        self.conv = randn(len(lengths) + 2, self.channels, 3)
        self.state = randn(len(lengths) + 2, HV, dim, dim, dtype=torch.float32)
        self.weights = {
            "conv_weight": randn(self.channels, 4) / 2,
            "a_log": torch.rand(HV, device=DEVICE) * 2,
            "dt_bias": randn(HV, dtype=torch.float32),
            "norm_weight": randn(dim),
        }

    @property
    def chunks(self) -> Chunks:
        return cut_into_chunks(self.pieces, torch.device(DEVICE))

    def run(self, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(out, conv, state) on copies."""
        conv, state = self.conv.clone(), self.state.clone()
        out = gdn_prefill(self.projected, conv, state, self.chunks, **self.weights, eps=EPS, **options)
        return out, conv, state

    def plain(self) -> tuple[Tensor, Tensor, Tensor]:
        conv, state = self.conv.clone(), self.state.clone()
        return (
            gdn_prefill_plain(self.projected, conv, state, self.pieces, **self.weights, eps=EPS),
            conv,
            state,
        )

    def reference(self) -> tuple[Tensor, Tensor]:
        """float64 (out, state), token by token."""
        w = {name: value.cpu() for name, value in self.weights.items()}
        key, value = self.H * self.dim, self.HV * self.dim
        outs, state, projected = [], self.state.double().cpu(), self.projected.cpu()
        for piece in self.pieces:
            rows = projected[piece.first : piece.first + piece.num_tokens].double()
            qkv, z, b, a = rows.split([self.channels, value, self.HV, self.HV], dim=-1)
            past = self.conv[piece.slot].cpu() * (piece.start > 0)
            mixed, _ = causal_conv.causal_conv_reference(qkv, past, w["conv_weight"])
            q, k, v = (x.unflatten(-1, (-1, self.dim)) for x in mixed.split([key, key, value], dim=-1))
            g = -w["a_log"].double().exp() * torch.nn.functional.softplus(a + w["dt_bias"].double())
            out, state[piece.slot] = gated_delta_rule.gated_delta_rule_reference(
                q, k, v, g, b.sigmoid(), state[piece.slot] * (piece.start > 0)
            )
            z = z.unflatten(-1, (-1, self.dim))
            outs.append(norm.gated_rms_norm_reference(out, z, w["norm_weight"], eps=EPS).flatten(1))
        return torch.cat(outs).to(DEVICE), state.to(DEVICE)


GDN_SHAPES = [(2, 4, 32)] if INTERPRETED else [(2, 4, 32), (8, 16, 128), (1, 3, 64)]
# Many single tokens: in one alone q may be nearly at right angles to k, and bfloat16 leaves little of their product.
GDN_LENGTHS = [(1,) * 40, (3, 67), (63, 64, 2, 130)]
# Products of bfloat16 with sums in float32, where the plain path multiplies in float32: distance from float64.
GDN_LIMIT = 1e-2


@pytest.mark.parametrize(("H", "HV", "dim"), GDN_SHAPES)
@pytest.mark.parametrize("lengths", GDN_LENGTHS)
def test_gdn_prefill(lengths: tuple[int, ...], H: int, HV: int, dim: int) -> None:
    assert (
        INTERPRETED
        or check_gdn_prefill(
            num_k_heads=H,
            num_v_heads=HV,
            k_dim=dim,
            v_dim=dim,
            taps=4,
            dtype=torch.bfloat16,
            device=torch.device("cuda"),
        ).usable
    )
    for going_on in ((), (0, 2)):
        case = Gdn(lengths, H, HV, dim, going_on)
        want, want_state = case.reference()
        out, conv, state = case.run()
        assert distance(out, want) < GDN_LIMIT
        assert distance(state, want_state) < GDN_LIMIT
        assert torch.equal(conv, case.plain()[1])
        others = torch.ones(len(state), dtype=torch.bool, device=DEVICE)
        others[[piece.slot for piece in case.pieces]] = False
        assert torch.equal(state[others], case.state[others])


def test_gdn_prefill_in_two_passes_is_the_same_sequence() -> None:
    H, HV, dim = GDN_SHAPES[-1]
    case = Gdn((192,), H, HV, dim)
    whole, conv, state = case.run()
    first, second = Span(0, 128, 0, case.pieces[0].slot), Span(0, 64, 128, case.pieces[0].slot)
    projected, outs = case.projected, []
    for rows, piece in ((slice(128), first), (slice(128, None), second)):
        case.projected, case.pieces = projected[rows], [piece]
        out, case.conv, case.state = case.run()
        outs.append(out)
    assert torch.equal(torch.cat(outs), whole)  # cut between chunks
    assert torch.equal(case.conv, conv)
    assert torch.equal(case.state, state)


def test_gdn_prefill_bits_do_not_depend_on_the_other_sequences_or_the_launch() -> None:
    H, HV, dim = GDN_SHAPES[0] if INTERPRETED else (8, 16, 128)
    case = Gdn((67, 130, 1), H, HV, dim, (1,))
    out, conv, state = case.run(carry=CARRIES[0])
    for carry in CARRIES[1:]:
        for got, want in zip(case.run(carry=carry), (out, conv, state), strict=True):
            assert torch.equal(got, want)
    piece = case.pieces[1]
    rows = slice(piece.first, piece.first + piece.num_tokens)
    case.projected, case.pieces = case.projected[rows], [Span(0, piece.num_tokens, piece.start, piece.slot)]
    alone, _, one_state = case.run(carry=CARRIES[0])
    assert torch.equal(alone, out[rows])
    assert torch.equal(one_state[piece.slot], state[piece.slot])


def test_repeated_keys_with_full_strength_do_not_lose_the_solution() -> None:
    """The worst case of the triangular system: one key, no decay, beta near 1, so that powers of A grow."""
    H, HV, dim = GDN_SHAPES[0]
    case = Gdn((130,), H, HV, dim)
    case.projected[:] = case.projected[:1].clone()
    case.projected[:, -2 * HV : -HV] = 8.0  # b
    case.projected[:, -HV:] = -8.0  # a
    want, want_state = case.reference()
    out, _, state = case.run()
    assert distance(out, want) < 2 * GDN_LIMIT
    assert distance(state, want_state) < 2 * GDN_LIMIT


class Paged:
    """Sequences in shuffled pages whose last `counts` positions are this pass's; unused places are NaN."""

    def __init__(
        self, lengths: tuple[int, ...], counts: tuple[int, ...], H: int, G: int, d: int, page: int = 16
    ) -> None:
        need = [-(-length // page) for length in lengths]
        pages = (torch.randperm(sum(need)) + 1).tolist()
        tables = [pages[sum(need[:i]) : sum(need[: i + 1])] for i in range(len(need))]
        self.q, self.scale, self.counts = randn(sum(counts), H, d), d**-0.5, counts
        self.k, self.v = torch.full((2, sum(need) + 1, page, G, d), float("nan"), device=DEVICE).bfloat16()
        self.sequences = []
        for table, length in zip(tables, lengths, strict=True):
            k, v = randn(length, G, d), randn(length, G, d)
            slots = torch.from_numpy(flat_slots(table, 0, length, page)).to(DEVICE)
            attention.write_kv(k, v, self.k, self.v, slots)
            self.sequences.append((k, v, torch.tensor(table, device=DEVICE)))
        self.ragged = lay_out(counts, tables, lengths, page, torch.device(DEVICE))

    def run(self, even: bool = False) -> Tensor:
        return flash_prefill(self.q, self.k, self.v, self.ragged, scale=self.scale, even=even)

    def plain(self) -> Tensor:
        outs = [
            attention.prefill_attention(q, self.k, self.v, table, start=len(k) - len(q), scale=self.scale)
            for q, (k, _, table) in zip(self.q.split(self.counts), self.sequences, strict=True)
        ]
        return torch.cat(outs)

    def reference(self) -> Tensor:
        outs = [
            attention.attention_reference(q.cpu(), k.cpu(), v.cpu(), scale=self.scale)
            for q, (k, v, _) in zip(self.q.split(self.counts), self.sequences, strict=True)
        ]
        return torch.cat(outs).to(DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "G", "d"), [(8, 1, 256), (2, 1, 64), (6, 2, 72)])
@pytest.mark.parametrize("page", [16, 7])
def test_flash_prefill(H: int, G: int, d: int, page: int) -> None:
    assert check_flash_prefill(
        num_heads=H, num_kv_heads=G, head_dim=d, dtype=torch.bfloat16, device=torch.device("cuda")
    ).usable
    for lengths, counts in (((1,), (1,)), ((67, 3, 130), (67, 3, 130)), ((300, 67, 63), (3, 67, 1))):
        case = Paged(lengths, counts, H, G, d, page)
        assert_as_close(case.run(), case.plain(), case.reference(), slack=1.2)


@pytest.mark.gpu
def test_cudnn_takes_even_sequences() -> None:
    answer = check_even_prefill(
        num_heads=8, num_kv_heads=1, head_dim=256, dtype=torch.bfloat16, device=torch.device("cuda")
    )
    assert answer.usable, answer.reason
    for lengths in ((1024,), (1024, 1024), (2048,)):
        case = Paged(lengths, lengths, 8, 1, 256)
        assert case.ragged.even
        got, flash = case.run(even=True), case.run()
        assert distance(got, flash) < 1e-2
        assert torch.equal(got, case.run(even=True))


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
    *(Tile(64, 3, 64, 256, warps, 3, whole=True) for warps in (4, 8)),
    Tile(64, 2, 128, 256, 4, 2, whole=True),
    Tile(64, 3, 32, 256, 4, 4, whole=True),
]


def tiles_of(case: Moe, T: int) -> Iterator[tuple[str, float]]:
    """(product and tile, microseconds). One layer's weights are 20 times what the L2 cache holds."""
    x, weights, experts = case.tokens(T)
    groups = {
        n: group_by_expert(experts.int(), num_experts=case.N, tile_tokens=n) for n in (64, 128, 192, 256)
    }
    for tile in GATE_UP_TILES:
        group = groups[tile.rows * tile.parts]
        yield (
            f"gate_up {tile}",
            median_us(partial(gate_up_product, x, group, case.gate_up, top_k=case.K, tile=tile)),
        )
    hidden = gate_up_product(x, groups[64], case.gate_up, top_k=case.K, tile=GATE_UP_TILES[-1])
    for tile in DOWN_TILES:
        group = groups[tile.rows * tile.parts]
        yield f"down {tile}", median_us(partial(down_product, hidden, group, case.down, weights, tile=tile))


def median_us(call: Callable[[], object]) -> float:
    return summarize(samples_us([call] * 3, 7, torch.device("cuda"))).median_us


@pytest.mark.gpu
@pytest.mark.parametrize("T", [8192, 2048, 512])
def test_time_of_tiles(T: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints a table, the fastest tiles first: what `choose_tiles` was chosen from. For how fast the kernels are, see
    `python -m bench kernels`."""
    found = sorted(tiles_of(Moe(*MOE_SHAPES["80B-A3B"]), T), key=lambda row: row[1])
    with capsys.disabled():
        print("\n" + "\n".join(f"{T} tokens, {name}: {us:.1f} us" for name, us in found))
    assert all(us > 0 for _, us in found)
