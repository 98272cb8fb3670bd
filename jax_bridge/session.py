"""The engine from start to end: decision, mesh, model, and the requests that it is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax.numpy as jnp

from jax_bridge.batch import MIN_PREFILL_ROWS, bucket
from jax_bridge.devices import Device
from jax_bridge.parallel import open_parallel
from jax_bridge.runner import ModelRunner
from jax_bridge.weights import Weights
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
    """Everything that is decided before the start."""

    config: Qwen3NextConfig
    layout: ParallelLayout
    request: FusionRequest
    settings: EngineSettings
    dtype: jnp.dtype
    devices: tuple[Device, ...]
    decode_steps: int
    tokenizer_file: str | None


class Session:
    """A loaded model that generates."""

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
def open_session(spec: SessionSpec, weights: Weights) -> Iterator[Session]:
    """Probe this machine, resolve fusion, load `weights`, and clean up at the end."""
    decision = resolve_fusion(spec.config, spec.layout, probe_hardware(), probe_flashinfer(), spec.request)
    largest = bucket(max(spec.settings.max_step_tokens, spec.settings.max_num_seqs), MIN_PREFILL_ROWS)
    with open_parallel(
        decision, spec.layout, devices=list(spec.devices), dtype=spec.dtype, max_tokens=largest
    ) as parallel:
        runner = ModelRunner(
            spec.config, parallel, spec.settings, spec.dtype, weights, decode_steps=spec.decode_steps
        )
        yield Session(spec, runner, load_tokenizer(spec.tokenizer_file))
