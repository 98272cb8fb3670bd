"""The installed FlashInfer's fused all-reduce, asked only for what it takes.

Which parameters exist is known from `FlashInferInfo` (signatures, read once); nothing is probed here. Sizes
and choices copied from FlashInfer name their source, and a test compares them with the installed version.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from core_torch.kernels.comm import CommBackend
from core_torch.kernels.flashinfer_modules import use_prebuilt
from core_torch.kernels.native import device_arch
from shared_config import FlashInferInfo

# flashinfer/comm/trtllm_ar.py, 0.7.2: flags per rank, the largest one-shot message, and the MiB up to which
# one-shot is faster, by group size (measured by its authors on B200). 16 ranks are not in its table.
BARRIER_FLAGS = 256
MAX_ONESHOT_BYTES = 2147483647 & ~((1 << 21) - 1)
ONESHOT_MIB = {2: 512, 4: 64, 8: 42, 16: 42}
SIGNAL_PAD_BYTES = 2048  # flashinfer/comm/mnnvl.py: at the end of each buffer

_kernel_lock = threading.Lock()


@dataclass(frozen=True)
class RawKernel:
    """FlashInfer's TVM-FFI function and what it needs of a workspace, for callers outside torch.

    `function(allreduce_in, world_size, rank, num_tokens, hidden_size, workspace_ptrs, launch_with_pdl,
    use_oneshot, trigger_completion_at_end, fp32_acc, pattern_code, allreduce_out, residual_in,
    residual_out, norm_out, quant_out, scale_out, rms_gamma, rms_eps, scale_factor, layout_code,
    block_quant_group_size, weight_bias)` (0.7.2); tensors are DLPack-like or None. It runs on TVM-FFI's
    current stream. `workspace_ptrs` is int64 on the rank's device and dies with the workspace; fetch it
    again after the workspace has grown.
    """

    function: Any
    workspace_ptrs: Tensor
    world_size: int
    rank: int


def use_oneshot(num_tokens: int, hidden_size: int, itemsize: int, world_size: int) -> bool:
    """FlashInfer's own choice, made here so that every framework makes the same one and gets the same bits.

    Two-shot needs more tokens than ranks.
    """
    if num_tokens <= world_size:
        return True
    message_bytes = num_tokens * hidden_size * 2 * world_size * itemsize
    return message_bytes <= ONESHOT_MIB[world_size] * 1024 * 1024


def buffer_bytes(world_size: int, max_tokens: int, hidden_size: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The buffers that one rank allocates, in bytes: two-shot data, flags, three one-shot (Lamport) generations.

    `trtllm_create_ipc_workspace_for_all_reduce_fusion`; the `mnnvl` backend needs less.
    """
    message = world_size * max_tokens * hidden_size * (4 if dtype == torch.float32 else 2)
    return message, world_size * BARRIER_FLAGS * 4, 3 * min(message, MAX_ONESHOT_BYTES)


def try_allocation(sizes: tuple[int, ...], device_index: int) -> None:
    """Really allocates buffers of `sizes` bytes as FlashInfer will, and gives them back. MemoryError if it cannot.

    Through the driver, because torch's allocator would answer from memory that it holds already, and keep
    what it got. The driver's calls also leave no error behind that torch would report at its next launch.
    """
    driver = importlib.import_module("cuda.bindings.driver")
    prop = driver.CUmemAllocationProp()
    prop.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    prop.requestedHandleTypes = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    location = driver.CUmemLocation()
    location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    location.id = device_index
    prop.location = location
    recommended = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED

    def checked(what: str, answer: tuple[Any, ...]) -> Any:
        status, *values = answer
        if status != driver.CUresult.CUDA_SUCCESS:
            raise MemoryError(f"{what} on GPU {device_index} failed with {status.name}")
        return values[0] if values else None

    granularity = checked(
        "asking for the granularity", driver.cuMemGetAllocationGranularity(prop, recommended)
    )
    handles = []
    try:
        for size in sizes:
            padded = -(-(size + SIGNAL_PAD_BYTES) // granularity) * granularity
            handles.append(checked(f"allocating {padded} bytes", driver.cuMemCreate(padded, prop, 0)))
    finally:
        for handle in handles:
            driver.cuMemRelease(handle)


class SymmetricMemory:
    """Memory of each rank of a group that all of them reach, zeros at first. `addresses`: by rank, for this one's GPU.

    Collective over `comm`. Never multicast.
    """

    def __init__(self, size: int, comm: CommBackend, device: torch.device) -> None:
        driver = importlib.import_module("cuda.bindings.driver")
        self._memory = importlib.import_module("flashinfer.comm.mnnvl").SymmDeviceMemory(
            buf_size=size,
            group_size=comm.Get_size(),
            group_rank=comm.Get_rank(),
            device_idx=device.index,
            comm_backend_for_handle_transfer=comm,
            enable_multicast=False,
            allocate_signal_pads=False,
        )
        self.addresses = [int(pointer) for pointer in self._memory.get_buffer_ptrs_host()]
        (status,) = driver.cuMemsetD8(self.addresses[comm.Get_rank()], 0, size)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"writing zeros to memory that peers reach failed with {status.name}")

    def destroy(self) -> None:
        """Gives it back; peers keep their own mappings."""
        self._memory = None


