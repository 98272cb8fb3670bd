"""The project's own kernels beside plain torch, on operands with the shapes of one rank of a model.

Shapes: T tokens (B in decode, one of each sequence), D hidden, H query heads, G KV heads, d head_dim, N experts with a
shared one, K choices with it, W rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.floor import Chunk, attention_work, decode_chunks, gated_delta_net_work
from bench.kernel_operands import Rank
from core_torch.batch import Span
from core_torch.kernels import attention, moe
from core_torch.kernels.add_norm import add_norm, check_add_norm
from core_torch.kernels.contract import add_rmsnorm
from core_torch.kernels.few_rows import check_few_rows, few_rows, is_worth_it
from core_torch.kernels.flash_prefill import check_even_prefill, check_flash_prefill, flash_prefill, lay_out
from core_torch.kernels.gdn_decode import check_gdn_decode, gdn_decode, gdn_decode_plain
from core_torch.kernels.gdn_prefill import (
    check_gdn_prefill,
    cut_into_chunks,
    gdn_prefill,
    gdn_prefill_plain,
)
from core_torch.kernels.moe_decode import MAX_TOKENS, check_moe_decode, route_decode, routed_experts_decode
from core_torch.kernels.moe_prefill import check_moe_prefill, route_prefill, routed_experts_prefill
from core_torch.kernels.native import Answer
from core_torch.kernels.norm_rope import check_norm_rope, norm_rope, norm_rope_plain
from core_torch.kernels.paged_decode import check_paged_decode, paged_decode_attention
from core_torch.kernels.vocabulary import (
    check_vocabulary,
    embedding_rows,
    embedding_rows_plain,
    largest_keys,
    largest_keys_plain,
)
from core_torch.layers.mlp import ROW_MULTIPLE
from core_torch.layers.norm import WEIGHT_BIAS

Call = Callable[[int], Tensor]  # the number of a set of operands -> the result


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Case:
    """`compiled(i)` and `plain(i)` do the same with set i of `num_sets`, after `restore()` even to the same inputs.

    `answer` says whether the engine would run the compiled one here. The work is the least of one call.
    """

    kernel: str
    phase: str
    num_tokens: int
    length: int | None
    answer: Answer
    compiled: Call
    plain: Call
    num_sets: int
    memory_bytes: int
    flops: float = 0.0
    wire_bytes: int = 0
    restore: Callable[[], object] = nothing

    @property
    def module(self) -> str:
        return self.kernel.split(",")[0].split(":")[0]


def cases(rank: Rank) -> Iterator[Case]:
    """All of them, one at a time: the operands of one may take gigabytes."""
    for batch in rank.spec.batches:
        yield from _few_rows(rank, batch)
        yield from _around_the_layers(rank, "decode", batch)
        yield _gdn_decode(rank, batch)
        if batch <= MAX_TOKENS:
            yield _moe_route(rank, batch)
            yield _moe_decode(rank, batch)
        yield _norm_rope(rank, "decode", batch)
        for length in rank.spec.lengths:
            yield _paged_decode(rank, batch, length)
    for num_tokens in dict.fromkeys(count * length for count, length in rank.spec.passes):
        yield from _around_the_layers(rank, "prefill", num_tokens)
        yield _route_prefill(rank, num_tokens)
        yield _moe_prefill(rank, num_tokens)
        yield _norm_rope(rank, "prefill", num_tokens)
    for count, length in rank.spec.passes:
        yield _gdn_prefill(rank, count, length)
        yield _flash_prefill(rank, count, length)


def _few_rows(rank: Rank, T: int) -> Iterator[Case]:
    config, D = rank.config, rank.config.hidden_size
    queries = rank.H * config.head_dim
    router = -(-(config.num_experts + rank.shared) // ROW_MULTIPLE) * ROW_MULTIPLE
    products = {
        "q, k, v, z, b, a": (rank.projected, D),
        "q, gate, k, v": (2 * (queries + rank.G * config.head_dim), D),
        "out": (D, queries),
        "router": (router, D),
        "head": (rank.W, D),
    }
    for name, (outputs, inputs) in products.items():
        if not is_worth_it(T, outputs):
            continue
        size = outputs * inputs * rank.dtype.itemsize
        weights, x = [rank.randn(outputs, inputs) for _ in range(rank.sets(size))], rank.randn(T, inputs)
        yield Case(
            kernel=f"few_rows: {name}",
            phase="decode",
            num_tokens=T,
            length=None,
            answer=rank.options.ask("few_rows", check_few_rows, inputs=inputs, bias=False),
            compiled=lambda i, x=x, weights=weights: few_rows(x, weights[i]),
            plain=lambda i, x=x, weights=weights: F.linear(x, weights[i]),
            num_sets=len(weights),
            memory_bytes=size + x.nbytes + T * outputs * rank.dtype.itemsize,
            flops=2.0 * T * outputs * inputs,
        )


def _around_the_layers(rank: Rank, phase: str, T: int) -> Iterator[Case]:
    D, W, eps = rank.config.hidden_size, rank.W, rank.config.rms_norm_eps
    row_bytes = D * rank.dtype.itemsize
    sets, weight = rank.sets(4 * T * row_bytes), rank.randn(D)
    sums, residuals = rank.randn(sets, T, D), rank.randn(sets, T, D)
    yield Case(
        kernel="add_norm",
        phase=phase,
        num_tokens=T,
        length=None,
        answer=rank.options.ask("add_norm", check_add_norm, hidden_size=D),
        compiled=lambda i: add_norm(sums[i], residuals[i], weight, eps, WEIGHT_BIAS)[1],
        plain=lambda i: add_rmsnorm(sums[i], residuals[i], weight, eps, WEIGHT_BIAS)[1],
        num_sets=sets,
        memory_bytes=4 * T * row_bytes + weight.nbytes,
    )
    answer = rank.options.ask("vocabulary", check_vocabulary, hidden_size=D)
    table, tokens = rank.randn(W, D), torch.randint(0, 2 * W, (sets, T), device=rank.device)
    yield Case(
        kernel="vocabulary: rows",
        phase=phase,
        num_tokens=T,
        length=None,
        answer=answer,
        compiled=lambda i: embedding_rows(tokens[i], table, first=0, count=W),
        plain=lambda i: embedding_rows_plain(tokens[i], table, first=0, count=W),
        num_sets=sets,
        memory_bytes=(T + int((tokens < W).sum()) // sets) * row_bytes + tokens[0].nbytes,
    )
    if phase == "prefill":
        return
    logits = rank.randn(rank.sets(T * W * rank.dtype.itemsize), T, W)
    yield Case(
        kernel="vocabulary: argmax",
        phase=phase,
        num_tokens=T,
        length=None,
        answer=answer,
        compiled=lambda i: largest_keys(logits[i], first=0),
        plain=lambda i: largest_keys_plain(logits[i], first=0),
        num_sets=len(logits),
        memory_bytes=logits[0].nbytes + T * 8,
    )


def _delta_net_shapes(rank: Rank) -> dict[str, int]:
    config = rank.config
    return {
        "num_k_heads": rank.key // config.linear_key_head_dim,
        "num_v_heads": rank.value_heads,
        "k_dim": config.linear_key_head_dim,
        "v_dim": config.linear_value_head_dim,
        "taps": config.linear_conv_kernel_dim,
    }


def _gdn_decode(rank: Rank, B: int) -> Case:
    moved = rank.state_bytes(2 * B)
    sets = rank.sets(moved)
    slots = max(B, -(-2 * rank.cache_bytes // rank.state_bytes(1)))
    conv, state, restore = rank.states(slots)
    chosen = [rank.pick(B, slots) for _ in range(sets)]
    projected = rank.randn(B, rank.projected)
    operands = projected, conv, state
    return Case(
        kernel="gdn_decode",
        phase="decode",
        num_tokens=B,
        length=None,
        answer=rank.options.ask("gdn_decode", check_gdn_decode, **_delta_net_shapes(rank)),
        compiled=lambda i: gdn_decode(*operands, chosen[i], **rank.delta_net),
        plain=lambda i: gdn_decode_plain(*operands, chosen[i], **rank.delta_net),
        num_sets=sets,
        memory_bytes=moved + projected.nbytes + B * rank.value * rank.dtype.itemsize,
        flops=gated_delta_net_work(rank.config, rank.tp, decode_chunks(B, 1), 1).flops,
        restore=restore,
    )


def _gdn_prefill(rank: Rank, count: int, length: int) -> Case:
    T = count * length
    conv, state, restore = rank.states(count)
    spans = [Span(i * length, length, 0, i + 1) for i in range(count)]
    chunks = cut_into_chunks(spans, rank.device)
    projected = rank.randn(rank.sets(T * rank.projected * rank.dtype.itemsize), T, rank.projected)
    return Case(
        kernel="gdn_prefill",
        phase="prefill",
        num_tokens=T,
        length=length,
        answer=rank.options.ask("gdn_prefill", check_gdn_prefill, **_delta_net_shapes(rank)),
        compiled=lambda i: gdn_prefill(projected[i], conv, state, chunks, **rank.delta_net),
        plain=lambda i: gdn_prefill_plain(projected[i], conv, state, spans, **rank.delta_net),
        num_sets=len(projected),
        memory_bytes=rank.state_bytes(count) + projected[0].nbytes + T * rank.value * rank.dtype.itemsize,
        flops=gated_delta_net_work(rank.config, rank.tp, (Chunk(0, length),) * count, 1).flops,
        restore=restore,
    )


def moe_shapes(rank: Rank) -> dict[str, int]:
    config = rank.config
    return {
        "num_experts": config.num_experts + rank.shared,
        "top_k": config.num_experts_per_tok + rank.shared,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.moe_intermediate_size // rank.tp,
    }


def _route_options(rank: Rank) -> dict[str, Any]:
    return {
        "num_experts": rank.config.num_experts,
        "top_k": rank.config.num_experts_per_tok,
        "normalize": rank.config.norm_topk_prob,
    }


def _plain_routing(rank: Rank, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, experts) [T, K], the shared expert, chosen by every token, behind the routed ones."""
    N = rank.config.num_experts
    weights, experts = moe.route(
        logits[:, :N], top_k=rank.config.num_experts_per_tok, normalize=rank.config.norm_topk_prob
    )
    gates = logits[:, N:].float().sigmoid().to(logits.dtype)
    return torch.cat((weights, gates), 1), torch.cat(
        (experts, torch.full_like(gates, N, dtype=experts.dtype)), 1
    )


