"""The PyTorch engine under `drive.py`: one rank, with its CUDA graphs captured once with the fused op and once without.

The engine's own runner is driven, step by step, as its scheduler would; nothing in it knows about the benchmark.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import Any

import torch

from bench.codec import from_plain, to_plain
from bench.drive import decode_steps, measure
from bench.result import ModelPart, ModelSpec
from bench.trace import communication_share
from core_torch.graphs import DecodeGraphs
from core_torch.kernels.choice import describe
from core_torch.layers.mlp import Experts
from core_torch.runner import ModelRunner
from core_torch.session import SessionSpec, open_session
from shared_config import ParallelLayout
from shared_config.generation import Launched
from shared_config.results import Reductions
from shared_config.scheduler import Sequence, Step


def run(plain: dict[str, Any]) -> dict[str, Any]:
    """The part of `launch.run_part`; plain: spec (ModelSpec), folder (the checkpoint's)."""
    spec = from_plain(ModelSpec, plain["spec"])
    session_spec = SessionSpec(
        config=spec.config,
        layout=ParallelLayout(tp_size=spec.tp),
        request=spec.fusion_request(),
        settings=spec.settings(plain["folder"]),
        device=spec.device,
        tokenizer_file=None,
    )
    with (
        open_session(session_spec, int(os.environ["LOCAL_RANK"])) as session,
        TorchEngine.open(session.runner) as engine,
    ):
        spec.check_pages(session.runner.num_pages)
        notes = (f"kernels {describe(session.kernels)}", session.runner.memory)
        return to_plain(ModelPart(tuple(measure(engine, spec)), session.decision, notes))


class TorchEngine:
    """See `drive.Engine`. Without its workspace a group reduces unfused: that is the difference between the modes."""

    framework = "torch"

    def __init__(self, runner: ModelRunner, unfused_graphs: DecodeGraphs | None) -> None:
        self._runner = runner
        self._groups = (runner.parallel.attention, runner.parallel.mlp)
        self._workspace = runner.parallel.attention.workspace
        self._graphs = {"on": runner.graphs, "none": runner.graphs, "off": unfused_graphs}
        self._on_gpu = runner.parallel.device.type == "cuda"
        self.modes = ("on", "off") if runner.parallel.world_size > 1 else ("none",)
        self.is_first_rank = runner.parallel.rank == 0

    @classmethod
    @contextmanager
    def open(cls, runner: ModelRunner) -> Iterator[TorchEngine]:
        graphs = None
        groups, workspace = (
            (runner.parallel.attention, runner.parallel.mlp),
            runner.parallel.attention.workspace,
        )
        if runner.graphs is not None and workspace is not None:
            for group in groups:
                group.workspace = None
            graphs = DecodeGraphs(
                runner.model, runner.cache, runner.parallel, runner.settings, runner.max_pages
            )
            for group in groups:
                group.workspace = workspace
        engine = cls(runner, graphs)
        try:
            yield engine
        finally:
            engine._use("on")
            if graphs is not None:
                graphs.close()

    def _use(self, mode: str) -> None:
        self._runner.graphs = self._graphs[mode]
        for group in self._groups:
            group.workspace = None if mode == "off" else self._workspace

    def run(self, mode: str, steps: Iterable[Step]) -> Reductions:
        self._use(mode)
        ran = Reductions()
        for step in steps:
            ran += self._runner.run(step).reductions
        if self._on_gpu:
            torch.cuda.synchronize()
        return ran

    def decode(
        self, mode: str, sequences: list[Sequence], tokens: SequenceOf[SequenceOf[int]]
    ) -> tuple[list[float], Reductions]:
        """A sample is the time from one step's tokens to the next one's; as when it generates, the engine queues a step
        while another runs."""
        samples, ran = [], Reductions()
        self._use(mode)
        running: Launched | None = None
        start = time.perf_counter()
        for step in itertools.chain(decode_steps(sequences, tokens), (None,)):
            launched = None if step is None else self._runner.launch(step)
            if running is not None:
                ran += running.wait().reductions
                now = time.perf_counter()
                samples.append((now - start) * 1e6)
                start = now
            running = launched
        return samples, ran

    def touched_experts(self, steps: Iterable[Step]) -> list[list[set[int]]]:
        """Outside CUDA graphs, where hooks run."""
        self._use(self.modes[-1])
        self._runner.graphs = None
        seen: list[torch.Tensor] = []

        def note(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            assert isinstance(module, Experts)
            experts = arguments[2]  # [T, K]; number N is the shared one, which every step touches
            seen.append(experts[experts < len(module.down_proj)])

        layers = [module for module in self._runner.model.modules() if isinstance(module, Experts)]
        hooks = [layer.register_forward_pre_hook(note) for layer in layers]
        passes = []
        try:
            for step in steps:
                seen.clear()
                self._runner.run(step)
                passes.append([set(experts.tolist()) for experts in seen])
        finally:
            for hook in hooks:
                hook.remove()
        return passes

    def communication_share(self, mode: str, action: Callable[[], object]) -> float | None:
        return None if mode == "none" else communication_share(action, on_gpu=self._on_gpu)

    def expected_fused(self, mode: str, num_tokens: int) -> int:
        if mode != "on":
            return 0
        itemsize = self._runner.model.embed_tokens.weight.element_size()
        fuses = [group.fuses(num_tokens, itemsize).fuses for group in self._groups]
        return self._runner.config.num_hidden_layers * sum(fuses)

    def meet(self) -> None:
        self._groups[0].comm.barrier()

    def gather(self, samples: list[float]) -> list[list[float]]:
        return list(self._groups[0].comm.allgather(samples))
