"""Probing on machines that are missing something, and the API questions on stand-ins for FlashInfer."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from shared_config import HardwareInfo, probe_flashinfer, probe_hardware
from tests.fusion_cases import Case


def create_allreduce_fusion_workspace(
    backend, world_size, rank, max_token_num, hidden_dim, dtype, comm_backend=None, group=None
): ...


def allreduce_fusion(
    input,  # noqa: A002  # FlashInfer's name
    workspace,
    pattern,
    residual_in,
    residual_out,
    norm_out,
    rms_gamma,
    rms_eps,
    weight_bias=0.0,
): ...


class Workspace:
    def is_buffer_size_sufficient(self, tp_size, num_tokens, hidden_dim, dtype, use_oneshot=None): ...


def fake_comm(**changes: Any) -> SimpleNamespace:
    """A stand-in for flashinfer.comm; a change to None leaves the function out."""
    functions = {
        "create_allreduce_fusion_workspace": create_allreduce_fusion_workspace,
        "allreduce_fusion": allreduce_fusion,
        "TRTLLMAllReduceFusionWorkspace": Workspace,
    } | changes
    return SimpleNamespace(**{name: value for name, value in functions.items() if value is not None})


class Compiled:
    """Called like a function, without a signature: as compiled functions without metadata are."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    @property
    def __signature__(self) -> None:
        raise self.error("no signature found for builtin")

    def __call__(self) -> None: ...


def test_parameters_are_read_from_the_signatures() -> None:
    info = probe_flashinfer(fake_comm(), "0.7.0")
    assert (info.installed, info.version, info.has_fused_op, info.reason) == (True, "0.7.0", True, "")
    assert {"comm_backend", "group"} <= info.workspace_params
    assert "use_fp32_lamport" not in info.workspace_params
    assert "weight_bias" in info.op_params
    assert "fp32_acc" not in info.op_params
    assert info.sufficient_params == {"tp_size", "num_tokens", "hidden_dim", "dtype", "use_oneshot"}


@pytest.mark.parametrize("error", [ValueError, TypeError])
@pytest.mark.parametrize(
    ("part", "function"),
    [
        ("create_allreduce_fusion_workspace", "create_allreduce_fusion_workspace"),
        ("allreduce_fusion", "allreduce_fusion"),
        ("TRTLLMAllReduceFusionWorkspace", "is_buffer_size_sufficient"),
    ],
)
def test_a_function_without_a_signature_is_not_supported(
    error: type[Exception], part: str, function: str
) -> None:
    compiled: Any = Compiled(error)
    if function == "is_buffer_size_sufficient":
        compiled = SimpleNamespace(is_buffer_size_sufficient=compiled)
    info = probe_flashinfer(fake_comm(**{part: compiled}), "0.7.0")
    assert info.installed
    assert not info.has_fused_op
    assert f"not supported: the signature of {function}" in info.reason
    decision = Case().change(flashinfer=vars(info)).decide()
    assert decision.decided_by == "FlashInfer"
    assert "not supported" in decision.reason


@pytest.mark.parametrize("function", [dict.update, 3], ids=["ValueError", "TypeError"])
def test_what_inspect_itself_cannot_read_is_not_supported(function: Any) -> None:
    info = probe_flashinfer(fake_comm(allreduce_fusion=function), "0.7.0")
    assert info.installed
    assert not info.has_fused_op
    assert "not supported" in info.reason


@pytest.mark.parametrize(
    ("part", "missing"),
    [
        ("create_allreduce_fusion_workspace", "create_allreduce_fusion_workspace"),
        ("allreduce_fusion", "allreduce_fusion"),
        ("TRTLLMAllReduceFusionWorkspace", "is_buffer_size_sufficient"),
    ],
)
def test_a_missing_function_is_named(part: str, missing: str) -> None:
    info = probe_flashinfer(fake_comm(**{part: None}), "0.5.0")
    assert not info.has_fused_op
    assert info.reason == f"it has no {missing}"


def test_no_flashinfer_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    info = probe_flashinfer()
    assert not info.installed
    assert "pip install flashinfer-python" in info.reason


def test_a_flashinfer_that_fails_to_import_is_an_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "flashinfer.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    for name in [name for name in sys.modules if name.split(".")[0] == "flashinfer"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    info = probe_flashinfer()
    assert not info.installed
    assert "OSError: libcudart.so.13" in info.reason