def _moe_route(rank: Rank, B: int) -> Case:
    return _route(
        rank,
        B,
        "decode",
        "moe_decode",
        check_moe_decode,
        lambda x: route_decode(x, **_route_options(rank)).weights,
    )


def _route_prefill(rank: Rank, T: int) -> Case:
    return _route(
        rank,
        T,
        "prefill",
        "moe_prefill",
        check_moe_prefill,
        lambda x: route_prefill(x, **_route_options(rank))[0],
    )


def _route(
    rank: Rank,
    T: int,
    phase: str,
    module: str,
    check: Callable[..., Answer],
    compiled: Callable[[Tensor], Tensor],
) -> Case:
    columns, K = rank.config.num_experts + rank.shared, rank.config.num_experts_per_tok + rank.shared
    logits = rank.randn(rank.sets(T * columns * rank.dtype.itemsize), T, columns)
    return Case(
        kernel=f"{module}: routing",
        phase=phase,
        num_tokens=T,
        length=None,
        answer=rank.options.ask(module, check, **moe_shapes(rank)),
        compiled=lambda i: compiled(logits[i]),
        plain=lambda i: _plain_routing(rank, logits[i])[0],
        num_sets=len(logits),
        memory_bytes=logits[0].nbytes + T * K * (rank.dtype.itemsize + 4),
    )


