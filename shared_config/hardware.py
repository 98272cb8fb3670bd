"""What the rules need to know about a machine and its FlashInfer, as plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HardwareInfo:
    """One machine's GPUs. `None` means "not known", never "no"."""

    device: str = "cpu"  # "cpu" or "cuda"
    gpu_name: str = ""
    sm: int | None = None  # compute capability as major * 10 + minor: 90, 100, 103, 120
    num_gpus: int = 0
    p2p: bool | None = None  # every pair of GPUs reads each other's memory
    nvlinks: int | None = None  # active NVLinks of the GPU that has the fewest
    multicast: bool | None = None  # NVLink multicast (NVLS): supported and not switched off
    driver: str = ""
    cuda: str = ""  # the CUDA version that torch was built with

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")

    @property
    def sm_family(self) -> int | None:
        """90 for SM90, 100 for SM100 and SM103: kernels are built per family, so the minor is dropped."""
        return None if self.sm is None else self.sm // 10 * 10


@dataclass(frozen=True)
class FlashInferInfo:
    """The installed FlashInfer's fused all-reduce: which parameters its three functions take.

    `reason` says why the op cannot be used and is empty when it can.
    """

    installed: bool = False
    version: str = ""
    has_fused_op: bool = False
    workspace_params: frozenset[str] = frozenset()  # create_allreduce_fusion_workspace
    op_params: frozenset[str] = frozenset()  # allreduce_fusion
    sufficient_params: frozenset[str] = frozenset()  # a workspace's is_buffer_size_sufficient
    reason: str = "not probed"
