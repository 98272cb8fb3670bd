"""The compiled decode kernels on one GPU: against float64, in CUDA graphs, in place, bit by bit.

A kernel is judged by float64 beside the plain path, which rounds in the same places: it may not be further away.
How fast they are is for `python -m bench kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from core_torch.kernels import attention, causal_conv, gated_delta_rule, moe, norm
from core_torch.kernels.few_rows import few_rows
from core_torch.kernels.gdn_decode import check_gdn_decode, gdn_decode, gdn_decode_plain
from core_torch.kernels.moe_decode import check_moe_decode, route_decode, routed_experts_decode
from core_torch.kernels.norm_rope import check_norm_rope, norm_rope, norm_rope_plain
from core_torch.kernels.paged_decode import check_paged_decode, paged_decode_attention
from tests.gpu_kernels import (
    EPS,
    assert_as_close,
    captured,
    distance,
    randn,
    seeded,  # noqa: F401 (a fixture)
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

SIZES = (1, 3, 63, 67, 131)


class Gdn:
    """Inputs of one layer; the slots of B sequences in any order, some rows padding."""

    def __init__(self, B: int, H: int, HV: int, dk: int, dv: int, slots: int | None = None) -> None:
        self.H, self.HV, self.dk, self.dv = H, HV, dk, dv
        self.channels = 2 * H * dk + HV * dv
        count = slots or B + 2
        self.projected = randn(B, self.channels + HV * dv + 2 * HV)
        self.conv = randn(count, self.channels, 3)
        self.state = torch.randn(count, HV, dk, dv, device="cuda")
        self.slots = torch.randperm(count - 1, device="cuda")[:B] + 1
        self.weights = {
            "conv_weight": randn(self.channels, 4) / 2,
            "a_log": torch.rand(HV, device="cuda") * 2,
            "dt_bias": torch.randn(HV, device="cuda"),
            "norm_weight": randn(dv),
        }

    def pad(self, rows: int) -> None:
        self.slots[-rows:] = 0

    def run(self, function: Callable[..., Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(out, conv, state) on copies."""
        conv, state = self.conv.clone(), self.state.clone()
        out = function(self.projected, conv, state, self.slots, **self.weights, eps=EPS, **options)
        return out, conv, state

    def reference(self) -> tuple[Tensor, Tensor]:
        """float64 (out, state), sequence by sequence."""
        w = {name: value.cpu() for name, value in self.weights.items()}
        value = self.HV * self.dv
        outs, state = [], self.state.double().cpu()
        for row, slot in zip(self.projected.cpu(), self.slots.tolist(), strict=True):
            qkv, z, b, a = row.double().split([self.channels, value, self.HV, self.HV])
            mixed, _ = causal_conv.causal_conv_reference(qkv[None], self.conv[slot].cpu(), w["conv_weight"])
            q, k, v = mixed.split([self.H * self.dk, self.H * self.dk, value], dim=-1)
            g = -w["a_log"].double().exp() * torch.nn.functional.softplus(a + w["dt_bias"].double())
            out, state[slot] = gated_delta_rule.gated_delta_rule_reference(
                q.view(1, self.H, self.dk),
                k.view(1, self.H, self.dk),
                v.view(1, self.HV, self.dv),
                g[None],
                b.sigmoid()[None],
                state[slot],
            )
            outs.append(
                norm.gated_rms_norm_reference(out[0], z.view(self.HV, self.dv), w["norm_weight"], eps=EPS)
            )
        return torch.stack(outs).flatten(1).cuda(), state.cuda()


GDN_SHAPES = [(2, 4, 32, 32), (8, 16, 128, 128), (2, 6, 24, 40), (1, 4, 64, 256)]


@pytest.mark.parametrize("B", SIZES)
@pytest.mark.parametrize(("H", "HV", "dk", "dv"), GDN_SHAPES)
def test_gdn_decode(B: int, H: int, HV: int, dk: int, dv: int) -> None:
    if B > 3 and HV * dk > 1024:
        B = 5  # the float64 loop is slow
    assert check_gdn_decode(
        num_k_heads=H,
        num_v_heads=HV,
        k_dim=dk,
        v_dim=dv,
        taps=4,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    ).usable
    case = Gdn(B, H, HV, dk, dv)
    want, want_state = case.reference()
    plain, plain_conv, plain_state = case.run(gdn_decode_plain)
    for units in (1, 2, 4):
        out, conv, state = case.run(gdn_decode, units_per_block=units)
        assert_as_close(out, plain, want)
        assert_as_close(state, plain_state, want_state)
        assert torch.equal(conv, plain_conv)


