"""Load a Hugging Face checkpoint into one rank's model: each rank reads its own slices and nothing else."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from core_torch.layers.mlp import SparseMoE
from core_torch.models.qwen3_next import Qwen3Next
from shared_config.checkpoint import (
    FLOAT32_PARAMETERS,
    CheckpointPlan,
    check_names,
    is_packed,
    plan_checkpoint,
)
from shared_config.checkpoint_files import CheckpointFiles


def plan_for(model: Qwen3Next, *, packed: bool = False) -> CheckpointPlan:
    """The plan of the rank whose model this is."""
    return plan_checkpoint(
        model.config,
        attn_rank=model.attention.rank,
        attn_size=model.attention.size,
        cp_rank=model.pieces.context.rank,
        cp_size=model.pieces.context.size,
        moe_rank=model.mlp.rank,
        moe_size=model.mlp.size,
        ep_size=model.pieces.layout.ep_size,
        packed=packed,
    )


def materialize(model: Qwen3Next, dtype: torch.dtype, device: torch.device) -> None:
    """Give a model built on the meta device its memory: `dtype`, but for what must stay float32."""
    for module in model.modules():
        if isinstance(module, SparseMoE):
            module.allocate(dtype, device)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                kept = torch.float32 if name in FLOAT32_PARAMETERS else dtype
                empty = torch.empty(parameter.shape, dtype=kept, device=device)
                setattr(module, name, nn.Parameter(empty, requires_grad=False))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight


def load_checkpoint(model: Qwen3Next, folder: Path, *, progress: bool) -> None:
    """Fill `model` from `folder`. Raises ValueError naming tensors that are missing, unexpected or misshapen."""
    files = CheckpointFiles(folder, "pt")
    plan = plan_for(model, packed=is_packed(files.shapes))
    check_names(plan, files.shapes, tied=model.config.tie_word_embeddings)
    parameters = dict(model.named_parameters())
    for parameter in (model.embed_tokens.weight, model.lm_head.weight):
        parameter.zero_()  # the vocabulary's padding rows
    for piece in tqdm(plan.pieces, desc="loading", unit="slice", disable=not progress, leave=False):
        target = parameters[piece.parameter][piece.parameter_box]
        target.copy_(files.read(piece.source, piece.source_box).reshape(target.shape))


def fill_dummy(model: Qwen3Next, *, seed: int) -> None:
    """Random weights of the real shapes, made on the device, at scales that keep activations and routing alive.

    Matrices are N(0, 1 / inputs); gates of Gated DeltaNet start at decays between fast and slow; norms near 1.
    Ranks that hold the same part of a parameter must agree, so each is seeded by what a checkpoint would fill it with.
    """
    contents = plan_for(model).contents()
    for name, parameter in model.named_parameters():
        digest = hashlib.blake2b(f"{seed}:{name}:{contents[name]}".encode(), digest_size=7).digest()
        generator = torch.Generator(parameter.device)
        generator.manual_seed(int.from_bytes(digest, "little"))
        if name.endswith("A_log"):
            parameter.uniform_(math.log(0.01), math.log(16.0), generator=generator)
        elif name.endswith("dt_bias"):
            parameter.uniform_(-4.0, 1.0, generator=generator)
        elif parameter.dim() == 1:
            parameter.normal_(0.0, 0.1, generator=generator)
            if name.endswith("mixer.norm.weight"):
                parameter.add_(1.0)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
