"""What a test rank does with a layout: open a session over the pool's ranks, maybe break something in it, generate."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from core_torch import session as session_module
from core_torch.batch import Batch
from core_torch.kernels import selftest
from core_torch.kernels.allreduce import ReduceGroup, all_reduce
from core_torch.kernels.buffers import ReferenceBuffers
from core_torch.kernels.workspace import Workspace
from core_torch.layers.head_exchange import HeadExchange
from core_torch.layers.mlp import Experts, SparseMoE
from core_torch.layers.norm import RMSNorm
from core_torch.parallel import open_parallel
from core_torch.partial_sum import PartialSum
from core_torch.pieces import Peers, Pieces
from core_torch.runner import ModelRunner
from core_torch.session import Session, SessionSpec, open_session
from shared_config import (
    FlashInferInfo,
    FusionDecision,
    FusionRequest,
    FusionWarning,
    ParallelLayout,
    Qwen3NextConfig,
)
from shared_config.generation import Request
from shared_config.limits import PairLimit
from shared_config.results import RequestOutput
from shared_config.sampling import SamplingParams
from shared_config.settings import EngineSettings

SEED = 7
Fault = Callable[[ModelRunner], contextlib.AbstractContextManager[object]]


@dataclass
class LayoutRun:
    """What a rank got: its outputs on rank 0, a digest of them on every rank. `fused`: it had its workspaces."""

    decision: FusionDecision
    fused: bool
    digest: str
    outputs: list[RequestOutput] = field(default_factory=list)


def params(max_tokens: int, count: int) -> list[SamplingParams]:
    """For `count` prompts. Logits of all rows are wanted for the second, so in one step of several; the third draws."""
    common = SamplingParams(
        temperature=0, seed=SEED, max_tokens=max_tokens, ignore_eos=True, return_logits=True
    )
    changes = {1: {"prompt_logprobs": True}, 2: {"temperature": 1.0}}
    return [replace(common, **changes.get(i, {})) for i in range(count)]


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
    each = params(max_tokens, len(prompts))
    requests = [Request(i, None, ids, each[i], SEED) for i, ids in enumerate(prompts)]
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


@contextlib.contextmanager
def layout_fault(name: str, runner: ModelRunner) -> Iterator[None]:
    """Fault `name` in this rank's model; inside it the layout is wrong."""
    parallel = runner.parallel
    layers: list[Any] = [*runner.model.layers]
    attention, mlp = parallel.attention, parallel.mlp
    moes = [layer.mlp for layer in layers if isinstance(layer.mlp, SparseMoE)]
    scatter, pay = Pieces.scatter, RMSNorm.pay

    def taken(self: Pieces, owed: PartialSum, batch: Batch, *, reduced: bool, piece: int) -> PartialSum:
        part = all_reduce(owed.take(), group=owed.group) if reduced else owed.take()
        size = (self.decode if batch.is_decode else self.prefill).size
        return PartialSum(part.chunk(size)[piece % size], self.paid)

    def scatter_like(**change: Any) -> Any:
        here = {"reduced": True, "piece": parallel.pieces.prefill.rank}
        return lambda self, owed, batch: taken(self, owed, batch, **{**here, **change})

    def owed_again(self: Pieces, owed: PartialSum, batch: Batch) -> PartialSum:
        return PartialSum(scatter(self, owed, batch).take(), owed.group)

    def pay_twice(self: RMSNorm, owed: PartialSum, residual: torch.Tensor) -> Any:
        pay(self, owed, residual)
        return pay(self, owed, residual)

    def pay_nothing(self: RMSNorm, owed: PartialSum, residual: torch.Tensor) -> Any:
        return pay(self, PartialSum(owed.take(), parallel.pieces.paid), residual)

    def drop(self: Pieces, owed: PartialSum, batch: Batch) -> PartialSum:
        return PartialSum(torch.zeros(len(batch.token_ids), runner.config.hidden_size), owed.group)

    def owe(modules: list[Any], group: ReduceGroup) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        for module in modules:
            stack.enter_context(mock.patch.object(module, "group", group))
        return stack

    def flipped(x: torch.Tensor) -> torch.Tensor:
        return exchange(x).flip(0)

    experts = [moe.experts for moe in moes]
    downs = [module for layer in layers for name, module in layer.mlp.named_modules() if "down_proj" in name]
    exchange = functools.partial(Peers.all_to_all, parallel.pieces.context)
    shared = SparseMoE._shared
    faults: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
        "attention's sum over the MoE group": lambda: owe([layer.mixer.out_proj for layer in layers], mlp),
        "the MoE's sum over the attention group": lambda: owe([*experts, *downs], attention),
        "the experts' sum over the attention group": lambda: owe(experts, attention),
        "the gather is forgotten": lambda: mock.patch.multiple(
            Pieces, gather=lambda self, x, batch: x, scatter=lambda self, owed, batch: owed
        ),
        "another piece's rows are taken": lambda: mock.patch.object(
            Pieces, "scatter", scatter_like(piece=parallel.pieces.prefill.rank + 1)
        ),
        "paid twice": lambda: mock.patch.object(Pieces, "scatter", owed_again),
        "paid twice by the norm": lambda: mock.patch.object(RMSNorm, "pay", pay_twice),
        "paid never": lambda: mock.patch.object(Pieces, "scatter", scatter_like(reduced=False)),
        "paid never by the norm": lambda: mock.patch.object(RMSNorm, "pay", pay_nothing),
        "a debt is dropped": lambda: mock.patch.object(Pieces, "scatter", drop),
        "every rank has the first experts": lambda: first_experts(experts),
        "the shared expert is summed by every rank": lambda: mock.patch.object(
            SparseMoE, "_shared", lambda self, x: PartialSum(shared(self, x).take() * mlp.size, mlp)
        ),
        "pieces arrive in another order": lambda: mock.patch.object(
            Peers, "all_to_all", lambda self, x: flipped(x) if x.shape[-1] > x.shape[0] else exchange(x)
        ),
        "heads come back in another order": lambda: mock.patch.object(
            HeadExchange, "to_rows", lambda self, out, batch: to_rows(self, out, batch).roll(8, -1)
        ),
    }
    to_rows = HeadExchange.to_rows
    with faults[name]():
        yield


