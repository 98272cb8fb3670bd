"""Small control messages between the ranks of a group: handles, votes, digests. Never tensors, never NCCL.

NCCL stays out so that nothing here can collide with the capture of a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch.distributed as dist

T = TypeVar("T")


class CommError(RuntimeError):
    """A rank of the group has ended, or gave no answer in time: the group can agree on nothing any more."""


@runtime_checkable
class CommBackend(Protocol):
    """What FlashInfer asks of a communicator (its own protocol of this name), and all that is used here.

    Ranks are local to the group: 0 to `Get_size() - 1`. Every method but the first two is collective.
    """

    def Get_rank(self) -> int: ...  # noqa: N802 (FlashInfer's names)

    def Get_size(self) -> int: ...  # noqa: N802

    def allgather(self, data: Any) -> tuple[Any, ...]:
        """Every rank's `data` (any picklable object), by rank."""
        ...

    def bcast(self, data: Any, root: int) -> Any:
        """Rank `root`'s `data`, on every rank."""
        ...

    def barrier(self) -> None: ...

    def Split(self, color: int, key: int) -> CommBackend:  # noqa: N802
        """The communicator of the ranks that gave the same `color`, ordered by `key`."""
        ...


class GlooComm:
    """`CommBackend` over a torch.distributed group with CPU tensors (gloo).

    A rank that dies closes its connections, so its peers get a `CommError` at once; a rank that lives but
    does not come costs the group's timeout.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """`group` is WORLD unless given. Raises ValueError where torch.distributed does not run."""
        group = dist.group.WORLD if group is None else group
        if group is None:
            raise ValueError("torch.distributed does not run: call init_process_group first")
        self._group = group

    def Get_rank(self) -> int:  # noqa: N802
        return dist.get_rank(self._group)

    def Get_size(self) -> int:  # noqa: N802
        return dist.get_world_size(self._group)

    def allgather(self, data: Any) -> tuple[Any, ...]:
        gathered: list[Any] = [None] * self.Get_size()
        self._call("allgather", lambda: dist.all_gather_object(gathered, data, group=self._group))
        return tuple(gathered)

    def bcast(self, data: Any, root: int) -> Any:
        # torch takes the source's rank in WORLD, and a sub-group's rank 0 is rarely WORLD's.
        source = dist.get_global_rank(self._group, root)
        message = [data]
        self._call("bcast", lambda: dist.broadcast_object_list(message, src=source, group=self._group))
        return message[0]

    def barrier(self) -> None:
        self._call("barrier", lambda: dist.barrier(group=self._group))

    def Split(self, color: int, key: int) -> GlooComm:  # noqa: N802
        """As `CommBackend.Split`; a `key` that reorders the ranks is refused."""
        members = sorted((k, rank) for rank, (c, k) in enumerate(self.allgather((color, key))) if c == color)
        ranks = [rank for _, rank in members]
        if ranks != sorted(ranks):
            raise ValueError(
                f"Split(color={color}): the keys reorder ranks {ranks}; give keys that rise with the rank"
            )
        global_ranks = [dist.get_global_rank(self._group, rank) for rank in ranks]
        # Only the members take part: the rest of WORLD does not know of this group.
        group = dist.new_group(global_ranks, backend="gloo", use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        return GlooComm(group)

    def _call(self, what: str, collective: Callable[[], T]) -> T:
        try:
            return collective()
        except RuntimeError as error:
            ranks = dist.get_process_group_ranks(self._group)
            raise CommError(
                f"{what} among ranks {ranks} failed on rank {dist.get_rank()}: a rank has ended "
                f"or gave no answer in time ({error})"
            ) from error


class SingleComm:
    """`CommBackend` of a group of one."""

    def Get_rank(self) -> int:  # noqa: N802
        return 0

    def Get_size(self) -> int:  # noqa: N802
        return 1

    def allgather(self, data: Any) -> tuple[Any, ...]:
        return (data,)

    def bcast(self, data: Any, root: int) -> Any:
        if root != 0:
            raise ValueError(f"a group of one has no rank {root}")
        return data

    def barrier(self) -> None:
        return None

    def Split(self, color: int, key: int) -> SingleComm:  # noqa: N802
        del color, key
        return self
