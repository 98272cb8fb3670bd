"""`LLM`: generate text with Qwen3-Next over any number of ranks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch

from core_torch.kernels.choice import Answers
from core_torch.session import Session, SessionSpec, open_session
from core_torch.worker import WorkerGroup
from shared_config import FusionDecision, FusionRequest, FusionWarning, ParallelLayout, Qwen3NextConfig
from shared_config.generation import Request, load_tokenizer
from shared_config.prompts import Prompt, build_requests
from shared_config.results import RequestOutput
from shared_config.sampling import SamplingParams
from shared_config.settings import EngineSettings


class LLM:
    """A loaded model. Use it as a context manager, or call `close`.

    model: a Hugging Face checkpoint folder. fusion "auto" | "on" | "off", deterministic, backend, allow_multicast and
    max_fused_bytes are the fusion request (`shared_config.FusionRequest`); the answer is in `llm.fusion`. Which kernels
    of `core_torch.kernels` are compiled, and why others are not, is in `llm.kernels`.
    attn_cp_size, attn_dp_size, moe_dp_size and ep_size cut tensor_parallel_size (`shared_config.ParallelLayout`).
    device: "cuda" | "cpu" | "auto". Further keywords are `EngineSettings`' (dtype, max_num_seqs, max_model_len, ...).

    With tensor_parallel_size > 1 it starts that many worker processes, or, under torchrun with as many ranks, runs
    this rank in this process (every rank then makes the same calls). Raises ValueError for bad arguments, FusionError
    when fusion="on" cannot be had, RankFailure when a rank fails or dies.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        tensor_parallel_size: int = 1,
        fusion: Literal["auto", "on", "off"] = "auto",
        deterministic: bool = False,
        dtype: str = "auto",
        *,
        attn_cp_size: int = 1,
        attn_dp_size: int = 1,
        moe_dp_size: int = 1,
        ep_size: int = 1,
        device: str = "auto",
        backend: str = "auto",
        allow_multicast: bool = False,
        max_fused_bytes: int | None = None,
        **settings: Any,
    ) -> None:
        folder = Path(model)
        self.config = Qwen3NextConfig.from_hf(folder)
        layout = ParallelLayout(tensor_parallel_size, attn_cp_size, attn_dp_size, moe_dp_size, ep_size)
        layout.validate(self.config)
        engine = EngineSettings(str(folder), dtype=dtype, deterministic=deterministic, **settings)
        tokenizer_file = folder / "tokenizer.json"
        self._spec = SessionSpec(
            config=self.config,
            layout=layout,
            request=FusionRequest(
                mode=fusion,
                deterministic=deterministic,
                backend=backend,
                allow_multicast=allow_multicast,
                max_bytes=max_fused_bytes,
                own_kernels=engine.kernels != "plain",
            ),
            settings=engine,
            device=_choose_device(device, tensor_parallel_size),
            tokenizer_file=str(tokenizer_file) if tokenizer_file.exists() else None,
        )
        self.tokenizer = load_tokenizer(self._spec.tokenizer_file)
        self._workers: WorkerGroup | None = None
        self._session: Session | None = None
        self._stack = ExitStack()
        if tensor_parallel_size == 1:
            self._session = self._stack.enter_context(open_session(self._spec, local_rank=0))
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            self._session = self._stack.enter_context(open_session(self._spec, int(os.environ["LOCAL_RANK"])))
        else:
            self._workers = WorkerGroup(partial(open_session, self._spec), tensor_parallel_size)
            self._stack.callback(self._workers.close)
        started = self._workers or self._session
        assert started is not None
        self.fusion: FusionDecision = started.decision
        self.kernels: Answers = started.kernels
        for warning in self.fusion.warnings:
            warnings.warn(warning, FusionWarning, stacklevel=2)

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        stream: Literal[False] = False,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[True],
    ) -> Iterator[RequestOutput]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        stream: bool = False,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Continue each prompt (text or token ids). One `params` for all, or one for each.

        Returns the outputs in the prompts' order; with `stream=True` an iterator that gives an output each time that
        it has grown. A request that can never run has finish_reason "refused" and says why; the others go on.
        """
        requests = build_requests(
            prompts,
            params,
            encode=self.encode,
            vocab_size=self.config.vocab_size,
            fresh_seed=self._fresh_seed,
        )
        steps = self._run(requests)
        if stream:
            return (output for outputs in steps for output in outputs)
        final = {output.index: output for outputs in steps for output in outputs}
        return [final[i] for i in range(len(requests))]

    def _run(self, requests: list[Request]) -> Iterator[list[RequestOutput]]:
        if self._session is not None:
            return self._session.generate(requests)
        if self._workers is not None and self._workers.pids:
            return self._workers.generate(requests)
        raise RuntimeError("this LLM is closed; make a new one")

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`. Raises ValueError without a tokenizer.json."""
        if self.tokenizer is None:
            raise ValueError(
                f"{self._spec.settings.model!r} has no tokenizer.json; give token ids instead of text"
            )
        return self.tokenizer.encode(text).ids  # type: ignore[attr-defined]

    def _fresh_seed(self) -> int:
        """A random seed; under torchrun all ranks must draw the same, so there it comes from rank 0."""
        seed = int.from_bytes(os.urandom(7), "little")
        if self._workers is None and self._session is not None:
            seed = self._session.runner.parallel.comm.bcast(seed, 0)
        return seed

    def close(self) -> None:
        """End the ranks and give their memory back."""
        self._session = None
        self._stack.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _choose_device(device: str, ranks: int) -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu" or "cuda", got {device!r}')
    if device == "cpu" or (device == "auto" and count == 0):
        return "cpu"
    if count < ranks:
        raise ValueError(
            f"tensor_parallel_size={ranks} needs {ranks} GPUs, this machine has {count}; use fewer ranks or "
            'device="cpu"'
        )
    return "cuda"
