"""Which ranks work together: the groups of attention and of the MoE, as plain lists of global ranks.

tp_size is the whole world, as in SGLang. Attention and the MoE cut the same ranks in two ways:

    attention   rank = (dp * attn_cp_size + cp) * attn_tp_size + tp
    MoE         rank = (moe_dp * ep_size  + ep) * moe_tp_size  + tp
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from shared_config.model import Qwen3NextConfig

GROUP_NAMES = ("world", "attn_tp", "attn_cp", "moe_tp", "moe_ep", "moe_reduce")


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

    def _require_divides(self, name: str, divisor: int) -> None:
        if self.tp_size % divisor:
            raise ValueError(
                f"tp_size {self.tp_size} is not divisible by {name} = {divisor}: "
                "tp_size is the number of all ranks, and every axis must divide it"
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

    def all_groups(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Every distinct group of one kind (a name of `GROUP_NAMES`), sorted: the order to create them in."""
        if name not in GROUP_NAMES:
            raise ValueError(f"name must be one of {', '.join(GROUP_NAMES)}, got {name!r}")
        ranks = range(self.tp_size)
        if name == "moe_reduce":
            return tuple(sorted({self.moe_reduce(rank) for rank in ranks}))
        return tuple(sorted({getattr(self.groups(rank), name) for rank in ranks}))

    def validate(self, config: Qwen3NextConfig) -> None:
        """Raise `ValueError`, naming both numbers, when `config` cannot be cut this way.

        KV heads are the exception: with fewer of them than ranks each is replicated, so either number may
        divide the other.
        """
        attn_tp, moe_tp, moe_ranks = self.attn_tp_size, self.moe_tp_size, self.moe_reduce_size
        checks = [
            ("num_attention_heads", config.num_attention_heads, "attention-TP size", attn_tp),
            ("linear_num_key_heads", config.linear_num_key_heads, "attention-TP size", attn_tp),
            ("linear_num_value_heads", config.linear_num_value_heads, "attention-TP size", attn_tp),
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
        if kv_heads % attn_tp and attn_tp % kv_heads:
            raise ValueError(
                f"num_key_value_heads {kv_heads} and the attention-TP size {attn_tp} do not divide "
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
