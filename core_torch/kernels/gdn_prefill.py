"""Gated DeltaNet over the prompts of a pass, from projections to gated norm: in five kernels, or in plain torch.

Shapes: T rows of all sequences, S sequences, H key heads, HV value heads, dk, dv head dims, K taps, C = 2 H dk + HV dv
channels. Slot 0 belongs to nobody: rows that pad a pass have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from core_torch.kernels.causal_conv import causal_conv
from core_torch.kernels.gated_delta_rule import chunk_gated_delta_rule, gated_delta_gates
from core_torch.kernels.native import Answer, first_failure
from core_torch.kernels.norm import gated_rms_norm
from core_torch.kernels.triton_kernels import Launch, check_triton, launch

HEAD_DIMS, MAX_HEADS, CHUNK = (16, 32, 64, 128), 64, 64
MIX_ROWS = 16  # of a chunk and a head that one program convolves; TAPS - 1 at least
# Of a thread, at most: programs that wait a lot, so that more of them at a time are worth a few spills.
MIX_REGISTERS, SOLVE_REGISTERS, FINISH_REGISTERS = 128, 160, 168
FEW_PROGRAMS = 128  # about as many as a GPU runs side by side


@dataclass(frozen=True)
class Carry:
    """How states go from chunk to chunk: columns of a head's state in one program, its warps and its stages."""

    columns: int
    warps: int
    stages: int


# The widest first. (Triton 3.7 compiles one stage wrongly: it reads past its shared memory.)
CARRIES = Carry(64, warps=4, stages=2), Carry(32, warps=4, stages=2), Carry(16, warps=4, stages=3)


