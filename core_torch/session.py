"""One rank's engine from start to end: decision, groups, model, and the requests that it is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from core_torch.parallel import open_parallel, rank_device
from core_torch.runner import ModelRunner
from shared_config import (
    FusionDecision,
    FusionRequest,
    ParallelLayout,
    Qwen3NextConfig,
    probe_flashinfer,
    probe_hardware,
    resolve_fusion,
)
from shared_config.generation import Generation, Request, Tokenizer, load_tokenizer, make_scheduler
from shared_config.results import RequestOutput
from shared_config.settings import EngineSettings


@dataclass(frozen=True)
class SessionSpec:
    """Everything that a rank needs to know; the same on every rank, and picklable."""

    config: Qwen3NextConfig
    layout: ParallelLayout
    request: FusionRequest
    settings: EngineSettings
    device: str  # "cpu" or "cuda"
    tokenizer_file: str | None


class Session:
    """A loaded model that generates. Every rank is given the same requests in the same order."""

    def __init__(self, spec: SessionSpec, runner: ModelRunner, tokenizer: Tokenizer | None) -> None:
        self.spec, self.runner, self.tokenizer = spec, runner, tokenizer
        self.decision: FusionDecision = runner.parallel.decision
        self.kernels = runner.kernels
        self.scheduler = make_scheduler(spec.settings, runner.num_pages, spec.layout.attn_dp_size)

    def generate(self, requests: list[Request]) -> Iterator[list[RequestOutput]]:
        """After each step, the outputs that it changed."""
        generation = Generation(requests, self.scheduler, self.tokenizer, self.spec.config.eos_token_ids)
        return generation.run(self.runner)


@contextmanager
def open_session(spec: SessionSpec, local_rank: int) -> Iterator[Session]:
    """Probe this machine, resolve fusion (the ranks then compare their answers), load, and clean up at the end."""
    device = rank_device(local_rank, spec.device, spec.layout.tp_size)
    flashinfer = probe_flashinfer()
    config = spec.config
    if spec.settings.dtype != "auto":
        config = replace(config, dtype=spec.settings.dtype)
    decision = resolve_fusion(config, spec.layout, probe_hardware(), flashinfer, spec.request)
    dtype: torch.dtype = getattr(torch, config.dtype)
    largest = max(spec.settings.max_step_tokens, spec.settings.max_num_seqs)
    with open_parallel(
        decision, spec.layout, flashinfer, device=device, dtype=dtype, max_tokens=largest
    ) as parallel:
        runner = ModelRunner(config, parallel, spec.settings, dtype)
        try:
            yield Session(spec, runner, load_tokenizer(spec.tokenizer_file))
        finally:
            runner.close()
