"""Exporting functions with fused reductions (`jax.export`)."""

from __future__ import annotations

import jax

from jax_bridge.communicator import Communicator


def export_checks(comm: Communicator) -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export(..., disabled_checks=export_checks(comm))` needs for `comm`'s custom calls.

    An exported function names its communicator by `comm.id`. Before it is called, possibly in another process, a
    communicator with that id, on an equal mesh, must be open: opened in the same place in the same order.
    """
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in comm.targets]
