"""The one place that touches JAX's private handle on the coordination service of `jax.distributed`.

The service keeps a key-value store of bytes. It has no public Python API (jax 0.10 to 0.12), so whatever changes
there changes here only.
"""

from __future__ import annotations

import time
from typing import Protocol

import jax


class KeyValueStore(Protocol):
    """What is needed of the store. Keys are never used twice."""

    def put(self, key: str, value: bytes) -> None: ...

    def get(self, key: str, timeout_s: float) -> bytes:
        """The value, as soon as somebody has put it; TimeoutError when nobody does."""
        ...

    def delete(self, key: str) -> None: ...


class CoordinationStore:
    """`KeyValueStore` over the service that `jax.distributed.initialize` connected to."""

    def __init__(self) -> None:
        from jax._src import distributed

        client = distributed.global_state.client
        if client is None:
            raise RuntimeError(
                f"the mesh has devices of {jax.process_count()} processes, but jax.distributed is not connected: "
                "call jax.distributed.initialize() first"
            )
        self._client = client

    def put(self, key: str, value: bytes) -> None:
        self._client.key_value_set_bytes(key, value)

    def get(self, key: str, timeout_s: float) -> bytes:
        started = time.monotonic()
        try:
            return self._client.blocking_key_value_get_bytes(key, int(timeout_s * 1000))
        except jax.errors.JaxRuntimeError as error:
            waited_s = time.monotonic() - started
            raise TimeoutError(f"no {key!r} after {waited_s:.1f} s: {error}") from error

    def delete(self, key: str) -> None:
        self._client.key_value_delete(key)
