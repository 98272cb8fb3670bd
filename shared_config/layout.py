"""Which ranks work together: the groups of attention and of the MoE, as plain lists of global ranks.

tp_size is the whole world, as in SGLang. Attention and the MoE cut the same ranks in two ways:

    attention   rank = (dp * attn_cp_size + cp) * attn_tp_size + tp
    MoE         rank = (moe_dp * ep_size  + ep) * moe_tp_size  + tp

The attention-TP ranks of one (dp, cp) hold the same rows: a *piece* of the batch. A MoE slice (the ranks of one moe_dp)
that spans several pieces gathers their rows before the MoE and takes its own afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from shared_config.model import Qwen3NextConfig

GROUP_NAMES = (
    "world",
    "attn_tp",
    "attn_cp",
    "moe_tp",
    "moe_ep",
    "moe_reduce",
    "pieces",
    "prefill_gather",
    "decode_gather",
)


@dataclass(frozen=True)
class RankPlace:
    """A rank's coordinates in both factorisations: attention's (dp, cp, tp) and the MoE's (moe_dp, ep, moe_tp)."""

    dp: int
    cp: int
    tp: int
    moe_dp: int
    ep: int
    moe_tp: int


@dataclass(frozen=True)
class RankGroups:
    """One rank's groups, each the tuple of its members' global ranks in rank order."""

    world: tuple[int, ...]
    attn_tp: tuple[int, ...]
    attn_cp: tuple[int, ...]
    moe_tp: tuple[int, ...]
    moe_ep: tuple[int, ...]


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of every parallel axis; raises `ValueError` naming both numbers when they do not divide."""

    tp_size: int = 1
    attn_cp_size: int = 1
    attn_dp_size: int = 1
    moe_dp_size: int = 1
    ep_size: int = 1
    nnodes: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{field.name} must be an integer of at least 1, got {size!r}")
        self._require_divides("attn_cp_size * attn_dp_size", self.attn_cp_size * self.attn_dp_size)
        self._require_divides("ep_size * moe_dp_size", self.ep_size * self.moe_dp_size)
        self._require_divides("nnodes", self.nnodes)
        self._require_whole_pieces()

    def _require_divides(self, name: str, divisor: int) -> None:
        if self.tp_size % divisor:
            raise ValueError(
                f"tp_size {self.tp_size} is not divisible by {name} = {divisor}: "
                "tp_size is the number of all ranks, and every axis must divide it"
            )

    def _require_whole_pieces(self) -> None:
        pieces, cp = self.pieces_per_slice, self.attn_cp_size
        for what, size, other, other_size in (
            ("attention-TP size", self.attn_tp_size, "MoE-TP x EP size", self.moe_reduce_size),
            ("number of attention pieces in a MoE slice", pieces, "attn_cp_size", cp),
        ):
            if size % other_size and other_size % size:
                raise ValueError(
                    f"the {what} {size} and the {other} {other_size} do not divide one another: a MoE slice holds "
                    "whole attention pieces, or lies within one"
                )

    @property
    def world_size(self) -> int:
        return self.tp_size

    @property
    def attn_tp_size(self) -> int:
        return self.tp_size // (self.attn_cp_size * self.attn_dp_size)

    @property
    def moe_tp_size(self) -> int:
        return self.tp_size // (self.ep_size * self.moe_dp_size)

    @property
    def moe_reduce_size(self) -> int:
        """Ranks that share the MoE's debt: its tensor- and expert-parallel ranks in one MoE-DP slice."""
        return self.moe_tp_size * self.ep_size

    @property
    def pieces_per_slice(self) -> int:
        """Attention pieces whose rows one MoE slice works on. Above 1 its sum is paid at once, then own rows taken."""
        return max(1, self.moe_reduce_size // self.attn_tp_size)

    @property
    def head_shares(self) -> int:
        """Ranks that a mixer's heads are spread over: context-parallel ranks exchange tokens for heads."""
        return self.attn_tp_size * self.attn_cp_size

    def place(self, rank: int) -> RankPlace:
        """Where `rank` stands on every axis."""
        self._require_rank(rank)
        piece, tp = divmod(rank, self.attn_tp_size)
        dp, cp = divmod(piece, self.attn_cp_size)
        shard, moe_tp = divmod(rank, self.moe_tp_size)
        moe_dp, ep = divmod(shard, self.ep_size)
        return RankPlace(dp, cp, tp, moe_dp, ep, moe_tp)

    def groups(self, rank: int) -> RankGroups:
        """The groups that global rank `rank` belongs to."""
        self._require_rank(rank)
        world = tuple(range(self.tp_size))
        attn_tp = _strided(rank, size=self.attn_tp_size, stride=1)
        attn_cp = _strided(rank, size=self.attn_cp_size, stride=self.attn_tp_size)
        moe_tp = _strided(rank, size=self.moe_tp_size, stride=1)
        moe_ep = _strided(rank, size=self.ep_size, stride=self.moe_tp_size)
        return RankGroups(world, attn_tp, attn_cp, moe_tp, moe_ep)

    def moe_reduce(self, rank: int) -> tuple[int, ...]:
        """The ranks over which the MoE's partial sums of `rank` are summed (`moe_reduce_size` of them)."""
        self._require_rank(rank)
        return _strided(rank, size=self.moe_reduce_size, stride=1)

    def pieces(self, rank: int) -> tuple[int, ...]:
        """The ranks that stand where `rank` does in each attention piece, in the pieces' order."""
        self._require_rank(rank)
        return _strided(rank, size=self.attn_cp_size * self.attn_dp_size, stride=self.attn_tp_size)

    def gather(self, rank: int, *, prefill: bool) -> tuple[int, ...]:
        """The ranks whose rows `rank` needs beside its own for the MoE: one of each piece in its MoE slice.

        In decode context-parallel ranks hold the same rows, so only those of other attention-DP ranks are missing.
        """
        self._require_rank(rank)
        if prefill:
            return _strided(rank, size=self.pieces_per_slice, stride=self.attn_tp_size)
        size = max(1, self.pieces_per_slice // self.attn_cp_size)
        return _strided(rank, size=size, stride=self.attn_tp_size * self.attn_cp_size)

    def all_groups(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Every distinct group of one kind (a name of `GROUP_NAMES`), sorted: the order to create them in."""
        if name not in GROUP_NAMES:
            raise ValueError(f"name must be one of {', '.join(GROUP_NAMES)}, got {name!r}")
        return tuple(sorted({self.group(name, rank) for rank in range(self.tp_size)}))

    def group(self, name: str, rank: int) -> tuple[int, ...]:
        """The group of one kind that `rank` belongs to."""
        if name in ("moe_reduce", "pieces"):
            return getattr(self, name)(rank)
        if name in ("prefill_gather", "decode_gather"):
            return self.gather(rank, prefill=name == "prefill_gather")
        return getattr(self.groups(rank), name)

    def validate(self, config: Qwen3NextConfig) -> None:
        """Raise `ValueError`, naming both numbers, when `config` cannot be cut this way.

        KV heads are the exception: with fewer of them than ranks each is replicated, so either number may
        divide the other.
        """
        shares, moe_tp, moe_ranks = self.head_shares, self.moe_tp_size, self.moe_reduce_size
        axes = "attention-TP size" if self.attn_cp_size == 1 else "attention-TP x CP size"
        checks = [
            ("num_attention_heads", config.num_attention_heads, axes, shares),
            ("linear_num_key_heads", config.linear_num_key_heads, axes, shares),
            ("linear_num_value_heads", config.linear_num_value_heads, axes, shares),
        ]
        layers = range(config.num_hidden_layers)
        if any(config.is_moe_layer(layer) for layer in layers):
            checks += [
                ("num_experts", config.num_experts, "ep_size", self.ep_size),
                ("moe_intermediate_size", config.moe_intermediate_size, "MoE-TP size", moe_tp),
                (
                    "shared_expert_intermediate_size",
                    config.shared_expert_intermediate_size,
                    "MoE-TP x EP size",
                    moe_ranks,
                ),
            ]
        if not all(config.is_moe_layer(layer) for layer in layers):
            checks.append(("intermediate_size", config.intermediate_size, "MoE-TP x EP size", moe_ranks))
        for key, amount, axis, size in checks:
            if amount % size:
                raise ValueError(f"{key} {amount} is not divisible by the {axis} {size}")
        kv_heads = config.num_key_value_heads
        for axis, size in (("attention-TP size", self.attn_tp_size), (axes, shares)):
            if kv_heads % size and size % kv_heads:
                raise ValueError(
                    f"num_key_value_heads {kv_heads} and the {axis} {size} do not divide "
                    "one another: KV heads are either split evenly or replicated evenly"
                )

    def _require_rank(self, rank: int) -> None:
        if not 0 <= rank < self.tp_size:
            raise ValueError(
                f"rank must be from 0 to {self.tp_size - 1} (tp_size {self.tp_size}), got {rank}"
            )


def _strided(rank: int, *, size: int, stride: int) -> tuple[int, ...]:
    """The `size` ranks, `stride` apart, that `rank` shares an aligned block of size * stride ranks with."""
    block = size * stride
    first = rank // block * block + rank % stride
    return tuple(first + stride * index for index in range(size))