def test_the_installed_flashinfer() -> None:
    flashinfer = pytest.importorskip("flashinfer")
    info = probe_flashinfer()
    assert info.version == flashinfer.__version__
    assert info.has_fused_op, info.reason
    assert Case().change(flashinfer=vars(info)).decide().enabled
    assert {"trigger_completion_at_end", "weight_bias", "fp32_acc"} <= info.op_params


def test_this_machine() -> None:
    torch = pytest.importorskip("torch")
    hardware = probe_hardware()
    assert hardware.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert (hardware.sm is not None) == torch.cuda.is_available()


def test_a_machine_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert probe_hardware() == HardwareInfo()


class FakeCuda:
    """Two H200s behind torch.cuda's interface."""

    peers = True

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 2

    def get_device_properties(self, gpu: int) -> SimpleNamespace:
        return SimpleNamespace(name="NVIDIA H200", major=9, minor=0, uuid=f"0000-{gpu}")

    def can_device_access_peer(self, gpu: int, peer: int) -> bool:
        assert gpu != peer
        return self.peers or gpu < peer


class FakeNvml:
    """NVML with eighteen links on the first GPU and sixteen on the second."""

    NVML_NVLINK_MAX_LINKS = 18
    NVML_FEATURE_ENABLED = 1

    class NVMLError(Exception):
        pass

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def nvmlInit(self) -> None:  # noqa: N802  # NVML's names
        if self.broken:
            raise self.NVMLError("driver not loaded")

    def nvmlShutdown(self) -> None: ...  # noqa: N802

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.65"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        return {"GPU-0000-0": 18, "GPU-0000-1": 16}[uuid]

    def nvmlDeviceGetNvLinkState(self, links: int, link: int) -> int:  # noqa: N802
        if link >= links:
            raise self.NVMLError("no such link")
        return 1


def fake_machine(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None) -> FakeCuda:
    cuda = FakeCuda()
    monkeypatch.setitem(
        sys.modules, "torch", SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0"))
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    return cuda


def test_a_gpu_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_machine(monkeypatch, FakeNvml())
    assert probe_hardware() == HardwareInfo(
        device="cuda",
        gpu_name="NVIDIA H200",
        sm=90,
        num_gpus=2,
        p2p=True,
        nvlinks=16,
        multicast=False,
        driver="580.65",
        cuda="13.0",
    )


@pytest.mark.parametrize("nvml", [None, FakeNvml(broken=True)], ids=["not installed", "driver not loaded"])
def test_without_nvml_the_links_are_not_known(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None) -> None:
    fake_machine(monkeypatch, nvml)
    hardware = probe_hardware()
    assert (hardware.nvlinks, hardware.driver, hardware.sm) == (None, "", 90)


def test_peer_access_must_hold_for_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_machine(monkeypatch, FakeNvml()).peers = False
    assert probe_hardware().p2p is False


@pytest.mark.parametrize(
    "name", ["NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS"]
)
def test_multicast_that_is_switched_off_is_not_there(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from shared_config.probe import MULTICAST_OFF, _multicast

    for other in MULTICAST_OFF:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr("ctypes.CDLL", lambda _: FakeDriver(supported=1))
    assert _multicast(2) is True
    monkeypatch.setenv(name, MULTICAST_OFF[name])
    assert _multicast(2) is False


class FakeDriver:
    """libcuda with one attribute."""

    def __init__(self, *, supported: int, status: int = 0) -> None:
        self.supported = supported
        self.status = status

    def cuDeviceGetAttribute(self, result: Any, attribute: int, gpu: int) -> int:  # noqa: N802
        assert (attribute, gpu >= 0) == (132, True)
        result._obj.value = self.supported
        return self.status


@pytest.mark.parametrize(("supported", "status", "answer"), [(1, 0, True), (0, 0, False), (1, 3, None)])
def test_multicast_is_what_the_driver_says(
    monkeypatch: pytest.MonkeyPatch, supported: int, status: int, answer: bool | None
) -> None:
    from shared_config.probe import MULTICAST_OFF, _multicast

    for other in MULTICAST_OFF:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr("ctypes.CDLL", lambda _: FakeDriver(supported=supported, status=status))
    assert _multicast(1) is answer