@contextlib.contextmanager
def first_experts(experts: list[Experts]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for layer in experts:
            stack.enter_context(mock.patch.object(layer, "first", 0))
        yield


@dataclass
class Started:
    """What start-up did on a rank: the groups whose self-test ran, and whether both sides share a workspace."""

    enabled: bool
    reason: str
    tested: list[tuple[int, ...]]
    shared: bool
    all_closed: bool


def start_groups(
    decision: FusionDecision, failing_rank: int = -1, failing_group: tuple[int, ...] = ()
) -> Started:
    """Open the groups of a decision's layout; `failing_rank` cannot create the workspace of `failing_group`."""
    tested: list[tuple[int, ...]] = []
    made: list[Workspace] = []
    run, create, opened = selftest.run, ReferenceBuffers.create, Workspace.__init__

    def tested_run(buffers: Any, cases: Any, world_size: int) -> None:
        run(buffers, cases, world_size)
        tested.append(tuple(dist.get_process_group_ranks(buffers._group)))

    def failing_create(self: ReferenceBuffers, max_tokens: int, comm: Any) -> None:
        if tuple(dist.get_process_group_ranks(self._group)) == failing_group:
            raise RuntimeError("injected")
        create(self, max_tokens, comm)

    def noted(self: Workspace, *args: Any, **kwargs: Any) -> None:
        opened(self, *args, **kwargs)
        made.append(self)

    with (
        mock.patch.object(selftest, "run", tested_run),
        mock.patch.object(
            ReferenceBuffers, "create", failing_create if dist.get_rank() == failing_rank else create
        ),
        mock.patch.object(Workspace, "__init__", noted),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FusionWarning)
        device = torch.device("cpu")
        with open_parallel(
            decision, decision.layout, FlashInferInfo(), device=device, dtype=torch.float32, max_tokens=8
        ) as parallel:
            attention, mlp = parallel.attention.workspace, parallel.mlp.workspace
            open_ones = {id(w) for w in (attention, mlp) if w is not None}
            assert open_ones == {id(w) for w in made if w.sufficient(1)}
    return Started(
        enabled=parallel.decision.enabled,
        reason=parallel.decision.reason,
        tested=tested,
        shared=attention is not None and attention is mlp,
        all_closed=not any(workspace.sufficient(1) for workspace in made),
    )


def trade(layout: ParallelLayout) -> dict[str, Any]:
    """What a rank gets from its context-parallel peers, to whom it gives its global rank."""
    decision = FusionDecision(
        False,
        "unfused",
        "",
        "",
        (),
        (),
        "off",
        False,
        1,
        "",
        PairLimit(0, 0, ""),
        hidden_size=64,
        layout=layout,
    )
    device = torch.device("cpu")
    with open_parallel(decision, layout, FlashInferInfo(), device=device, dtype=torch.float32) as parallel:
        peers = parallel.pieces.context
        mine = torch.full((2,), float(dist.get_rank()))
        sent = torch.stack([torch.tensor([float(dist.get_rank()), place]) for place in range(peers.size)])
        return {
            "ranks": peers.ranks,
            "place": peers.rank,
            "gathered": peers.all_gather(mine).tolist(),
            "traded": peers.all_to_all(sent).tolist(),
            "summed": peers.sum(mine).tolist(),
        }
