"""Gated DeltaNet over the prompts of a pass, from projections to gated norm, in five kernels.

Shapes: T rows of all sequences, S sequences, N chunks, HV value heads, dk = dv head dims, K taps, X = 2 H dk + HV dv
channels. Slot 0 belongs to nobody: rows that pad a pass have it.
"""
# jaxtyping's shape strings are not Python.
# ruff: noqa: F722

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch
from jaxtyping import Array, Float, Int32

from core_torch.kernels.gdn_prefill import choose_carry, launches
from jax_bridge.kernels.triton_kernels import Changed, launch


def gdn_prefill(
    projected: Float[Array, "T P"],
    conv: Float[Array, "slots X K-1"],
    state: Float[Array, "slots HV dk dv"],
    sequences: Int32[Array, "S 5"],
    chunks: Int32[Array, "N 4"],
    *,
    conv_weight: Float[Array, "X K"],
    a_log: Float[Array, " HV"],
    dt_bias: Float[Array, " HV"],
    norm_weight: Float[Array, " dv"],
    eps: float,
    device: torch.device,
) -> tuple[Float[Array, "T HV*dv"], Float[Array, "slots X K-1"], Float[Array, "slots HV dk dv"]]:
    """(what the output projection takes, conv, state). projected: q, k, v, z, b, a.

    Takes what `core_torch.kernels.gdn_prefill.check_gdn_prefill` says. Every row must be some sequence's; the tables
    are those of `core_torch.kernels.gdn_prefill.chunk_tables`, and chunks of zeros do nothing.
    """
    (T, width), (HV, dim) = projected.shape, state.shape[1:3]
    channels, taps = conv.shape[1], conv.shape[2] + 1
    run = launches(
        num_k_heads=(channels // dim - HV) // 2,
        num_v_heads=HV,
        dim=dim,
        taps=taps,
        stride=width,
        num_sequences=len(sequences),
        num_chunks=len(chunks),
        carry=choose_carry((len(sequences) - 1) * HV, dim),  # the last one is the rows that pad
    )

    def new(*shape: int, dtype: jnp.dtype = projected.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    gate, heads = new(T, HV, dtype=jnp.dtype("float32")), new(T, HV, dim)
    weights = conv_weight, a_log, dt_bias
    mixed, decay, beta = launch(
        run.mix, device, projected, conv, *weights, new(T, channels), gate, gate, chunks, sequences
    )
    # `mix` reads what lay in `conv` before.
    (conv,) = launch(run.keep_inputs, device, projected, Changed(conv), sequences, after=(mixed,))
    reads, values = launch(run.solve, device, mixed, decay, beta, heads, heads, chunks)
    values, before, state = launch(
        run.carry,
        device,
        mixed,
        decay,
        reads,
        Changed(values),
        new(len(chunks), HV, dim, dim),
        Changed(state),
        sequences,
    )
    (out,) = launch(
        run.finish,
        device,
        projected,
        mixed,
        decay,
        values,
        before,
        norm_weight,
        new(T, HV * dim),
        chunks,
        scalars=(dim**-0.5, eps),
    )
    return out, conv, state
