"""Where each parameter's numbers lie in a Hugging Face Qwen3-Next checkpoint, for one rank of a layout.

A checkpoint is described as boxes: `Piece` says which box of a stored tensor goes to which box of a parameter, so
a loader of either framework only copies boxes, and a rank reads nothing but its own. Two layouts exist: the hub's
(a tensor per expert, `mlp.experts.7.gate_proj.weight`) and the packed one that transformers >= 5 saves
(`mlp.experts.gate_up_proj`). Projections of one input are merged into one parameter, component by component:

    linear_attn.in_proj   q | k | v | z | b | a     (stored interleaved by key head)
    self_attn.in_proj     q | gate | k | v          (q and gate stored interleaved by head)
    gate_up_proj          gate | up

Projections are split over attention-TP. What works on single heads between them (conv, A_log, dt_bias) is split over
attention-TP x CP, because context-parallel ranks exchange tokens for heads there. Experts are split by contiguous
blocks over EP and within each over MoE-TP; dense MLPs and the shared expert over all ranks of the MoE slice.

Shapes: D hidden, V vocabulary, N experts, I intermediate; `local` means this rank's share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from shared_config.layout import ParallelLayout
from shared_config.model import Qwen3NextConfig

Box = tuple[slice, ...]
IGNORED_PREFIXES = ("mtp.",)  # the multi-token-prediction head: recognised, not run
FLOAT32_PARAMETERS = (
    "A_log",
    "dt_bias",
)  # kept in float32 whatever the model's dtype: they are exponentiated


@dataclass(frozen=True)
class Piece:
    """Copy `source[source_box]`, reshaped if need be, to `parameter[parameter_box]`."""

    source: str
    source_box: Box
    parameter: str
    parameter_box: Box


@dataclass
class CheckpointPlan:
    """What one rank reads: stored tensors by name and full shape, its parameters by name and local shape."""

    sources: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    replicated: set[str] = field(default_factory=set)  # parameters that every rank holds whole

    def contents(self) -> dict[str, str]:
        """For each parameter a text that ranks have in common exactly when they hold the same numbers in it."""
        found: dict[str, str] = {}
        for piece in self.pieces:
            box = ",".join(f"{s.start}:{s.stop}" for s in piece.source_box)
            found.setdefault(piece.parameter, f"{piece.source}[{box}]")
        return found


def div_even(a: int, b: int, what: str) -> int:
    """a / b, or a ValueError that names both numbers."""
    if a % b:
        raise ValueError(
            f"{what} = {a} does not divide by {b}; choose a tensor-parallel size that divides it"
        )
    return a // b


def head_share(heads: int, rank: int, size: int, what: str) -> range:
    """This rank's heads; where there are fewer heads than ranks, each is replicated on `size / heads` ranks."""
    if heads >= size:
        local = div_even(heads, size, what)
        return range(rank * local, (rank + 1) * local)
    div_even(size, heads, f"tensor-parallel size (over {what} = {heads})")
    return range(rank * heads // size, rank * heads // size + 1)


def vocab_share(vocab_size: int, rank: int, size: int) -> tuple[range, int]:
    """This rank's rows of the vocabulary and the padded number of rows that every rank holds."""
    padded = -(-vocab_size // size)
    return range(min(rank * padded, vocab_size), min((rank + 1) * padded, vocab_size)), padded


def _span(r: range) -> slice:
    return slice(r.start, r.stop)


class _Planner:
    def __init__(
        self,
        config: Qwen3NextConfig,
        attn: tuple[int, int],
        cp: tuple[int, int],
        moe: tuple[int, int],
        ep_size: int,
        packed: bool,
    ) -> None:
        self.config, self.packed = config, packed
        self.attn_rank, self.attn_size = attn
        self.cp_rank, self.cp_size = cp
        self.moe_rank, self.moe_size = moe
        self.ep_size, self.moe_tp_size = ep_size, div_even(self.moe_size, ep_size, "MoE-TP x EP size")
        self.ep_rank, self.moe_tp_rank = divmod(self.moe_rank, self.moe_tp_size)
        self.plan = CheckpointPlan()

    def source(self, name: str, *shape: int) -> str:
        self.plan.sources[name] = shape
        return name

    def parameter(self, name: str, *shape: int) -> str:
        self.plan.parameters[name] = shape
        return name

    def copy(self, source: str, source_box: Box, parameter: str, parameter_box: Box) -> None:
        self.plan.pieces.append(Piece(source, source_box, parameter, parameter_box))

    def whole(self, source: str, parameter: str, *shape: int) -> None:
        """A tensor that every rank holds."""
        box = tuple(slice(0, n) for n in shape)
        self.copy(self.source(source, *shape), box, self.parameter(parameter, *shape), box)
        self.plan.replicated.add(parameter)

    def vocab(self, source: str, parameter: str) -> None:
        V, D = self.config.vocab_size, self.config.hidden_size
        rows, padded = vocab_share(V, self.attn_rank, self.attn_size)
        self.copy(
            self.source(source, V, D),
            (_span(rows), slice(0, D)),
            self.parameter(parameter, padded, D),
            (slice(0, len(rows)), slice(0, D)),
        )

    def stack_rows(
        self, parameter: str, parts: list[tuple[str, Iterator[slice]]], columns: int | None
    ) -> None:
        """Fill a parameter from top to bottom with row blocks of stored tensors."""
        at = 0
        tail = () if columns is None else (slice(0, columns),)
        for source, blocks in parts:
            for block in blocks:
                rows = block.stop - block.start
                source_tail = tuple(slice(0, n) for n in self.plan.sources[source][1:])
                self.copy(source, (block, *source_tail), parameter, (slice(at, at + rows), *tail))
                at += rows
        self.parameter(parameter, at, *(() if columns is None else (columns,)))

    def attention(self, stored: str, name: str) -> None:
        c, D = self.config, self.config.hidden_size
        heads = head_share(c.num_attention_heads, self.attn_rank, self.attn_size, "num_attention_heads")
        div_even(c.num_attention_heads, self.attn_size, "num_attention_heads")
        kv_heads = head_share(c.num_key_value_heads, self.attn_rank, self.attn_size, "num_key_value_heads")
        d = c.head_dim

        def blocks(which: range, stride: int, offset: int) -> Iterator[slice]:
            return (slice(h * stride + offset, h * stride + offset + d) for h in which)

        def parts(suffix: str, *tail: int) -> list[tuple[str, Iterator[slice]]]:
            q = self.source(f"{stored}.q_proj.{suffix}", 2 * c.num_attention_heads * d, *tail)
            k = self.source(f"{stored}.k_proj.{suffix}", c.num_key_value_heads * d, *tail)
            v = self.source(f"{stored}.v_proj.{suffix}", c.num_key_value_heads * d, *tail)
            return [
                (q, blocks(heads, 2 * d, 0)),
                (q, blocks(heads, 2 * d, d)),
                (k, blocks(kv_heads, d, 0)),
                (v, blocks(kv_heads, d, 0)),
            ]

        self.stack_rows(f"{name}.in_proj.weight", parts("weight", D), D)
        if c.attention_bias:
            self.stack_rows(f"{name}.in_proj.bias", parts("bias"), None)
            self.whole(f"{stored}.o_proj.bias", f"{name}.out_proj.bias", D)
        local = len(heads) * d
        self.copy(
            self.source(f"{stored}.o_proj.weight", D, c.num_attention_heads * d),
            (slice(0, D), slice(heads.start * d, heads.stop * d)),
            self.parameter(f"{name}.out_proj.weight", D, local),
            (slice(0, D), slice(0, local)),
        )
        self.whole(f"{stored}.q_norm.weight", f"{name}.q_norm.weight", d)
        self.whole(f"{stored}.k_norm.weight", f"{name}.k_norm.weight", d)

    def gated_delta_net(self, stored: str, name: str) -> None:
        c, D = self.config, self.config.hidden_size
        dk, dv = c.linear_key_head_dim, c.linear_value_head_dim
        group = div_even(c.linear_num_value_heads, c.linear_num_key_heads, "linear_num_value_heads")
        local = div_even(c.linear_num_key_heads, self.attn_size, "linear_num_key_heads")
        k_heads = range(self.attn_rank * local, (self.attn_rank + 1) * local)
        v_rows = range(k_heads.start * group * dv, k_heads.stop * group * dv)
        share = div_even(local, self.cp_size, "linear_num_key_heads of an attention-TP rank")
        own_heads = range(k_heads.start + self.cp_rank * share, k_heads.start + (self.cp_rank + 1) * share)
        v_heads = range(own_heads.start * group, own_heads.stop * group)

        qkvz = self.source(f"{stored}.in_proj_qkvz.weight", 2 * c.key_dim + 2 * c.value_dim, D)
        ba = self.source(f"{stored}.in_proj_ba.weight", 2 * c.linear_num_value_heads, D)
        wide = (
            2 * dk + 2 * group * dv
        )  # rows of one key head in qkvz: q, k, v of its value heads, z of the same

        def rows(width: int, offset: int, stride: int) -> Iterator[slice]:
            return (slice(h * stride + offset, h * stride + offset + width) for h in k_heads)

        self.stack_rows(
            f"{name}.in_proj.weight",
            [
                (qkvz, rows(dk, 0, wide)),
                (qkvz, rows(dk, dk, wide)),
                (qkvz, rows(group * dv, 2 * dk, wide)),
                (qkvz, rows(group * dv, 2 * dk + group * dv, wide)),
                (ba, rows(group, 0, 2 * group)),
                (ba, rows(group, group, 2 * group)),
            ],
            D,
        )
        conv = self.source(f"{stored}.conv1d.weight", c.conv_dim, 1, c.linear_conv_kernel_dim)
        q_rows = slice(own_heads.start * dk, own_heads.stop * dk)
        k_rows = slice(c.key_dim + q_rows.start, c.key_dim + q_rows.stop)
        conv_v_rows = slice(2 * c.key_dim + v_heads.start * dv, 2 * c.key_dim + v_heads.stop * dv)
        self.stack_rows(
            f"{name}.conv.weight", [(conv, iter([q_rows, k_rows, conv_v_rows]))], c.linear_conv_kernel_dim
        )
        for vector in ("A_log", "dt_bias"):
            self.copy(
                self.source(f"{stored}.{vector}", c.linear_num_value_heads),
                (_span(v_heads),),
                self.parameter(f"{name}.{vector}", len(v_heads)),
                (slice(0, len(v_heads)),),
            )
        self.whole(f"{stored}.norm.weight", f"{name}.norm.weight", dv)
        self.copy(
            self.source(f"{stored}.out_proj.weight", D, c.value_dim),
            (slice(0, D), _span(v_rows)),
            self.parameter(f"{name}.out_proj.weight", D, len(v_rows)),
            (slice(0, D), slice(0, len(v_rows))),
        )

    def mlp(self, stored: str, name: str, intermediate: int, what: str) -> None:
        D = self.config.hidden_size
        local = div_even(intermediate, self.moe_size, what)
        mine = slice(self.moe_rank * local, (self.moe_rank + 1) * local)
        gate = self.source(f"{stored}.gate_proj.weight", intermediate, D)
        up = self.source(f"{stored}.up_proj.weight", intermediate, D)
        self.stack_rows(f"{name}.gate_up_proj.weight", [(gate, iter([mine])), (up, iter([mine]))], D)
        self.copy(
            self.source(f"{stored}.down_proj.weight", D, intermediate),
            (slice(0, D), mine),
            self.parameter(f"{name}.down_proj.weight", D, local),
            (slice(0, D), slice(0, local)),
        )

    def moe(self, stored: str, name: str) -> None:
        c, D, N = self.config, self.config.hidden_size, self.config.num_experts
        full = c.moe_intermediate_size
        local = div_even(full, self.moe_tp_size, "moe_intermediate_size")
        mine = slice(self.moe_tp_rank * local, (self.moe_tp_rank + 1) * local)
        block = div_even(N, self.ep_size, "num_experts")
        experts = range(self.ep_rank * block, (self.ep_rank + 1) * block)
        shifted = slice(full + mine.start, full + mine.stop)
        all_d = slice(0, D)
        gate_up = self.parameter(f"{name}.experts.gate_up_proj", block, 2 * local, D)
        down = self.parameter(f"{name}.experts.down_proj", block, D, local)
        low, high = slice(0, local), slice(local, 2 * local)
        if self.packed:
            every, all_local = _span(experts), slice(0, block)
            both = self.source(f"{stored}.experts.gate_up_proj", N, 2 * full, D)
            self.copy(both, (every, mine, all_d), gate_up, (all_local, low, all_d))
            self.copy(both, (every, shifted, all_d), gate_up, (all_local, high, all_d))
            packed_down = self.source(f"{stored}.experts.down_proj", N, D, full)
            self.copy(packed_down, (every, all_d, mine), down, (all_local, all_d, low))
        else:
            for n in range(N):
                expert = f"{stored}.experts.{n}"
                gate = self.source(f"{expert}.gate_proj.weight", full, D)
                up = self.source(f"{expert}.up_proj.weight", full, D)
                stored_down = self.source(f"{expert}.down_proj.weight", D, full)
                if n not in experts:
                    continue
                one = slice(n - experts.start, n - experts.start + 1)
                self.copy(gate, (mine, all_d), gate_up, (one, low, all_d))
                self.copy(up, (mine, all_d), gate_up, (one, high, all_d))
                self.copy(stored_down, (all_d, mine), down, (one, all_d, low))
        self.whole(f"{stored}.gate.weight", f"{name}.gate.weight", N, D)
        self.whole(f"{stored}.shared_expert_gate.weight", f"{name}.shared_expert_gate.weight", 1, D)
        self.mlp(
            f"{stored}.shared_expert",
            f"{name}.shared_expert",
            c.shared_expert_intermediate_size,
            "shared_expert_intermediate_size",
        )

    def model(self) -> CheckpointPlan:
        c, D = self.config, self.config.hidden_size
        self.vocab("model.embed_tokens.weight", "embed_tokens.weight")
        for i, kind in enumerate(c.layer_types):
            stored, name = f"model.layers.{i}", f"layers.{i}"
            self.whole(f"{stored}.input_layernorm.weight", f"{name}.input_layernorm.weight", D)
            if kind == "full_attention":
                self.attention(f"{stored}.self_attn", f"{name}.mixer")
            else:
                self.gated_delta_net(f"{stored}.linear_attn", f"{name}.mixer")
            post = "post_attention_layernorm.weight"
            self.whole(f"{stored}.{post}", f"{name}.{post}", D)
            if c.is_moe_layer(i):
                self.moe(f"{stored}.mlp", f"{name}.mlp")
            else:
                self.mlp(f"{stored}.mlp", f"{name}.mlp", c.intermediate_size, "intermediate_size")
        self.whole("model.norm.weight", "norm.weight", D)
        if not c.tie_word_embeddings:
            self.vocab("lm_head.weight", "lm_head.weight")
        return self.plan


def plan_checkpoint(
    config: Qwen3NextConfig,
    *,
    attn_rank: int = 0,
    attn_size: int = 1,
    cp_rank: int = 0,
    cp_size: int = 1,
    moe_rank: int | None = None,
    moe_size: int | None = None,
    ep_size: int = 1,
    packed: bool = False,
) -> CheckpointPlan:
    """The plan of the rank that is `attn_rank` of `attn_size` in attention-TP, `cp_rank` of `cp_size` in attention-CP
    and `moe_rank` of `moe_size` in its MoE slice (as in attention-TP unless given), which holds `ep_size` blocks of
    experts. Raises ValueError, naming both numbers, where a dimension does not divide."""
    moe = (attn_rank if moe_rank is None else moe_rank, attn_size if moe_size is None else moe_size)
    return _Planner(config, (attn_rank, attn_size), (cp_rank, cp_size), moe, ep_size, packed).model()


def plan_rank(
    config: Qwen3NextConfig, layout: ParallelLayout, rank: int, *, packed: bool = False
) -> CheckpointPlan:
    """The plan of global rank `rank` of `layout`."""
    place = layout.place(rank)
    return plan_checkpoint(
        config,
        attn_rank=place.tp,
        attn_size=layout.attn_tp_size,
        cp_rank=place.cp,
        cp_size=layout.attn_cp_size,
        moe_rank=place.ep * layout.moe_tp_size + place.moe_tp,
        moe_size=layout.moe_reduce_size,
        ep_size=layout.ep_size,
        packed=packed,
    )


def check_names(
    plan: CheckpointPlan, stored: dict[str, tuple[int, ...]], *, tied: bool, limit: int = 5
) -> None:
    """Raise one ValueError that lists the first few missing, unexpected and misshapen tensors by name."""
    ignored = {n for n in stored if n.startswith(IGNORED_PREFIXES) or (tied and n == "lm_head.weight")}
    found = {
        "missing": [n for n in plan.sources if n not in stored],
        "unexpected": [n for n in stored if n not in plan.sources and n not in ignored],
        "misshapen": [
            f"{n} (has {list(stored[n])}, the config says {list(shape)})"
            for n, shape in plan.sources.items()
            if n in stored and tuple(stored[n]) != shape
        ],
    }
    lines = []
    for kind, names in found.items():
        if names:
            more = f" and {len(names) - limit} more" if len(names) > limit else ""
            lines.append(f"{len(names)} {kind}: {', '.join(names[:limit])}{more}")
    if lines:
        raise ValueError("checkpoint does not fit its config.json: " + "; ".join(lines))


def is_packed(names: set[str] | dict[str, tuple[int, ...]]) -> bool:
    """Whether the experts are stored packed, as transformers >= 5 saves them."""
    return any(name.endswith(".mlp.experts.gate_up_proj") for name in names)