def test_gdn_decode_leaves_nothing_of_padding_rows() -> None:
    case = Gdn(9, 2, 4, 32, 32)
    whole = case.run(gdn_decode)
    case.pad(4)
    out, conv, state = case.run(gdn_decode)
    assert torch.equal(out[:5], whole[0][:5])
    assert out.isfinite().all()
    live = case.slots[:5]
    others = torch.ones(len(state), dtype=torch.bool, device="cuda")
    others[live] = False
    assert torch.equal(state[others], case.state[others])
    assert torch.equal(conv[others], case.conv[others])
    assert torch.equal(state[live], whole[2][live])
    assert torch.equal(conv[live], whole[1][live])


def test_gdn_decode_bits_do_not_depend_on_the_batch_or_the_launch() -> None:
    case = Gdn(67, 8, 16, 128, 128)
    out, conv, state = case.run(gdn_decode)
    ahead = {"ahead": [randn(513, 8), randn(7)]}
    for options in (
        {"units_per_block": 2},
        {"units_per_block": 4},
        {"launch_with_pdl": False},
        ahead,
        {},
    ):
        for got, want in zip(case.run(gdn_decode, **options), (out, conv, state), strict=True):
            assert torch.equal(got, want), options
    case.slots = case.slots.int()
    assert torch.equal(case.run(gdn_decode)[0], out)
    case.projected, case.slots = case.projected[13:14], case.slots[13:14]
    alone, _, one_state = case.run(gdn_decode)
    assert torch.equal(alone, out[13:14])
    assert torch.equal(one_state[case.slots], state[case.slots])


def test_gdn_decode_in_a_graph_goes_on_from_its_own_state() -> None:
    case, steps = Gdn(7, 8, 16, 128, 128), 5
    options = {**case.weights, "eps": EPS}
    conv, state = case.conv.clone(), case.state.clone()
    graph, out = captured(lambda: gdn_decode(case.projected, conv, state, case.slots, **options))
    conv.copy_(case.conv)
    state.copy_(case.state)
    for _ in range(steps):
        graph.replay()
    eager = [gdn_decode(case.projected, case.conv, case.state, case.slots, **options) for _ in range(steps)]
    assert torch.equal(out, eager[-1])
    assert torch.equal(state, case.state)
    assert torch.equal(conv, case.conv)