def _moe_decode(rank: Rank, B: int) -> Case:
    answer = rank.options.ask("moe_decode", check_moe_decode, **moe_shapes(rank))

    def compiled(x: Tensor, logits: Tensor) -> Callable[[], Tensor]:
        routing = route_decode(logits, **_route_options(rank))
        return lambda: routed_experts_decode(
            x, routing.weights, routing.experts, *rank.experts, tiles=routing.tiles
        )

    return _experts(rank, B, "decode", "moe_decode: experts", answer, compiled)


def _moe_prefill(rank: Rank, T: int) -> Case:
    answer = rank.options.ask("moe_prefill", check_moe_prefill, **moe_shapes(rank))

    def compiled(x: Tensor, logits: Tensor) -> Callable[[], Tensor]:
        weights, experts = route_prefill(logits, **_route_options(rank))
        return lambda: routed_experts_prefill(x, weights, experts, *rank.experts)

    return _experts(rank, T, "prefill", "moe_prefill: experts", answer, compiled)


def _experts(
    rank: Rank,
    T: int,
    phase: str,
    kernel: str,
    answer: Answer,
    compiled: Callable[[Tensor, Tensor], Callable[[], Tensor]],
) -> Case:
    """Each set has tokens of its own, and so other experts of the same weights."""
    config, D = rank.config, rank.config.hidden_size
    expert_bytes = (rank.experts[0].nbytes + rank.experts[1].nbytes) // len(rank.experts[0])
    sets = rank.sets(min(len(rank.experts[0]), T * config.num_experts_per_tok) * expert_bytes)
    x, logits = rank.randn(sets, T, D), rank.randn(sets, T, config.num_experts + rank.shared)
    routed = [_plain_routing(rank, one) for one in logits]
    distinct = sum(len(experts.unique()) for _, experts in routed) / sets
    calls = [compiled(x[i], logits[i]) for i in range(sets)] if answer.usable else []
    return Case(
        kernel=kernel,
        phase=phase,
        num_tokens=T,
        length=None,
        answer=answer,
        compiled=lambda i: calls[i](),
        plain=lambda i: moe.routed_experts(x[i], *routed[i], *rank.experts),
        num_sets=sets,
        memory_bytes=round(distinct * expert_bytes) + 2 * x[0].nbytes,
        flops=2.0 * routed[0][1].numel() * expert_bytes / rank.dtype.itemsize,
    )


