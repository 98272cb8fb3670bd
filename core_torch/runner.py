"""One rank's model and cache: runs a step of the scheduler, samples, and says what ran fused."""

from __future__ import annotations

import sys
from itertools import accumulate
from pathlib import Path

import torch

from core_torch.batch import build_prefill, pack_decode, unpack_decode
from core_torch.cache import KVCache, StateCache, cache_bytes, make_cache
from core_torch.graphs import DecodeGraphs
from core_torch.kernels.choice import KernelOptions, choose_kernels, describe
from core_torch.models.qwen3_next import Qwen3Next
from core_torch.parallel import Parallel
from core_torch.sampler import sample_sequences
from core_torch.weights import fill_dummy, load_checkpoint, materialize
from shared_config import Qwen3NextConfig
from shared_config.generation import Launched, StepResult, is_greedy
from shared_config.placement import Placement, place_step
from shared_config.results import Reductions
from shared_config.scheduler import Step
from shared_config.settings import EngineSettings

# Steps whose reductions let the next kernel start early: its weights are on their way meanwhile. All kernels of a step
# wait for what they read (csrc/device.cuh), and on 2x H200 the bits are the same; more tokens gain nothing.
MAX_EARLY_TOKENS = 32


class ModelRunner:
    """Loads the weights, sizes the cache, runs steps."""

    def __init__(
        self, config: Qwen3NextConfig, parallel: Parallel, settings: EngineSettings, dtype: torch.dtype
    ) -> None:
        self.config, self.parallel, self.settings = config, parallel, settings
        with torch.device("meta"):
            self.model = Qwen3Next(config, parallel.attention, parallel.mlp, parallel.pieces)
        materialize(self.model, dtype, parallel.device)
        if settings.load_format == "dummy":
            fill_dummy(self.model, seed=settings.seed)
        else:
            load_checkpoint(self.model, Path(settings.model), progress=parallel.rank == 0)
        self.kernels = choose_kernels(
            [*self.model.modules(), parallel.attention, parallel.mlp, parallel.pieces.paid],
            KernelOptions(dtype, parallel.device, settings.max_num_seqs, compiled=settings.kernels == "auto"),
        )
        for group in (parallel.attention, parallel.mlp):
            if group.workspace is not None:
                group.workspace.max_early_tokens = MAX_EARLY_TOKENS
        self.num_pages = settings.num_pages or self._affordable_pages(dtype)
        self.cache = make_cache(
            config,
            head_shares=parallel.layout.head_shares,
            num_pages=self.num_pages,
            page_size=settings.page_size,
            num_slots=settings.max_num_seqs,
            dtype=dtype,
            device=parallel.device,
        )
        self.max_pages = -(-settings.max_model_len // settings.page_size)
        self.graphs: DecodeGraphs | None = None
        if settings.cuda_graphs and parallel.device.type == "cuda":
            self.graphs = DecodeGraphs(self.model, self.cache, parallel, settings, self.max_pages)
        self.memory = self._describe_memory()
        if parallel.device.type == "cuda" and parallel.rank == 0:
            print(
                f"crossfuse: kernels {describe(self.kernels)}\ncrossfuse: {self.memory}",
                file=sys.stderr,
                flush=True,
            )

    def _describe_memory(self) -> str:
        """One line: where this rank's memory is."""
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        pages = sum(
            x.nbytes for cache in self.cache if isinstance(cache, KVCache) for x in (cache.k, cache.v)
        )
        states = sum(
            x.nbytes
            for cache in self.cache
            if isinstance(cache, StateCache)
            for x in (cache.conv, cache.recurrent)
        )
        gib = 2**30
        text = (
            f"memory of rank {self.parallel.rank}: weights {weights / gib:.1f} GiB, {self.num_pages} KV pages "
            f"({self.num_pages * self.settings.page_size} tokens) {pages / gib:.1f} GiB, "
            f"{self.settings.max_num_seqs} states {states / gib:.1f} GiB"
        )
        if self.parallel.device.type != "cuda":
            return text
        free, total = torch.cuda.mem_get_info(self.parallel.device)
        return f"{text}, {free / gib:.1f} of {total / gib:.1f} GiB free"

    def _affordable_pages(self, dtype: torch.dtype) -> int:
        """Enough pages for every slot at max_model_len, or what fits into the memory that is left."""
        s = self.settings
        wanted = s.max_num_seqs * -(-s.max_model_len // s.page_size)
        if self.parallel.device.type != "cuda":
            return wanted
        page, slot = cache_bytes(
            self.config,
            head_shares=self.parallel.layout.head_shares,
            page_size=s.page_size,
            itemsize=dtype.itemsize,
        )
        free, total = torch.cuda.mem_get_info(self.parallel.device)
        budget = free - int(total * (1 - s.memory_fraction)) - (s.max_num_seqs + 1) * slot
        fits = min(self.parallel.comm.allgather(budget // max(page, 1)))
        if fits < 1:
            raise MemoryError(
                f"no memory is left for the KV cache: {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free after the "
                f"weights; raise memory_fraction={s.memory_fraction}, lower max_num_seqs, or use more ranks"
            )
        return min(wanted, fits)

    def run(self, step: Step) -> StepResult:
        """Run the model over `step`'s tokens and sample where a chunk ends its prompt or decodes."""
        return self.launch(step).wait()

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """Start `step`; it may still run when this returns, if `queues(step)`."""
        if not self.queues(step):
            return Launched.ended(self._run(step))
        assert self.graphs is not None
        before = self._reductions()
        tokens = self.graphs.launch(self._placed(step))
        after = self._reductions()
        ran = Reductions(after.fused - before.fused, after.unfused - before.unfused)
        return Launched(lambda: StepResult(tokens.wait(), ran))

    def queues(self, step: Step) -> bool:
        """Whether the step leaves its tokens on the device, so that the next step need not wait for them."""
        return self.graphs is not None and not step.prefill and is_greedy(step)

    def _run(self, step: Step) -> StepResult:
        before = self._reductions()
        prompt_logprobs: list[list[float]] = []
        if step.prefill:
            logits, prompt_logprobs = self._prefill(step)
        else:
            logits = self._decode(step)
        after = self._reductions()
        sampling = [chunk for chunk in step.chunks if chunk.samples]
        tokens: list[int] = []
        if sampling:
            chosen = sample_sequences(logits, [chunk.sequence for chunk in sampling])
            tokens = self.parallel.broadcast_tokens(chosen).tolist()
        wants_logits = any(chunk.sequence.params.return_logits for chunk in sampling)
        return StepResult(
            tokens=tokens,
            reductions=Reductions(after.fused - before.fused, after.unfused - before.unfused),
            # A copy: the next step writes where a graph's logits are.
            logits=list(logits.cpu().numpy().copy()) if wants_logits else None,
            prompt_logprobs=prompt_logprobs,
        )

    def _prefill(self, step: Step) -> tuple[torch.Tensor, list[list[float]]]:
        """(logits of the rows that sample, prompt log-probabilities where asked for)."""
        all_logits = any(chunk.sequence.params.prompt_logprobs for chunk in step.chunks)
        if all_logits:
            wanted = [
                (i, offset) for i, chunk in enumerate(step.chunks) for offset in range(chunk.num_tokens)
            ]
        else:
            wanted = [(i, chunk.num_tokens - 1) for i, chunk in enumerate(step.chunks) if chunk.samples]
        batch = build_prefill(
            place_step(step, self.parallel.layout),
            self.parallel.place,
            wanted,
            page_size=self.settings.page_size,
            device=self.parallel.device,
        )
        logits = self.model(batch, self.cache)
        if not all_logits:
            return logits, []
        ends = accumulate(chunk.num_tokens for chunk in step.chunks)
        last = [end - 1 for end, chunk in zip(ends, step.chunks, strict=True) if chunk.samples]
        return logits[last], self._prompt_logprobs(step, logits)

    def _decode(self, step: Step) -> torch.Tensor:
        """Logits, one row for each sequence. `deterministic` pins every shape: always all rows, all pages."""
        s, layout, placement = self.settings, self.parallel.layout, self._placed(step)
        if self.graphs is not None:
            logits = self.graphs.logits(placement)
        else:
            width = max(len(chunk.sequence.pages) for chunk in step.chunks)
            packed = pack_decode(
                placement.part(self.parallel.place.dp),
                page_size=s.page_size,
                rows=placement.pass_rows,
                pages=self.max_pages if s.deterministic else width,
            ).to(self.parallel.device)
            batch = unpack_decode(packed, self.parallel.place, layout.attn_dp_size)
            logits = self.model(batch, self.cache)
        if layout.attn_dp_size == 1:
            return logits[: len(step.chunks)]
        return logits[placement.decode_rows()]

    def _placed(self, step: Step) -> Placement:
        """A decode step's rows, in a shape that was captured."""
        pinned = self.settings.max_num_seqs if self.settings.deterministic else 0

        def round_up(rows: int) -> int:
            return max(rows, pinned) if self.graphs is None else self.graphs.bucket(rows)

        return place_step(step, self.parallel.layout, round_up=round_up)

    @staticmethod
    def _prompt_logprobs(step: Step, logits: torch.Tensor) -> list[list[float]]:
        """For each chunk, the log-probabilities of the prompt tokens after its rows; logits [T, V] of all rows."""
        found = []
        counts = [chunk.num_tokens for chunk in step.chunks]
        for chunk, rows in zip(step.chunks, logits.split(counts), strict=True):
            following = chunk.sequence.prompt[chunk.start + 1 : chunk.start + chunk.num_tokens + 1]
            targets = torch.tensor(following, dtype=torch.int64, device=logits.device)
            values = rows[: len(following)].log_softmax(-1).gather(-1, targets[:, None])
            found.append(values[:, 0].tolist())
        return found

    def close(self) -> None:
        """Drop the graphs, before the process group goes: NCCL waits for the graphs that hold its kernels."""
        if self.graphs is not None:
            self.graphs.close()
            self.graphs = None

    def _reductions(self) -> Reductions:
        counts = {
            id(group.counts): group.counts for group in (self.parallel.attention, self.parallel.mlp)
        }.values()
        return Reductions(sum(c.fused for c in counts), sum(c.unfused for c in counts))
