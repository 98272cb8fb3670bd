"""What a test rank does with a layout: open a session over the pool's ranks, maybe break something in it, generate."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import numpy as np

from core_torch import session as session_module
from core_torch.runner import ModelRunner
from core_torch.session import Session, SessionSpec, open_session
from shared_config import FlashInferInfo, FusionDecision, FusionRequest, ParallelLayout, Qwen3NextConfig
from shared_config.generation import Request
from shared_config.results import RequestOutput
from shared_config.sampling import SamplingParams
from shared_config.settings import EngineSettings

Fault = Callable[[ModelRunner], contextlib.AbstractContextManager[object]]


@dataclass
class LayoutRun:
    """What a rank got: its outputs on rank 0, a digest of them on every rank. `fused`: it had its workspaces."""

    decision: FusionDecision
    fused: bool
    digest: str
    outputs: list[RequestOutput] = field(default_factory=list)


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, return_logits=True, prompt_logprobs=True
    )


def session_spec(
    folder: str, layout: ParallelLayout, request: FusionRequest, device: str = "cpu", **settings: object
) -> SessionSpec:
    options = {"max_step_tokens": 48, "max_num_seqs": 3, "max_model_len": 128, **settings}
    engine = EngineSettings(folder, **options)  # type: ignore[arg-type]
    return SessionSpec(Qwen3NextConfig.from_hf(folder), layout, request, engine, device, None)


def run_layouts(
    specs: list[SessionSpec], prompts: list[list[int]], max_tokens: int, fault: Fault | None = None
) -> list[LayoutRun]:
    """Every spec one after another on the ranks of a pool; one that may fuse a second time without its workspaces."""
    runs = []
    for spec in specs:
        with open_here(spec) as session, fault(session.runner) if fault else contextlib.nullcontext():
            runs.append(generate(session, prompts, max_tokens))
            if session.decision.enabled and fault is None:
                parallel = session.runner.parallel
                parallel.attention.workspace = parallel.mlp.workspace = None
                runs.append(generate(session, prompts, max_tokens))
    return runs


@contextlib.contextmanager
def open_here(spec: SessionSpec) -> Iterator[Session]:
    """A session on this rank of a pool. Without a GPU nothing of FlashInfer is used, and importing it takes long."""
    probe = mock.patch.object(session_module, "probe_flashinfer", FlashInferInfo)
    with (
        probe if spec.device == "cpu" else contextlib.nullcontext(),
        open_session(spec, local_rank=int(os.environ["RANK"])) as session,
    ):
        yield session


def generate(session: Session, prompts: list[list[int]], max_tokens: int) -> LayoutRun:
    requests = [Request(i, None, prompt, params(max_tokens), 0) for i, prompt in enumerate(prompts)]
    final = {o.index: o for outputs in session.generate(requests) for o in outputs}
    outputs = [final[i] for i in range(len(prompts))]
    digest = hashlib.blake2b(digest_size=8)
    for output in outputs:
        digest.update(np.stack(output.logits).tobytes())
        digest.update(np.array([*output.token_ids, *(output.prompt_logprobs or ())]).tobytes())
    parallel = session.runner.parallel
    return LayoutRun(
        decision=session.decision,
        fused=parallel.attention.workspace is not None or parallel.mlp.workspace is not None,
        digest=digest.hexdigest(),
        outputs=outputs if parallel.rank == 0 else [],
    )
