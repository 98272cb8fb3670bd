"""Which kernels a model's layers run: each layer asks once, after its weights have their place, and keeps the answer.

`deterministic` allows all of them. In a kernel for decode steps, what a row computes and the order in which it is
summed depend on that row and on the model's sizes alone, never on the batch, the launch or the padding (the GPU tests
compare bits), so a sequence has the same bits alone and in any batch. The kernels of prefill choose tiles by the number
of tokens of a pass; there those are one sequence's, cut the same way every time. No kernel tunes itself or adds
atomically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from core_torch.kernels import native

Answers = dict[str, native.Answer]  # by the name of the module in csrc or jit


@dataclass(frozen=True)
class KernelOptions:
    """What every layer's question has in common. `compiled=False` is the user's no."""

    dtype: torch.dtype
    device: torch.device
    max_num_seqs: int
    compiled: bool = True

    def ask(self, name: str, check: Callable[..., native.Answer], **shapes: Any) -> native.Answer:
        """`check` of the module `name` for these shapes; a module that cannot be had is as good as none."""
        if not self.compiled:
            return native.Answer(False, "kernels='plain' was asked for")
        answer = check(**shapes, dtype=self.dtype, device=self.device)
        compiled_ahead = name in native.MODULES
        return native.check_library(name, self.device) if answer.usable and compiled_ahead else answer


@runtime_checkable
class Chooser(Protocol):
    """A layer with compiled kernels."""

    def choose_kernels(self, options: KernelOptions) -> Answers:
        """Ask for this layer's shapes and keep the answers."""
        ...


@runtime_checkable
class WarmsUp(Protocol):
    """A layer with kernels that are compiled on their first call."""

    def warm_up(self, device: torch.device) -> None:
        """Call each once for every choice of its sizes, on inputs that mean nothing."""
        ...


NOT_ASKED = native.Answer(False, "no kernels were chosen for this model")


def choose_kernels(layers: Iterable[object], options: KernelOptions) -> Answers:
    """Let every layer choose; layers of one kind have the same shapes, and so the same answers.

    What is compiled on its first call is compiled now, not under the first prompt.
    """
    answers: Answers = {}
    warm: set[type] = set()
    for layer in layers:
        if isinstance(layer, Chooser):
            answers |= layer.choose_kernels(options)
        if options.device.type != "cpu" and isinstance(layer, WarmsUp) and type(layer) not in warm:
            layer.warm_up(options.device)
            warm.add(type(layer))
    return answers


def describe(answers: Answers) -> str:
    """One line: what is compiled, and why the rest is not."""
    names = sorted(answers)
    compiled = [name for name in names if answers[name].usable]
    reasons: dict[str, list[str]] = {}
    for name in names:
        if not answers[name].usable:
            reasons.setdefault(answers[name].reason, []).append(name)
    parts = [f"compiled: {', '.join(compiled)}"] if compiled else []
    parts += [f"plain: {', '.join(names)} ({reason})" for reason, names in reasons.items()]
    return "; ".join(parts)
