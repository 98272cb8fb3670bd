"""Up to how many bytes one fused call beats the unfused steps, and in which kernel: measured, per GPU family and group
size."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class ByteLimit:
    """The largest `num_tokens * hidden_size * itemsize` of one call that should fuse, and who says so."""

    max_bytes: int
    source: str


@dataclass(frozen=True)
class PairLimit:
    """Calls of more than `above` and at most `max_bytes` bytes should run in `pair_allreduce`, the project's own kernel
    for two ranks, and who says so; `max_bytes` 0: none should."""

    above: int
    max_bytes: int
    source: str


# Keyed by (GPU family, ranks in the group). Add an entry only with its measurement: other projects' limits
# for the same kernel differ by a factor of 4 to 16, so copying one of them is a guess.
MEASURED_LIMITS = {
    (90, 2): ByteLimit(
        8 * MIB,
        "measured on 2x H200, FlashInfer 0.7.2.post1 (bench/results/2xh200-op.json): at hidden 2048 in bfloat16 fused "
        "is 1.08x faster at 2048 tokens and 0.91x at 4096",
    ),
}

MEASURED_PAIR_LIMIT = PairLimit(
    2 * MIB,
    32 * MIB,
    "measured on 2x H200 (bench/results/2xh200.json): at hidden 2048 in bfloat16 it is 1.35x as fast as FlashInfer's "
    "kernel at 2048 tokens, and at 8192 1.48x as fast as NCCL and a norm; at 512 both kernels are about alike (LOG.md)",
)
PAIR_FAMILY, PAIR_SIZE = 90, 2

# The smallest limit in vLLM's FI_ALLREDUCE_FUSION_MAX_SIZE_MB (SM90, eight ranks). Decode batches fit under
# it, and decode is where fusing gains in every published measurement; long prefill does not always gain.
UNMEASURED_LIMIT = ByteLimit(
    512 * KIB, "not measured here for this GPU family and group size: the smallest limit that vLLM uses"
)


def byte_limit(sm_family: int | None, group_sizes: tuple[int, ...]) -> ByteLimit:
    """The limit that holds for every group size in `group_sizes`: the smallest of theirs.

    A group of one rank sums nothing and is skipped.
    """
    limits = [
        MEASURED_LIMITS.get((sm_family, size), UNMEASURED_LIMIT)
        if sm_family is not None
        else UNMEASURED_LIMIT
        for size in group_sizes
        if size > 1
    ]
    return min(limits, key=lambda limit: limit.max_bytes, default=UNMEASURED_LIMIT)


def pair_limit(sm_family: int | None, group_sizes: tuple[int, ...], max_bytes: int | None) -> PairLimit:
    """The limit for groups of these sizes; `max_bytes`: what the user says instead of the measured end."""
    sizes = {size for size in group_sizes if size > 1}
    if (sm_family, sizes) != (PAIR_FAMILY, {PAIR_SIZE}):
        return PairLimit(0, 0, f"pair_allreduce is for groups of {PAIR_SIZE} ranks on SM{PAIR_FAMILY}")
    if max_bytes is None:
        return MEASURED_PAIR_LIMIT
    above = MEASURED_PAIR_LIMIT.above
    if max_bytes <= above:
        return PairLimit(
            0, 0, f"pair_allreduce is for more than {above} bytes, and the user's limit is {max_bytes}"
        )
    return PairLimit(above, max_bytes, "set by the user")