class FlashInferApi:
    """The calls of one FlashInfer version. `comm_module` is `flashinfer.comm`, or a stand-in for it in tests.

    Raises ImportError with the install command, or with what the installed version lacks.
    """

    def __init__(self, info: FlashInferInfo, comm_module: Any = None) -> None:
        if not info.has_fused_op:
            raise ImportError(
                f"FlashInfer's fused all-reduce cannot be used: {info.reason}; "
                "pip install 'flashinfer-python>=0.7.2'"
            )
        if "comm_backend" not in info.workspace_params:
            raise ImportError(
                f"FlashInfer {info.version} makes workspaces over WORLD only (no comm_backend); "
                "pip install 'flashinfer-python>=0.7.2'"
            )
        self.info = info
        self.comm = comm_module or importlib.import_module("flashinfer.comm")
        if comm_module is None and torch.cuda.is_available():
            use_prebuilt("trtllm_comm", device_arch(torch.device("cuda")))

    @property
    def takes_weight_bias(self) -> bool:
        return "weight_bias" in self.info.op_params

    def create_workspace(
        self,
        backend: str,
        comm: CommBackend,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        max_tokens: int,
        group: Any = None,
    ) -> Any:
        """Collective. `backend` is always named: FlashInfer's "auto" prefers multicast, which needs consent.

        `group` is the torch process group where there is one: versions from 0.6.10 take WORLD without it.
        """
        if backend not in ("trtllm", "mnnvl"):
            raise ValueError(f"backend must be 'trtllm' or 'mnnvl', got {backend!r}")
        values = {
            "backend": backend,
            "world_size": comm.Get_size(),
            "rank": comm.Get_rank(),
            "max_token_num": max_tokens,
            "hidden_dim": hidden_size,
            "dtype": dtype,
            "comm_backend": comm,
            "group": group,
            "use_fp32_lamport": dtype == torch.float32,
        }
        workspace = self.comm.create_allreduce_fusion_workspace(**_taken(values, self.info.workspace_params))
        size = {
            "tp_size": comm.Get_size(),
            "num_tokens": max_tokens,
            "hidden_dim": hidden_size,
            "dtype": dtype,
        }
        if not workspace.is_buffer_size_sufficient(**_taken(size, self.info.sufficient_params)):
            self.destroy_workspace(workspace)
            raise RuntimeError(f"FlashInfer made a workspace that is too small for {max_tokens} tokens")
        return workspace

    def run(
        self,
        workspace: Any,
        partial: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_bias: float,
        out_residual: Tensor,
        out_normed: Tensor,
        *,
        trigger_completion_at_end: bool = True,
    ) -> None:
        """Launches the kernel on the current stream. A `weight_bias` that is not taken must be folded before.

        `trigger_completion_at_end=False` lets a kernel launched with PDL start early; it must wait by itself.
        Signalling early gave NaN at batch 1 elsewhere (vLLM 45448): whoever asks for it has measured that it is safe.
        """
        if weight_bias != 0.0 and not self.takes_weight_bias:
            raise ValueError(
                f"FlashInfer {self.info.version} takes no weight_bias, got {weight_bias}: fold it"
            )
        num_tokens, hidden_size = partial.shape
        values = {
            "input": partial,
            "workspace": workspace,
            "pattern": self.comm.AllReduceFusionPattern.kARResidualRMSNorm,
            "launch_with_pdl": True,
            "trigger_completion_at_end": trigger_completion_at_end,
            # The pattern does not write the sum itself; without a tensor here FlashInfer would allocate one.
            "output": out_normed,
            "residual_in": residual,
            "residual_out": out_residual,
            "norm_out": out_normed,
            "rms_gamma": weight,
            "rms_eps": eps,
            "use_oneshot": use_oneshot(num_tokens, hidden_size, partial.itemsize, workspace.world_size),
            # Sums in bfloat16 lost accuracy at TP8 (SGLang 34603); in float32 there is nothing to widen.
            "fp32_acc": partial.dtype != torch.float32,
            "weight_bias": weight_bias,
        }
        self.comm.allreduce_fusion(**_taken(values, self.info.op_params))

    def destroy_workspace(self, workspace: Any) -> None:
        """Gives all memory back. FlashInfer's own `destroy` (0.7.2) forgets three things, each named here."""
        metadata = getattr(workspace, "metadata", None) or {}
        flag_pointer = metadata.get("control_flag_ptr")
        handles = getattr(workspace, "ipc_handles", None)
        if handles is not None and hasattr(self.comm, "trtllm_destroy_ipc_workspace_for_all_reduce_fusion"):
            # A module-level table keeps the buffers alive, under the id of this list.
            self.comm.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(handles)
        workspace.destroy()
        if hasattr(workspace, "_internal_workspace"):
            # The tuple that the attributes were taken from holds the buffers a second time.
            workspace._internal_workspace = None
        if flag_pointer and Version(self.info.version) <= Version("0.7.2.post1"):
            # Never freed. A later version may free it, and freeing it twice is worse than 20 lost bytes.
            cuda_ipc = importlib.import_module("flashinfer.comm.cuda_ipc")
            cuda_ipc.cudart.cudaFree(ctypes.c_void_p(flag_pointer))

    def kernel(self) -> Any:
        """The TVM-FFI function of the `trtllm` backend, loaded (or compiled, in minutes) on first use.

        One thread at a time: several ranks may be threads of one process.
        """
        with _kernel_lock:
            module = importlib.import_module("flashinfer.jit.comm").gen_trtllm_comm_module().build_and_load()
        return module.trtllm_allreduce_fusion


def _taken(values: dict[str, Any], params: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in params and value is not None}