def _norm_rope(rank: Rank, phase: str, T: int) -> Case:
    config, H, G, d = rank.config, rank.H, rank.G, rank.config.head_dim
    page = rank.spec.page_size
    k, v = rank.randn(2, -(-T // page) + 1, page, G, d)
    moved = 2 * T * (H + 2 * G) * d * rank.dtype.itemsize
    projected = rank.randn(rank.sets(moved), T, 2 * (H + G) * d)
    positions = torch.arange(T, device=rank.device)
    options: dict[str, Any] = {
        "q_weight": rank.randn(d),
        "k_weight": rank.randn(d),
        "num_heads": H,
        "rotary_dim": config.rotary_dim,
        "theta": config.rope_theta,
        "eps": config.rms_norm_eps,
        "weight_bias": WEIGHT_BIAS,
    }
    rest = positions, positions + page, k, v
    return Case(
        kernel="norm_rope",
        phase=phase,
        num_tokens=T,
        length=None,
        answer=rank.options.ask("norm_rope", check_norm_rope, head_dim=d, rotary_dim=config.rotary_dim),
        compiled=lambda i: norm_rope(projected[i], *rest, **options),
        plain=lambda i: norm_rope_plain(projected[i], *rest, **options),
        num_sets=len(projected),
        memory_bytes=moved + 2 * positions.nbytes,
    )


def _paged_decode(rank: Rank, B: int, length: int) -> Case:
    config, H, G, d, page = rank.config, rank.H, rank.G, rank.config.head_dim, rank.spec.page_size
    page_bytes = 2 * page * G * d * rank.dtype.itemsize
    width = -(-length // page)
    pages = max(B * width, -(-2 * rank.cache_bytes // page_bytes))
    k, v = rank.randn(2, pages + 1, page, G, d)
    moved = B * length * page_bytes // page
    # As the engine's, tables are views of a [P, B] tensor.
    tables = [rank.pick(B * width, pages).view(width, B).T for _ in range(rank.sets(moved))]
    lengths, q = torch.full((B,), length, device=rank.device), rank.randn(B, H, d)
    return Case(
        kernel="paged_decode",
        phase="decode",
        num_tokens=B,
        length=length,
        answer=rank.options.ask(
            "paged_decode",
            check_paged_decode,
            num_heads=H,
            num_kv_heads=G,
            head_dim=d,
            max_num_seqs=rank.options.max_num_seqs,
        ),
        compiled=lambda i: paged_decode_attention(q, k, v, tables[i], lengths, scale=d**-0.5),
        plain=lambda i: attention.decode_attention(q, k, v, tables[i], lengths, scale=d**-0.5),
        num_sets=len(tables),
        memory_bytes=moved + 2 * q.nbytes,
        flops=attention_work(config, rank.tp, decode_chunks(B, length - 1), 1).flops,
    )


def _flash_prefill(rank: Rank, count: int, length: int) -> Case:
    config, H, G, d, page = rank.config, rank.H, rank.G, rank.config.head_dim, rank.spec.page_size
    width = -(-length // page)
    k, v = rank.randn(2, count * width + 1, page, G, d)
    tables = rank.pick(count * width, count * width).view(count, width)
    ragged = lay_out([length] * count, tables.tolist(), [length] * count, page, rank.device)
    T, heads = count * length, {"num_heads": H, "num_kv_heads": G, "head_dim": d}
    q = rank.randn(rank.sets(2 * T * H * d * rank.dtype.itemsize), T, H, d)
    even = rank.options.ask("even_prefill", check_even_prefill, **heads).usable

    def plain(i: int) -> Tensor:
        outs = [
            attention.prefill_attention(one, k, v, table, start=0, scale=d**-0.5)
            for one, table in zip(q[i].split(length), tables, strict=True)
        ]
        return torch.cat(outs)

    return Case(
        kernel="flash_prefill, cuDNN" if even and ragged.even else "flash_prefill",
        phase="prefill",
        num_tokens=T,
        length=length,
        answer=rank.options.ask("flash_prefill", check_flash_prefill, **heads),
        compiled=lambda i: flash_prefill(q[i], k, v, ragged, scale=d**-0.5, even=even),
        plain=plain,
        num_sets=len(q),
        memory_bytes=2 * q[0].nbytes + 2 * T * G * d * rank.dtype.itemsize,
        flops=attention_work(config, rank.tp, (Chunk(0, length),) * count, 1).flops,
    )
