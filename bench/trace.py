"""The share of a step that goes into communication, from torch's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# NCCL's and FlashInfer's kernels (whose one kernel is also the add and the norm), and gloo's spans on CPU.
COMMUNICATION = re.compile(r"nccl|all_?reduce|all_?gather|^gloo:", re.IGNORECASE)

Span = tuple[float, float]


def communication_share(action: Callable[[], object], *, on_gpu: bool) -> float | None:
    """Of the time that `action()` keeps this rank's device busy, the part in which communication runs, 0 to 1.

    On CPU, where ranks talk in threads beside the one that computes, of all the time it takes. None when nothing was
    recorded.
    """
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        action()
        if on_gpu:
            torch.cuda.synchronize()
    device = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in recorded.events() or () if event.device_type == device]
    spans = [((event.time_range.start, event.time_range.end), event.name) for event in events]
    if on_gpu:
        total = covered(span for span, _ in spans)
        talking = covered(span for span, name in spans if COMMUNICATION.search(name))
    else:
        total = max((end for (_, end), _ in spans), default=0) - min(
            (start for (start, _), _ in spans), default=0
        )
        talking = covered(span for span, name in spans if name.startswith("gloo:"))
    return talking / total if total > 0 else None


def covered(spans: Iterable[Span]) -> float:
    """The length of the union of `spans`, which may overlap."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