class Moe:
    def __init__(self, N: int, K: int, D: int, I: int) -> None:  # noqa: E741
        self.N, self.K, self.D, self.I = N, K, D, I
        self.gate_up = torch.empty(N, 2 * I, D, dtype=torch.bfloat16, device="cuda").normal_(0, D**-0.5)
        self.down = torch.empty(N, D, I, dtype=torch.bfloat16, device="cuda").normal_(0, I**-0.5)

    def tokens(self, T: int, favourites: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """(x, weights, experts); `favourites` is added to the first experts' logits."""
        logits = randn(T, self.N)
        logits[:, : self.K] += favourites
        return randn(T, self.D), *moe.route(logits, top_k=self.K, normalize=True)

    def reference(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """float64, token by token."""
        rows = []
        for t in range(len(x)):
            both = torch.einsum("koi,i->ko", self.gate_up[experts[t]].double(), x[t].double())
            gate, up = both.chunk(2, dim=-1)
            outs = torch.einsum("koi,ki->ko", self.down[experts[t]].double(), gate * gate.sigmoid() * up)
            rows.append((weights[t].double()[:, None] * outs).sum(0))
        return torch.stack(rows)


MOE_SHAPES = {"tiny": (16, 4, 256, 16), "80B-A3B": (512, 10, 2048, 256), "odd": (7, 3, 264, 24)}


@pytest.fixture(scope="module", params=MOE_SHAPES)
def experts(request: pytest.FixtureRequest) -> Moe:
    torch.manual_seed(1)
    return Moe(*MOE_SHAPES[request.param])


@pytest.mark.parametrize("T", SIZES)
def test_moe_decode(experts: Moe, T: int) -> None:
    assert check_moe_decode(
        num_experts=experts.N,
        top_k=experts.K,
        hidden_size=experts.D,
        intermediate_size=experts.I,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    ).usable
    for favourites in (0.0, 8.0):  # 8: all tokens on the same experts
        tokens = experts.tokens(T, favourites)
        want = experts.reference(*tokens)
        plain = moe.routed_experts(*tokens, experts.gate_up, experts.down)
        got = routed_experts_decode(*tokens, experts.gate_up, experts.down)
        assert_as_close(got, plain, want)


def test_moe_decode_bits_do_not_depend_on_the_batch_or_the_launch(experts: Moe) -> None:
    x, weights, chosen = experts.tokens(67, favourites=1.0)
    want = routed_experts_decode(x, weights, chosen, experts.gate_up, experts.down)
    without = routed_experts_decode(x, weights, chosen, experts.gate_up, experts.down, launch_with_pdl=False)
    assert torch.equal(without, want)
    ahead = [randn(513, 8), randn(7)]
    fetching = routed_experts_decode(x, weights, chosen, experts.gate_up, experts.down, ahead=ahead)
    assert torch.equal(fetching, want)
    for rows in (slice(0, 1), slice(5, 8), slice(30, 67)):
        part = (x[rows], weights[rows], chosen[rows].int())
        assert torch.equal(routed_experts_decode(*part, experts.gate_up, experts.down), want[rows])


def test_moe_decode_skips_rows_without_experts(experts: Moe) -> None:
    x, weights, chosen = experts.tokens(9)
    want = routed_experts_decode(x[:5], weights[:5], chosen[:5], experts.gate_up, experts.down)
    chosen[5:] = -1
    got = routed_experts_decode(x, weights, chosen, experts.gate_up, experts.down)
    assert torch.equal(got[:5], want)
    assert not got[5:].any()


def test_moe_decode_in_a_graph_follows_its_inputs(experts: Moe) -> None:
    static = experts.tokens(8)
    graph, out = captured(lambda: routed_experts_decode(*static, experts.gate_up, experts.down))
    for _ in range(3):
        fresh = experts.tokens(8, favourites=1.0)
        for target, source in zip(static, fresh, strict=True):
            target.copy_(source)
        graph.replay()
        assert torch.equal(out, routed_experts_decode(*fresh, experts.gate_up, experts.down))


def pairs_of(tiles: Tensor) -> list[tuple[int, int]]:
    """(expert, pair) of every place in a list of tiles."""
    found = []
    for expert, count, *pairs in tiles[1 : 1 + int(tiles[0, 0])].tolist():
        assert 1 <= count <= 8
        found += [(expert, pair) for pair in pairs[:count]]
    return found


@pytest.mark.parametrize(("N", "K"), [(16, 4), (512, 10), (600, 3), (7, 7)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shared", [False, True])
def test_moe_route(N: int, K: int, normalize: bool, shared: bool) -> None:
    for T in SIZES:
        logits = randn(T, N + shared)
        routing = route_decode(logits, num_experts=N, top_k=K, normalize=normalize)
        weights, experts = moe.route(logits[:, :N], top_k=K, normalize=normalize)
        chosen = routing.experts[:, :K].long()
        # Equal logits may be chosen in any order, so the experts are compared by what they have.
        assert torch.equal(logits.gather(1, chosen), logits.gather(1, experts))
        assert all(len(set(row)) == K for row in chosen.tolist())
        assert (routing.weights[:, :K].float() - weights.float()).abs().max() <= 2**-8 * weights.float().max()
        if shared:
            assert (routing.experts[:, K] == N).all()
            assert distance(routing.weights[:, K], logits[:, N].sigmoid()) < 1e-3
        flat = routing.experts.flatten().tolist()
        assert sorted(pairs_of(routing.tiles)) == sorted((e, i) for i, e in enumerate(flat))


def test_moe_decode_takes_the_shared_expert_as_one_more() -> None:
    case = Moe(17, 4, 256, 32)  # 16 to choose from
    x, logits = randn(33, 256), randn(33, 17)
    routing = route_decode(logits, num_experts=16, top_k=4, normalize=True)
    got = routed_experts_decode(
        x, routing.weights, routing.experts, case.gate_up, case.down, tiles=routing.tiles
    )
    want = case.reference(x, routing.weights, routing.experts.long())
    plain = moe.routed_experts(x, routing.weights, routing.experts.long(), case.gate_up, case.down)
    assert_as_close(got, plain, want)
    again = routed_experts_decode(x, routing.weights, routing.experts, case.gate_up, case.down)
    assert torch.equal(got, again)


@pytest.mark.parametrize(
    ("H", "G", "d", "R"), [(8, 1, 256, 64), (2, 1, 64, 16), (6, 2, 72, 32), (1, 1, 128, 128)]
)
@pytest.mark.parametrize("T", SIZES)
def test_paged_norm_rope(T: int, H: int, G: int, d: int, R: int) -> None:
    assert check_norm_rope(head_dim=d, rotary_dim=R, dtype=torch.bfloat16, device=torch.device("cuda")).usable
    options = {"num_heads": H, "rotary_dim": R, "theta": 1e7, "eps": EPS, "weight_bias": 1.0}
    weights = {"q_weight": randn(d) / 10, "k_weight": randn(d) / 10}
    projected = randn(T, 2 * (H + G) * d)
    positions, slots = torch.randint(0, 5000, (T,), device="cuda"), torch.randperm(160, device="cuda")[:T]
    k, v = randn(2, 10, 16, G, d)
    plain_k, plain_v = k.clone(), v.clone()
    want = norm_rope_plain(projected, positions, slots, plain_k, plain_v, **weights, **options)
    got = norm_rope(projected, positions, slots, k, v, **weights, **options)
    assert torch.equal(v, plain_v)
    # Sums of squares and powers may differ in the last bit of float32, so a few values in that of bfloat16.
    for mine, theirs in ((got, want), (k, plain_k)):
        assert distance(mine, theirs) < 1e-3
        assert (mine == theirs).float().mean() > 0.98
    short = norm_rope(projected, positions.int(), slots.int(), k, v, **weights, **options)
    assert torch.equal(short, got)


class Paged:
    """Sequences in shuffled pages; unused places of the caches are NaN."""

    def __init__(self, lengths: tuple[int, ...], H: int, G: int, d: int, page: int, spare: int = 3) -> None:
        width = max(-(-max(lengths) // page), 1) + spare
        need = [-(-length // page) for length in lengths]
        pages = (torch.randperm(sum(need)) + 1).tolist()
        self.q = randn(len(lengths), H, d)
        self.k, self.v = torch.full((2, sum(need) + 1, page, G, d), float("nan"), device="cuda").bfloat16()
        tables = torch.zeros(len(lengths), width, dtype=torch.int64)
        self.sequences = []
        for b, length in enumerate(lengths):
            tables[b, : need[b]] = torch.tensor(pages[sum(need[:b]) : sum(need[: b + 1])])
            k, v = randn(length, G, d), randn(length, G, d)
            places = torch.arange(length)
            slots = (tables[b, places // page] * page + places % page).cuda()
            attention.write_kv(k, v, self.k, self.v, slots)
            self.sequences.append((k.cpu(), v.cpu()))
        self.tables = tables.T.contiguous().cuda().T  # the engine's are views of a [P, B] tensor
        self.lengths = torch.tensor(lengths, device="cuda")
        self.scale = d**-0.5

    def run(self, **options: Any) -> Tensor:
        return paged_decode_attention(
            self.q, self.k, self.v, self.tables, self.lengths, scale=self.scale, **options
        )

    def plain(self) -> Tensor:
        k = self.k.nan_to_num(0)  # the plain path masks stale keys after the product
        return attention.decode_attention(self.q, k, self.v, self.tables, self.lengths, scale=self.scale)

    def reference(self) -> Tensor:
        rows = [
            attention.attention_reference(q[None], k, v, scale=self.scale)
            for q, (k, v) in zip(self.q.cpu(), self.sequences, strict=True)
        ]
        return torch.cat(rows).cuda()


@pytest.mark.parametrize(("H", "G", "d"), [(8, 1, 256), (2, 1, 64), (6, 2, 128), (4, 4, 64)])
@pytest.mark.parametrize("page", [16, 7])
def test_paged_decode(H: int, G: int, d: int, page: int) -> None:
    assert check_paged_decode(
        num_heads=H,
        num_kv_heads=G,
        head_dim=d,
        max_num_seqs=67,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    ).usable
    around = [n + by for n in (16, 64, 128, 256, 512, 1024) for by in (-1, 0, 1)]
    for lengths in ((1,), (3, 63, 67), (1000, 1, 64, 5001), (9000, 4096), tuple(range(1, 68)), (*around, 1)):
        case = Paged(lengths, H, G, d, page)
        assert_as_close(case.run(), case.plain(), case.reference())


def test_paged_decode_gates_its_result() -> None:
    case = Paged((3, 63, 670), 8, 1, 256, 16)
    projected = randn(3, 3 * 8 * 256)
    gate = projected[:, 2048:4096]  # as it lies in the projection
    got = paged_decode_attention(
        case.q, case.k, case.v, case.tables, case.lengths, scale=case.scale, gate=gate
    )
    assert distance(got.flatten(1), case.run().flatten(1) * gate.sigmoid()) < 1e-3


def test_paged_decode_bits_do_not_depend_on_the_batch_or_the_launch() -> None:
    case = Paged(tuple(range(40, 4000, 61)), 8, 1, 256, 16)
    want = case.run()
    for options in ({"launch_with_pdl": False}, {"ahead": [randn(513, 8), randn(7)]}):
        assert torch.equal(case.run(**options), want)
    case.tables, case.lengths = case.tables.int(), case.lengths.int()
    torch.cuda.synchronize()  # they may not be written by the kernel right before
    assert torch.equal(case.run(), want)
    case.q, case.tables, case.lengths = case.q[50:51], case.tables[50:51], case.lengths[50:51]
    assert torch.equal(case.run(), want[50:51])


def test_paged_decode_many_times() -> None:
    """More chunks than blocks at a time, again and again: a copy that is not waited for would differ some time."""
    case = Paged((1024,) * 64 + (0, 17, 3000), 8, 1, 256, 16)
    want = case.run()
    assert want.isfinite().all()
    for _ in range(20):
        assert torch.equal(case.run(), want)


def test_paged_decode_in_a_graph_follows_the_lengths() -> None:
    case = Paged((300, 200, 100), 8, 1, 256, 16, spare=40)
    graph, out = captured(case.run)
    for lengths in ((300, 200, 100), (1, 17, 64), (0, 200, 3)):
        case.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(out, case.run())
    assert not out[0].any()  # a row without tokens


@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 16, 31, 32])
@pytest.mark.parametrize(("O", "I"), [(6176, 2048), (520, 2048), (1, 2048), (75, 264), (2048, 5120), (33, 8)])
def test_few_rows(T: int, O: int, I: int) -> None:  # noqa: E741
    wide, weight = randn(T, I + 8), randn(O, I)
    x = wide[:, :I]
    want = x.double() @ weight.double().T
    got = few_rows(x, weight)
    assert_as_close(got, x @ weight.T, want)
    assert torch.equal(few_rows(x, weight, launch_with_pdl=False), got)
    assert torch.equal(few_rows(x[T - 1 :], weight), got[T - 1 :])


def test_few_rows_in_a_chain_of_graphs() -> None:
    """Each product starts before the one in front ends, and must still see what that wrote."""
    weights = [randn(256, 256) / 16 for _ in range(16)]
    x = randn(8, 256)

    def chain() -> Tensor:
        y = x
        for weight in weights:
            y = few_rows(y, weight)
        return y

    graph, out = captured(chain)
    want = x
    for weight in weights:
        want = few_rows(want, weight, launch_with_pdl=False)
        torch.cuda.synchronize()
    for _ in range(50):
        graph.replay()
        assert torch.equal(out, want)
