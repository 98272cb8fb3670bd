"""Hugging Face transformers under `drive.py`: what a user would otherwise run, on one device, as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any

import torch
import transformers

from bench.codec import from_plain, to_plain
from bench.drive import decode_steps, measure
from bench.result import ModelPart, ModelSpec
from shared_config.results import Reductions
from shared_config.scheduler import Sequence, Step

UNLIMITED_TOKENS = 1 << 30  # it takes all prompts in one pass


def run(plain: dict[str, Any]) -> dict[str, Any]:
    """The part of `launch.run_part`; plain: spec (ModelSpec), folder (the checkpoint's)."""
    spec = replace(from_plain(ModelSpec, plain["spec"]), max_step_tokens=UNLIMITED_TOKENS)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = _load(spec, plain["folder"])
    with torch.inference_mode():
        return to_plain(ModelPart(tuple(measure(TransformersEngine(model, spec), spec)), None))


def _load(spec: ModelSpec, folder: str) -> Any:
    """The checkpoint's model, or one with random weights of its shapes, made on the device."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if spec.load_format == "safetensors":
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model.to(spec.device).eval()
    config = transformers.AutoConfig.for_model(**spec.hf_config)
    with torch.device(spec.device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class TransformersEngine:
    """See `drive.Engine`. Its cache knows one batch at a time: the one that was prefilled last."""

    framework = "transformers"
    modes = ("none",)
    is_first_rank = True

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        self._model, self._top_k = model, spec.config.num_experts_per_tok
        self._device = torch.device(spec.device)
        self._cache: Any = None

    def _pass(self, step: Step, **options: Any) -> Any:
        """All sequences of a step have as many tokens."""
        rows = [
            chunk.sequence.prompt if step.prefill else chunk.sequence.output[-1:] for chunk in step.chunks
        ]
        answer = self._model(
            input_ids=torch.tensor(rows, device=self._device),
            past_key_values=None if step.prefill else self._cache,
            use_cache=True,
            logits_to_keep=1,
            **options,
        )
        self._cache = answer.past_key_values
        answer.logits[:, -1].argmax(-1).tolist()  # a user waits for the tokens
        return answer

    def run(self, mode: str, steps: Iterable[Step]) -> Reductions:
        del mode
        for step in steps:
            self._pass(step)
        return Reductions()

    def decode(
        self, mode: str, sequences: list[Sequence], tokens: SequenceOf[SequenceOf[int]]
    ) -> tuple[list[float], Reductions]:
        del mode
        samples = []
        for step in decode_steps(sequences, tokens):
            start = time.perf_counter()
            self._pass(step)
            samples.append((time.perf_counter() - start) * 1e6)
        return samples, Reductions()

    def touched_experts(self, steps: Iterable[Step]) -> list[list[set[int]]]:
        passes = []
        for step in steps:
            answer = self._pass(step, output_router_logits=True)
            chosen = [logits.topk(self._top_k, dim=-1).indices for logits in answer.router_logits]
            passes.append([set(experts.flatten().tolist()) for experts in chosen])
        return passes

    def communication_share(self, mode: str, action: Callable[[], object]) -> float | None:
        """There is no other rank to talk to."""

    def expected_fused(self, mode: str, num_tokens: int) -> int:
        del mode, num_tokens
        return 0

    def meet(self) -> None:
        """There is one rank."""

    def gather(self, samples: list[float]) -> list[list[float]]:
        return [samples]