def choose_carry(states: int, dim: int) -> Carry:
    """As wide as leaves the GPU enough programs, for so many states (sequences times value heads)."""
    return next((c for c in CARRIES if states * dim // c.columns > FEW_PROGRAMS), CARRIES[-1])


class Piece(Protocol):
    """Consecutive tokens of one sequence: rows `first..first+num_tokens-1` of the pass are its positions `start...`."""

    @property
    def first(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def slot(self) -> int: ...


@dataclass(frozen=True)
class Chunks:
    """What the kernels of a pass work through, made once for all layers: int32 on the device (see `jit`)."""

    sequences: Tensor  # [S, 5]
    chunks: Tensor  # [N, 4]


def chunk_tables(pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """(sequences [S, 5], chunks [N, 4]) int32: chunks of CHUNK rows that never cross a sequence's end."""
    counts = np.array([piece.num_tokens for piece in pieces], dtype=np.int32)
    per_piece = -(-counts // CHUNK)
    first_chunk = np.cumsum(per_piece, dtype=np.int32) - per_piece
    rows = [(p.first, p.num_tokens, p.slot, p.start > 0) for p in pieces]
    sequences = np.column_stack((np.array(rows, dtype=np.int32), first_chunk))
    sequence = np.repeat(np.arange(len(pieces), dtype=np.int32), per_piece)
    before = (np.arange(len(sequence), dtype=np.int32) - first_chunk[sequence]) * CHUNK
    first = sequences[sequence, 0] + before
    return sequences, np.column_stack((first, np.minimum(counts[sequence] - before, CHUNK), before, sequence))


def cut_into_chunks(pieces: Sequence[Piece], device: torch.device) -> Chunks:
    return Chunks(
        *(torch.from_numpy(np.ascontiguousarray(table)).to(device) for table in chunk_tables(pieces))
    )


def check_gdn_prefill(
    *,
    num_k_heads: int,
    num_v_heads: int,
    k_dim: int,
    v_dim: int,
    taps: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Answer:
    """Whether `gdn_prefill` takes this rank's shapes; ask once and keep the answer."""
    on_device = check_triton(device)
    return first_failure(
        (on_device.usable, on_device.reason),
        (dtype == torch.bfloat16, f"gdn_prefill takes bfloat16, not {dtype}"),
        (1 < taps <= MIX_ROWS, f"gdn_prefill takes 2 to {MIX_ROWS} taps, not {taps}"),
        (
            k_dim == v_dim and k_dim in HEAD_DIMS,
            f"gdn_prefill takes equal head dims of {HEAD_DIMS}, not {k_dim} and {v_dim}",
        ),
        (
            num_v_heads % num_k_heads == 0 and num_v_heads <= MAX_HEADS,
            f"gdn_prefill takes up to {MAX_HEADS} value heads, a multiple of the key heads, not {num_v_heads} on "
            f"{num_k_heads}",
        ),
    )


class Launches(NamedTuple):
    """The kernels of `gdn_prefill`, in their order."""

    mix: Launch
    keep_inputs: Launch
    solve: Launch
    carry: Launch
    finish: Launch


@lru_cache(maxsize=256)  # for the layers of a pass, and for passes of a length that comes again
def launches(
    *,
    num_k_heads: int,
    num_v_heads: int,
    dim: int,
    taps: int,
    stride: int,
    num_sequences: int,
    num_chunks: int,
    carry: Carry | None = None,
) -> Launches:
    """How the kernels of `jit/gdn_prefill.py` run. `stride`: elements from one row of the projections to the next."""
    H, HV, S, N = num_k_heads, num_v_heads, num_sequences, num_chunks
    channels = (2 * H + HV) * dim
    sizes, block = {"H": H, "HV": HV, "DIM": dim, "C": CHUNK}, 256
    carry = carry or choose_carry(S * HV, dim)
    columns = min(carry.columns, dim)
    how = partial(Launch, "gdn_prefill")
    gates = {"TAPS": taps, "ROWS": MIX_ROWS, "BLOCK_H": 1 << (HV - 1).bit_length()}
    return Launches(
        mix=how(
            "mix",
            (N * (CHUNK // MIX_ROWS), 2 * H + HV + 1),
            {"STRIDE": stride, **sizes, **gates},
            warps=2,
            registers=MIX_REGISTERS,
        ),
        keep_inputs=how(
            "keep_inputs",
            (S, -(-channels // block)),
            {"STRIDE": stride, "CH": channels, "TAPS": taps, "BLOCK": block},
            warps=2,
        ),
        solve=how("solve", (N, HV), sizes, registers=SOLVE_REGISTERS),
        carry=how("carry", (HV * (dim // columns), S), {**sizes, "COLS": columns}, carry.warps, carry.stages),
        finish=how("finish", (N, HV), {"STRIDE": stride, **sizes}, registers=FINISH_REGISTERS),
    )


def gdn_prefill(
    projected: Tensor,
    conv: Tensor,
    state: Tensor,
    chunks: Chunks,
    *,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    carry: Carry | None = None,
) -> Tensor:
    """`gdn_prefill_plain` in five kernels, all sequences at once; a sequence's bits do not depend on the others.

    The products of chunks are of bfloat16, summed in float32; states stay float32. `carry` changes the time alone.
    """
    T = projected.shape[0]
    HV, dim = state.shape[1:3]
    channels, taps = conv.shape[1], conv.shape[2] + 1
    H, S, N = (channels // dim - HV) // 2, len(chunks.sequences), len(chunks.chunks)
    mixed, out = projected.new_empty(T, channels), projected.new_empty(T, HV * dim)
    decay, beta = (projected.new_empty(T, HV, dtype=torch.float32) for _ in range(2))
    reads, values = (projected.new_empty(T, HV, dim) for _ in range(2))
    before = projected.new_empty(N, HV, dim, dim)
    gates = (conv, conv_weight, a_log, dt_bias)
    run = launches(
        num_k_heads=H,
        num_v_heads=HV,
        dim=dim,
        taps=taps,
        stride=projected.stride(0),
        num_sequences=S,
        num_chunks=N,
        carry=carry,
    )
    launch(run.mix, projected, *gates, mixed, decay, beta, chunks.chunks, chunks.sequences)
    launch(run.keep_inputs, projected, conv, chunks.sequences)
    launch(run.solve, mixed, decay, beta, reads, values, chunks.chunks)
    launch(run.carry, mixed, decay, reads, values, before, state, chunks.sequences)
    launch(
        run.finish, projected, mixed, decay, values, before, norm_weight, out, chunks.chunks, dim**-0.5, eps
    )
    return out


def gdn_prefill_plain(
    projected: Tensor,
    conv: Tensor,
    state: Tensor,
    pieces: Sequence[Piece],
    *,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> Tensor:
    """projected [T, C + HV dv + 2 HV] -> [T, HV dv], ready for the output projection; conv and state in place.

    projected holds q, k, v, z, b, a; conv [S, C, K-1] the last inputs, oldest first; state [S, HV, dk, dv] float32;
    conv_weight [C, K], a_log and dt_bias [HV] float32, norm_weight [dv]. A piece that starts at position 0 starts from
    zeros, whatever its slot's previous owner has left there.
    """
    HV, dk, dv = state.shape[1:]
    channels = conv.shape[1]
    key, value = (channels - HV * dv) // 2, HV * dv
    qkv, z, b, a = projected.split([channels, value, HV, HV], dim=-1)
    g, beta = gated_delta_gates(a, b, a_log, dt_bias)
    outs = []
    for piece in pieces:
        rows, slot = slice(piece.first, piece.first + piece.num_tokens), piece.slot
        inputs, memory = conv[slot], state[slot]
        if piece.start == 0:
            inputs, memory = torch.zeros_like(inputs), torch.zeros_like(memory)
        mixed, conv[slot] = causal_conv(qkv[rows], inputs, conv_weight)
        q, k, v = mixed.split([key, key, value], dim=-1)
        out, state[slot] = chunk_gated_delta_rule(
            q.unflatten(-1, (-1, dk)),
            k.unflatten(-1, (-1, dk)),
            v.unflatten(-1, (-1, dv)),
            g[rows],
            beta[rows],
            memory,
        )
        outs.append(out)
    out = torch.cat(outs)
    return gated_rms_norm(out, z.reshape(out.shape), norm_weight, eps=eps).flatten(1)
