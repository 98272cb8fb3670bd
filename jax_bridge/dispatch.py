"""One Python thread at a time hands work to a communicator's devices.

Two threads that dispatch may reach device 0 in one order and device 1 in the other. Then the ranks are in different
reductions: a hang on GPUs, an error on CPU.
"""

from __future__ import annotations

import faulthandler
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")

dispatch_lock = threading.RLock()


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    """Ends the process, with the stacks of its threads on stderr, if the block takes longer: nothing else can end a
    thread that waits for a GPU which waits for a peer."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """`function` under the process's one dispatch lock: for jitted functions that several threads call.

    On GPUs the lock is held until the work is queued on every device, on CPU until it is done, since there
    nothing else keeps two programs apart.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with dispatch_lock:
            result = function(*args, **kwargs)
            if any(device.platform == "cpu" for leaf in jax.tree.leaves(result) for device in leaf.devices()):
                jax.block_until_ready(result)
            return result

    return call
