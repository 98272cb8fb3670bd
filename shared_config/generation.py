"""The loop from requests to text, for either framework: schedule a step, run it, hand out its tokens.

Every rank runs this loop over the same requests and sees the same sampled tokens, so all ranks take the same steps
without talking about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from shared_config.results import Reductions, RequestOutput
from shared_config.sampling import SamplingParams
from shared_config.scheduler import Scheduler, Sequence, Step
from shared_config.settings import EngineSettings


@dataclass(frozen=True)
class Request:
    """A prompt (its text only if it came as text), how to continue it, and the seed that its draws come from."""

    index: int
    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    seed: int


@dataclass
class StepResult:
    """What a step gave: a token for each chunk that samples, the norm reductions that ran, and what was asked for:
    the logits [V] of each sampling chunk, and the log-probabilities of each chunk's following prompt tokens."""

    tokens: list[int]
    reductions: Reductions
    logits: list[Any] | None = None
    prompt_logprobs: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Launched:
    """A step that may still be running; `wait` gives its result."""

    wait: Callable[[], StepResult]

    @classmethod
    def ended(cls, result: StepResult) -> Launched:
        return cls(lambda: result)


class Runner(Protocol):
    """One rank's model."""

    def run(self, step: Step) -> StepResult: ...


@runtime_checkable
class QueueingRunner(Protocol):
    """A model that can start a step before the tokens of the step before it are known."""

    def launch(self, step: Step) -> Launched: ...

    def queues(self, step: Step) -> bool:
        """Whether the step after `step` may be launched while `step` runs, if it is of the same sequences."""
        ...


def is_greedy(step: Step) -> bool:
    """Whether every sequence that samples takes its best token, and none wants its logits."""
    return all(
        chunk.sequence.params.temperature == 0 and not chunk.sequence.params.return_logits
        for chunk in step.chunks
        if chunk.samples
    )


class Tokenizer(Protocol):
    """What is used of `tokenizers.Tokenizer`."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


class Generation:
    """One call of `generate`."""

    def __init__(
        self,
        requests: list[Request],
        scheduler: Scheduler,
        tokenizer: Tokenizer | None,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self.scheduler, self.tokenizer, self.eos_token_ids = scheduler, tokenizer, eos_token_ids
        self.outputs: dict[int, RequestOutput] = {}
        self._refused: list[RequestOutput] = []
        for request in requests:
            output = RequestOutput(request.index, request.prompt, request.token_ids)
            self.outputs[request.index] = output
            refusal = scheduler.refusal(len(request.token_ids), request.params)
            if refusal is not None:
                output.finish_reason, output.error = "refused", refusal
                self._refused.append(output)
            else:
                scheduler.add(Sequence(request.index, request.token_ids, request.params, request.seed))

    def run(self, runner: Runner) -> Iterator[list[RequestOutput]]:
        """After each step, the outputs that it changed. Refused requests come first; the others go on."""
        if self._refused:
            yield self._refused
        try:
            queueing = isinstance(runner, QueueingRunner)
            yield from self._queued(runner) if queueing else self._one_by_one(runner)
        finally:
            self.scheduler.reset()

    def _one_by_one(self, runner: Runner) -> Iterator[list[RequestOutput]]:
        while (step := self.scheduler.next_step()) is not None:
            result = runner.run(step)
            self.scheduler.advance(step)
            yield self._hand_out(step, result)

    def _queued(self, runner: QueueingRunner) -> Iterator[list[RequestOutput]]:
        """The same outputs; where the next step's sequences are known it is launched while this one runs.

        A sequence that ends by what it says is found out one step late: what it says in that step is nobody's.
        """
        step = self.scheduler.next_step()
        launched = None if step is None else runner.launch(step)
        while step is not None and launched is not None:
            self.scheduler.advance(step)
            following = self.scheduler.following(step) if runner.queues(step) else None
            ahead = None if following is None else runner.launch(following)
            yield self._hand_out(step, launched.wait())
            if following is None:
                following = self.scheduler.next_step()
                ahead = None if following is None else runner.launch(following)
            step, launched = following, ahead

    def _hand_out(self, step: Step, result: StepResult) -> list[RequestOutput]:
        tokens = iter(result.tokens)
        logits = iter(result.logits or ())
        changed = []
        for i, chunk in enumerate(step.chunks):
            sequence = chunk.sequence
            output = self.outputs[sequence.index]
            if output.finished:  # by the step before, which was not known when this one was launched
                next(tokens)
                continue
            output.reductions += result.reductions
            if sequence.params.prompt_logprobs and step.prefill:
                output.prompt_logprobs = (output.prompt_logprobs or []) + result.prompt_logprobs[i]
            if chunk.samples:
                sequence.output.append(next(tokens))
                output.token_ids = list(sequence.output)
                row = next(logits, None)
                if sequence.params.return_logits:
                    output.logits = [*(output.logits or []), row]
                self._finish_if_done(sequence, output)
                changed.append(output)
        return changed

    def _finish_if_done(self, sequence: Sequence, output: RequestOutput) -> None:
        params = sequence.params
        if self.tokenizer is not None:
            output.text = self.tokenizer.decode(sequence.output)
        if sequence.output[-1] in self.eos_token_ids and not params.ignore_eos:
            output.finish_reason = "stop"
        elif ends := [at for at in (output.text.find(stop) for stop in params.stop) if at >= 0]:
            output.text, output.finish_reason = output.text[: min(ends)], "stop"
        elif len(sequence.output) >= params.max_tokens:
            output.finish_reason = "length"
        if output.finished:
            self.scheduler.finish(sequence)


def load_tokenizer(file: str | None) -> Tokenizer | None:
    """The tokenizer of a tokenizer.json, or None without a file."""
    if file is None:
        return None
    from tokenizers import Tokenizer as HFTokenizer

    return HFTokenizer.from_file(file)


def make_scheduler(settings: EngineSettings, num_pages: int, attn_dp_size: int = 1) -> Scheduler:
    """The scheduler of an engine with these settings and `num_pages` KV pages for each attention-DP rank."""
    return Scheduler(
        num_pages=num_pages,
        page_size=settings.page_size,
        num_slots=settings.max_num_seqs,
        max_step_tokens=settings.max_step_tokens,
        max_model_len=settings.max_model_len,
        one_prefill_at_a_time=settings.deterministic,
        attn_dp_size=attn_dp_size,
    )
