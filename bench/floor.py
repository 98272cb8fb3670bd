"""The least time that a step can take: what has to be read, computed and sent, at the rates that were measured.

Counted for one rank, which reads its share of the weights once, the caches of its sequences, and sends its part of
each sum. Activations are not counted: they fit into caches. Each part takes at least the longer of its bytes and its
operations; the parts depend on one another, so their times add up; no overlap of communication is assumed either.

Shapes: T tokens of a step over all sequences, D hidden, V vocabulary, N ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.machine import Rates
from shared_config import Qwen3NextConfig
from shared_config.checkpoint import head_share, vocab_share

STATE_BYTES = 4  # the recurrent state is float32


@dataclass(frozen=True)
class Chunk:
    """`num_tokens` tokens of one sequence, behind `start` that are in the cache. A decode step has one each."""

    start: int
    num_tokens: int


@dataclass(frozen=True)
class Work:
    """On one rank: memory bytes, floating-point operations, and bytes sent to peers."""

    memory_bytes: float = 0.0
    flops: float = 0.0
    wire_bytes: float = 0.0

    def seconds(self, rates: Rates) -> float:
        link = rates.link_bytes_per_s
        wire = 0.0 if link is None else self.wire_bytes / link
        return max(self.memory_bytes / rates.memory_bytes_per_s, self.flops / rates.flops_per_s) + wire


def decode_chunks(batch: int, context: int) -> tuple[Chunk, ...]:
    return (Chunk(context, 1),) * batch


def step_work(
    config: Qwen3NextConfig, *, tp: int, chunks: tuple[Chunk, ...], distinct_experts: float
) -> dict[str, Work]:
    """The parts of one forward pass, by name. `distinct_experts`: mean over the MoE layers of how many were touched.

    Each sequence's last token gives logits. Raises ValueError, naming both numbers, when tp does not divide a dim.
    """
    kinds = config.layer_types
    attention, linear = kinds.count("full_attention"), kinds.count("linear_attention")
    moe = sum(config.is_moe_layer(layer) for layer in range(len(kinds)))
    tokens = sum(chunk.num_tokens for chunk in chunks)
    return {
        "projections": _weights(
            config.itemsize,
            tokens,
            attention * _attention_weights(config, tp)
            + linear * _linear_weights(config, tp)
            + moe * _moe_dense_weights(config, tp)
            + (len(kinds) - moe) * 3 * config.hidden_size * config.intermediate_size // tp,
        ),
        "experts": _experts(config, tp, tokens, moe, distinct_experts),
        "attention": attention_work(config, tp, chunks, attention),
        "gated delta net": gated_delta_net_work(config, tp, chunks, linear),
        "head": _weights(
            config.itemsize, len(chunks), vocab_share(config.vocab_size, 0, tp)[1] * config.hidden_size
        ),
        "all-reduce": Work(wire_bytes=2 * len(kinds) * _wire_bytes(config, tp, tokens)),
    }


def floor_us(work: dict[str, Work], rates: Rates) -> float:
    """Microseconds that the parts take one after another."""
    return 1e6 * sum(part.seconds(rates) for part in work.values())


def _weights(itemsize: int, rows: int, elements: int) -> Work:
    """A matrix read once and applied to `rows` rows."""
    return Work(memory_bytes=elements * itemsize, flops=2.0 * rows * elements)


def _attention_weights(config: Qwen3NextConfig, tp: int) -> int:
    """q, its gate, k, v, and the output projection of one layer."""
    queries = config.num_attention_heads // tp * config.head_dim
    return config.hidden_size * (3 * queries + 2 * _kv_heads(config, tp) * config.head_dim)


def _linear_weights(config: Qwen3NextConfig, tp: int) -> int:
    """q, k, v, z, b, a, the convolution's taps, and the output projection of one Gated DeltaNet layer."""
    key, value = config.key_dim // tp, config.value_dim // tp
    heads = config.linear_num_value_heads // tp
    projections = config.hidden_size * (2 * key + 2 * value + 2 * heads + value)
    return projections + (2 * key + value) * config.linear_conv_kernel_dim


def _moe_dense_weights(config: Qwen3NextConfig, tp: int) -> int:
    """What every token of an MoE layer uses: the router (whole on each rank), the shared expert and its gate."""
    shared = 3 * config.shared_expert_intermediate_size // tp
    return config.hidden_size * (config.num_experts + shared + 1)


def _experts(config: Qwen3NextConfig, tp: int, tokens: int, layers: int, distinct: float) -> Work:
    """Each touched expert is read once; each token is multiplied by its own."""
    expert = 3 * config.hidden_size * config.moe_intermediate_size // tp
    return Work(
        memory_bytes=layers * distinct * expert * config.itemsize,
        flops=2.0 * layers * tokens * config.num_experts_per_tok * expert,
    )


def attention_work(config: Qwen3NextConfig, tp: int, chunks: tuple[Chunk, ...], layers: int) -> Work:
    """Keys and values: earlier ones are read, own ones written. Two products for each pair of query and key."""
    row = 2 * _kv_heads(config, tp) * config.head_dim * config.itemsize
    heads = config.num_attention_heads // tp
    pairs = sum(c.num_tokens * c.start + c.num_tokens * (c.num_tokens + 1) // 2 for c in chunks)
    rows = sum(c.start + c.num_tokens for c in chunks)
    return Work(memory_bytes=layers * rows * row, flops=4.0 * layers * pairs * heads * config.head_dim)


def gated_delta_net_work(config: Qwen3NextConfig, tp: int, chunks: tuple[Chunk, ...], layers: int) -> Work:
    """Recurrent and convolution states are read and written once a chunk; a token needs three products with the
    state (read, correct, query), the fewest operations of any form of the rule."""
    heads = config.linear_num_value_heads // tp
    state = heads * config.linear_key_head_dim * config.linear_value_head_dim
    channels = config.conv_dim // tp
    conv_bytes = channels * (config.linear_conv_kernel_dim - 1) * config.itemsize
    reads = sum(2 if chunk.start else 1 for chunk in chunks)  # a first chunk has nothing to read
    tokens = sum(chunk.num_tokens for chunk in chunks)
    return Work(
        memory_bytes=layers * reads * (state * STATE_BYTES + conv_bytes),
        flops=layers * tokens * (6.0 * state + 2.0 * channels * config.linear_conv_kernel_dim),
    )


def _kv_heads(config: Qwen3NextConfig, tp: int) -> int:
    return len(head_share(config.num_key_value_heads, 0, tp, "num_key_value_heads"))


def _wire_bytes(config: Qwen3NextConfig, tp: int, tokens: int) -> float:
    """What a rank sends for one sum of [T, D]: 2 (N - 1) / N of the message."""
    return 2 * (tp - 1) / tp * tokens * config.hidden_size * config.itemsize
