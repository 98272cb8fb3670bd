"""`LLM`: generate text with Qwen3-Next over any number of devices of one process."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, overload

import jax.numpy as jnp

from core_torch.kernels.choice import Answers
from jax_bridge.parallel import choose_devices
from jax_bridge.session import Session, SessionSpec, open_session
from jax_bridge.weights import Weights, dummy_weights, load_checkpoint, take_torch_shards
from shared_config import FusionDecision, FusionRequest, ParallelLayout, Qwen3NextConfig
from shared_config.generation import Request, load_tokenizer
from shared_config.prompts import Prompt, build_requests
from shared_config.results import RequestOutput
from shared_config.sampling import SamplingParams
from shared_config.settings import EngineSettings

DECODE_STEPS = 8


class LLM:
    """A loaded model: `core_torch.LLM` in JAX. Use it as a context manager, or call `close`.

    model: a Hugging Face checkpoint folder. fusion "auto" | "on" | "off", deterministic, backend, allow_multicast and
    max_fused_bytes are the fusion request (`shared_config.FusionRequest`); the answer is in `llm.fusion`. Which kernels
    of `core_torch.kernels` are compiled, and why others are not, is in `llm.kernels`.
    device: "cuda" | "cpu" | "auto". decode_steps: how many greedy steps one program may run before the host looks
    (the tokens stay the same; a stream comes in bursts of that many). Further keywords are `EngineSettings`'.

    The ranks are tensor_parallel_size devices of this process; on CPU they are virtual, which JAX must be told before
    its first use (done here when nothing used it yet). attn_cp_size and attn_dp_size say how many of them attention
    puts to context and data parallelism, moe_dp_size and ep_size how many the MoE puts to data and expert parallelism
    (`shared_config.ParallelLayout`); the rest is tensor parallelism. Raises ValueError for bad arguments, FusionError
    when fusion="on" cannot be had.
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
        decode_steps: int = DECODE_STEPS,
        torch_ranks: Sequence[Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        folder = Path(model)
        self.config = Qwen3NextConfig.from_hf(folder)
        layout = ParallelLayout(
            tp_size=tensor_parallel_size,
            attn_cp_size=attn_cp_size,
            attn_dp_size=attn_dp_size,
            moe_dp_size=moe_dp_size,
            ep_size=ep_size,
        )
        layout.validate(self.config)
        if decode_steps < 1:
            raise ValueError(f"decode_steps must be at least 1, got {decode_steps}")
        engine = EngineSettings(str(folder), dtype=dtype, deterministic=deterministic, **settings)
        tokenizer_file = folder / "tokenizer.json"
        spec = SessionSpec(
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
            dtype=jnp.dtype(self.config.dtype if dtype == "auto" else dtype),
            devices=tuple(choose_devices(device, tensor_parallel_size)),
            decode_steps=decode_steps,
            tokenizer_file=str(tokenizer_file) if tokenizer_file.exists() else None,
        )
        self.tokenizer = load_tokenizer(spec.tokenizer_file)
        self._stack = ExitStack()
        weights = _weights(engine, self.config, torch_ranks)
        self._session: Session | None = self._stack.enter_context(open_session(spec, weights))
        self.fusion: FusionDecision = self._session.decision
        self.kernels: Answers = self._session.kernels

    @classmethod
    def from_torch(
        cls, model: str | os.PathLike[str], ranks: Sequence[Mapping[str, Any]], **options: Any
    ) -> LLM:
        """An LLM on the memory of live PyTorch parameters, for the config and tokenizer in the folder `model`.

        `ranks`: for each rank of a `core_torch` model its `named_parameters()` as a dict, detached, rank i's on GPU i.
        On GPUs nothing is copied, so the weights are held once, and writing to them changes both models. The dtype is
        the tensors'. `options` are the constructor's keywords.
        """
        if not ranks or "embed_tokens.weight" not in ranks[0]:
            raise ValueError(
                "ranks must hold the named_parameters() of each rank; embed_tokens.weight is missing"
            )
        dtype = str(ranks[0]["embed_tokens.weight"].dtype).removeprefix("torch.")
        return cls(model, len(ranks), dtype=dtype, torch_ranks=ranks, **options)

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
        Greedy tokens are exact; seeded ones are the same in every run, and in PyTorch up to rounding (`sampler`).
        """
        requests = build_requests(
            prompts,
            params,
            encode=self.encode,
            vocab_size=self.config.vocab_size,
            fresh_seed=lambda: int.from_bytes(os.urandom(7), "little"),
        )
        steps = self._run(requests)
        if stream:
            return (output for outputs in steps for output in outputs)
        final = {output.index: output for outputs in steps for output in outputs}
        return [final[i] for i in range(len(requests))]

    def _run(self, requests: list[Request]) -> Iterator[list[RequestOutput]]:
        if self._session is None:
            raise RuntimeError("this LLM is closed; make a new one")
        return self._session.generate(requests)

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`. Raises ValueError without a tokenizer.json."""
        if self.tokenizer is None:
            raise ValueError("the model folder has no tokenizer.json; give token ids instead of text")
        return self.tokenizer.encode(text).ids  # type: ignore[attr-defined]

    def close(self) -> None:
        """Close the communicator and give the memory back."""
        self._session = None
        self._stack.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _weights(
    settings: EngineSettings, config: Qwen3NextConfig, ranks: Sequence[Mapping[str, Any]] | None
) -> Weights:
    """Where the parameters come from."""
    if ranks is not None:
        return functools.partial(take_torch_shards, ranks=ranks)
    if settings.load_format == "dummy":
        return functools.partial(dummy_weights, seed=settings.seed)
    return functools.partial(load_checkpoint, config=config, folder=Path(settings.model), progress=True)
