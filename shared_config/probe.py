"""The only code that looks at a machine: it turns GPUs and libraries into plain values.

A probe never raises. What cannot be found out is `None` (hardware), or a reason (FlashInfer).
"""

from __future__ import annotations

import ctypes
import inspect
import os
from types import SimpleNamespace
from typing import Any

from shared_config.hardware import FlashInferInfo, HardwareInfo

MULTICAST_SUPPORTED = 132  # CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED in cuda.h
# An operator who sets one of these has switched NVLink multicast off, whatever the GPU can do.
MULTICAST_OFF = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


def probe_hardware() -> HardwareInfo:
    """The GPUs that torch sees here, described by the first; a machine without one gives a "cpu" answer."""
    try:
        import torch
    except (ImportError, OSError):  # OSError: installed, but a library that it links is not
        return HardwareInfo()
    if not torch.cuda.is_available():
        return HardwareInfo(cuda=torch.version.cuda or "")
    num_gpus = torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(0)
    pairs = [(a, b) for a in range(num_gpus) for b in range(num_gpus) if a != b]
    driver, nvlinks = _ask_nvml(
        [str(getattr(torch.cuda.get_device_properties(gpu), "uuid", "")) for gpu in range(num_gpus)]
    )
    return HardwareInfo(
        device="cuda",
        gpu_name=properties.name,
        sm=properties.major * 10 + properties.minor,
        num_gpus=num_gpus,
        p2p=all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs) if pairs else None,
        nvlinks=nvlinks,
        multicast=_multicast(num_gpus),
        driver=driver,
        cuda=torch.version.cuda or "",
    )


def _ask_nvml(uuids: list[str]) -> tuple[str, int | None]:
    """(driver version, active NVLinks of the GPU with the fewest); ("", None) where NVML cannot say.

    GPUs are found by UUID, because NVML does not know about CUDA_VISIBLE_DEVICES.
    """
    try:
        import pynvml
    except ImportError:
        return "", None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return "", None
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}") for uuid in uuids]
        nvlinks = min(_active_nvlinks(pynvml, handle) for handle in handles)
    except pynvml.NVMLError:
        return "", None
    finally:
        pynvml.nvmlShutdown()
    return driver, nvlinks


def _active_nvlinks(pynvml: Any, handle: Any) -> int:
    active = 0
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            active += pynvml.nvmlDeviceGetNvLinkState(handle, link) == pynvml.NVML_FEATURE_ENABLED
        except pynvml.NVMLError:  # past the last link, or a GPU without NVLink
            break
    return active


def _multicast(num_gpus: int) -> bool | None:
    """Whether all GPUs support NVLink multicast and nobody switched it off. It is asked about, never used."""
    if any(os.environ.get(name) == off for name, off in MULTICAST_OFF.items()):
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    supported = ctypes.c_int()
    for gpu in range(num_gpus):
        if driver.cuDeviceGetAttribute(ctypes.byref(supported), MULTICAST_SUPPORTED, gpu) != 0:
            return None
        if not supported.value:
            return False
    return True


def probe_flashinfer(comm: Any = None, version: str = "") -> FlashInferInfo:
    """What the installed FlashInfer's fused all-reduce takes, asked from its signatures (SGLang PR 26197).

    `comm` stands in for `flashinfer.comm` (with `version`), so that tests can ask about any API. A function
    that is missing, or whose signature cannot be read because it is compiled, makes the op unsupported.
    """
    if comm is None:
        try:
            import flashinfer
            import flashinfer.comm as comm
        except ImportError as error:
            return FlashInferInfo(
                reason=f"FlashInfer cannot be imported ({error}): pip install flashinfer-python"
            )
        except Exception as error:  # it loads CUDA libraries, which fail in their own ways on a laptop
            return FlashInferInfo(reason=f"importing FlashInfer failed with {type(error).__name__}: {error}")
        version = flashinfer.__version__

    workspace_class = getattr(comm, "TRTLLMAllReduceFusionWorkspace", None) or SimpleNamespace()
    functions = {
        "create_allreduce_fusion_workspace": getattr(comm, "create_allreduce_fusion_workspace", None),
        "allreduce_fusion": getattr(comm, "allreduce_fusion", None),
        "is_buffer_size_sufficient": getattr(workspace_class, "is_buffer_size_sufficient", None),
    }
    params = []
    for name, function in functions.items():
        if function is None:
            return _unsupported(version, f"it has no {name}")
        try:
            params.append(frozenset(inspect.signature(function).parameters) - {"self"})
        except (TypeError, ValueError) as error:  # compiled without a text signature
            return _unsupported(version, f"not supported: the signature of {name} cannot be read ({error})")
    workspace_params, op_params, sufficient_params = params
    return FlashInferInfo(
        installed=True,
        version=version,
        has_fused_op=True,
        workspace_params=workspace_params,
        op_params=op_params,
        sufficient_params=sufficient_params,
        reason="",
    )


def _unsupported(version: str, reason: str) -> FlashInferInfo:
    return FlashInferInfo(installed=True, version=version, reason=reason)
