"""The GPU transports without a GPU: what they hand to FlashInfer's kernel, and how missing packages are named.

The C++ adaptor runs as a CPU custom call here, with a Python stand-in for the kernel that records its parameters.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import tvm_ffi

import jax_bridge
from core_torch.kernels.flashinfer_api import RawKernel, use_oneshot
from jax_bridge import native, packages
from jax_bridge.transports import cupy as cupy_transport
from jax_bridge.transports.ffi import FfiTransport

pytestmark = pytest.mark.timeout(60)

D = 64
RANK, AXIS_SIZE = 2, 4
# FlashInfer 0.7.2's `trtllm_allreduce_fusion`, by position.
PARAMETERS = (
    "allreduce_in",
    "world_size",
    "world_rank",
    "token_num",
    "hidden_size",
    "workspace_ptrs",
    "launch_with_pdl",
    "use_oneshot",
    "trigger_completion_at_end",
    "fp32_acc",
    "pattern_code",
    "allreduce_out",
    "residual_in",
    "residual_out",
    "norm_out",
    "quant_out",
    "scale_out",
    "rms_gamma",
    "rms_eps",
    "scale_factor",
    "layout_code",
    "block_quant_group_size",
    "weight_bias",
)


def on_memory_of(tensor: Any) -> np.ndarray:
    """A view that C++ lends may not be exported through DLPack, only looked at."""
    dtype = jnp.dtype(str(tensor.dtype))
    size = int(np.prod(tensor.shape)) * dtype.itemsize
    memory = (ctypes.c_uint8 * size).from_address(tensor.data_ptr())
    return np.ctypeslib.as_array(memory).view(dtype).reshape(tensor.shape)


class FakeKernel:
    """Stands in for FlashInfer's function: records its parameters, and adds up what a group of one would."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.raw = RawKernel(tvm_ffi.convert(self.launch), torch.arange(13), AXIS_SIZE, RANK)

    def launch(self, *values: Any) -> None:
        call = dict(zip(PARAMETERS, values, strict=True))
        self.calls.append(
            {name: tuple(value.shape) if hasattr(value, "shape") else value for name, value in call.items()}
        )
        arrays = {name: on_memory_of(value) for name, value in call.items() if hasattr(value, "shape")}
        if call["pattern_code"] == 0:
            arrays["allreduce_out"][...] = arrays["allreduce_in"]
            return
        arrays["residual_out"][...] = arrays["residual_in"] + arrays["allreduce_in"]
        factor = call["weight_bias"] + arrays["rms_gamma"].astype(np.float32)
        arrays["norm_out"][...] = arrays["residual_out"].astype(np.float32) * factor


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel()


@pytest.fixture
def ffi(kernel: FakeKernel):
    transport = FfiTransport(3, AXIS_SIZE, {0: kernel.raw}, platform="cpu")
    yield transport
    transport.close()


def norm_parameters(num_tokens: int, itemsize: int, weight_bias: float) -> dict[str, Any]:
    rows = (num_tokens, D)
    return dict.fromkeys(PARAMETERS) | {
        "allreduce_in": rows,
        "world_size": AXIS_SIZE,
        "world_rank": RANK,
        "token_num": num_tokens,
        "hidden_size": D,
        "workspace_ptrs": (13,),
        "launch_with_pdl": True,
        "use_oneshot": use_oneshot(num_tokens, D, itemsize, AXIS_SIZE),
        "trigger_completion_at_end": True,
        "fp32_acc": itemsize == 2,
        "pattern_code": 1,
        "residual_in": rows,
        "residual_out": rows,
        "norm_out": rows,
        "rms_gamma": (D,),
        "rms_eps": 1e-5,
        "weight_bias": weight_bias,
    }


class TestFfi:
    @pytest.mark.parametrize("ordered", [False, True])
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    @pytest.mark.parametrize(("num_tokens", "weight_bias"), [(1, 1.0), (5, 0.0)])
    def test_norm(
        self,
        ffi: FfiTransport,
        kernel: FakeKernel,
        num_tokens: int,
        weight_bias: float,
        dtype: Any,
        ordered: bool,
    ) -> None:
        x, r = (jnp.full((num_tokens, D), value, dtype) for value in (2.0, 3.0))
        w = jnp.full((D,), 0.5, dtype)
        sequence = jnp.full((1,), 7, jnp.int32) if ordered else None

        @jax.jit
        def run(x, r, w, sequence):
            return ffi.allreduce_residual_rmsnorm(
                x, r, w, sequence, eps=1e-5, weight_bias=weight_bias, in_place=True
            )

        new_residual, normed, after = run(x, r, w, sequence)
        assert (new_residual == 5).all()
        assert (normed == 5 * (weight_bias + 0.5)).all()
        assert after is None if sequence is None else after == 7
        assert (r == 3).all(), "an operand that the caller keeps is not written to"
        assert kernel.calls == [norm_parameters(num_tokens, jnp.dtype(dtype).itemsize, weight_bias)]

    @pytest.mark.parametrize("ordered", [False, True])
    def test_sum(self, ffi: FfiTransport, kernel: FakeKernel, ordered: bool) -> None:
        sequence = jnp.full((1,), 7, jnp.int32) if ordered else None
        total, after = jax.jit(ffi.allreduce)(jnp.full((5, D), 2.0), sequence)
        assert (total == 2).all()
        assert after is None if sequence is None else after == 7
        norm = norm_parameters(5, 4, 1.0)
        unused = ("residual_in", "residual_out", "norm_out", "rms_gamma", "rms_eps", "weight_bias")
        assert kernel.calls == [norm | dict.fromkeys(unused) | {"pattern_code": 0, "allreduce_out": (5, D)}]

    def test_two_shot_is_chosen_as_in_torch(self, ffi: FfiTransport) -> None:
        large = jax.ShapeDtypeStruct((1 << 20, D), jnp.bfloat16)
        assert not use_oneshot(1 << 20, D, 2, AXIS_SIZE)
        text = jax.jit(lambda x: ffi.allreduce(x, None)[0]).lower(large).as_text()
        assert "use_oneshot = 0 : i64" in text

    def test_a_closed_communicator(self, ffi: FfiTransport) -> None:
        run = jax.jit(lambda x: ffi.allreduce(x, None)[0]).lower(jnp.ones((5, D))).compile()
        ffi.close()
        with pytest.raises(jax.errors.JaxRuntimeError, match="communicator 3 is not open on CUDA device 0"):
            jax.block_until_ready(run(jnp.ones((5, D))))

    def test_opening_again_registers_nothing(self, ffi: FfiTransport, kernel: FakeKernel) -> None:
        import jax_tvm_ffi

        registered = jax_tvm_ffi.registered_count()
        other = FfiTransport(4, AXIS_SIZE, {0: kernel.raw}, platform="cpu")
        assert jax_tvm_ffi.registered_count() == registered
        other.close()
        assert len(set(ffi.targets)) == 4

    def test_a_groups_devices_meet_at_each_launch(
        self, kernel: FakeKernel, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Devices 0 and 2 reduce together, 1 and 3 too; each group waits for its own."""
        kernels, groups = dict.fromkeys(range(4), kernel.raw), {0: 0, 1: 1, 2: 0, 3: 1}
        transport = FfiTransport(5, 2, kernels, groups, timeout_s=0.5, platform="cpu")
        meet_on = native.load("flashinfer_adaptor").meet_on
        with ThreadPoolExecutor() as pool:
            for first, second in ((0, 2), (3, 1), (0, 2)):
                waiting = pool.submit(meet_on, 5, first)
                assert not wait([waiting], timeout=0.1).done
                meet_on(5, second)
                waiting.result(timeout=0.3)
            assert "goes on without" not in capfd.readouterr().err
            pool.submit(meet_on, 5, 0).result(timeout=10)
            assert "GPU 0 waited 500 ms in a fused reduction" in capfd.readouterr().err
            waiting = pool.submit(meet_on, 5, 2)  # what went on alone is not waited for
            assert not wait([waiting], timeout=0.1).done
            meet_on(5, 0)
            waiting.result(timeout=0.3)
        transport.close()


class TestCupy:
    """The Python transport, with CuPy's stream as the one thing that is missing."""

    @pytest.fixture
    def transport(self, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> cupy_transport.CupyTransport:
        stream = SimpleNamespace(ptr=0)
        fake = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: stream))
        monkeypatch.setattr(cupy_transport, "require_cupy", lambda: fake)
        return cupy_transport.CupyTransport(3, AXIS_SIZE, {0: kernel.raw})

    @pytest.mark.parametrize("ordered", [False, True])
    def test_the_same_parameters_as_ffi(
        self, transport: cupy_transport.CupyTransport, ffi: FfiTransport, kernel: FakeKernel, ordered: bool
    ) -> None:
        x, r, w = jnp.full((5, D), 2.0), jnp.full((5, D), 3.0), jnp.full((D,), 0.5)
        sequence = jnp.zeros((1,), jnp.int32) if ordered else None
        results = []
        for way in (ffi, transport):
            norm = jax.jit(
                lambda x, r, w, s, way=way: way.allreduce_residual_rmsnorm(
                    x, r, w, s, eps=1e-5, weight_bias=1.0, in_place=True
                )
            )
            results.append([*norm(x, r, w, sequence)[:2], jax.jit(way.allreduce)(x, sequence)[0]])
        assert kernel.calls[:2] == kernel.calls[2:]
        for one, other in zip(*results, strict=True):
            np.testing.assert_array_equal(one, other)

    def test_a_closed_communicator(self, transport: cupy_transport.CupyTransport) -> None:
        run = jax.jit(lambda x: transport.allreduce(x, None)[0]).lower(jnp.ones((5, D))).compile()
        transport.close()
        with pytest.raises(jax.errors.JaxRuntimeError, match="communicator 3 is not open on CUDA device 0"):
            jax.block_until_ready(run(jnp.ones((5, D))))


class TestPackages:
    @pytest.mark.parametrize(
        ("require", "module", "command"),
        [
            (packages.require_jax_tvm_ffi, "jax_tvm_ffi", "pip install jax-tvm-ffi"),
            (packages.require_tvm_ffi_cpp, "tvm_ffi.cpp", "pip install apache-tvm-ffi ninja"),
            (packages.require_cupy, "cupy", "pip install cupy-cuda13x"),
            (packages.require_torch, "torch", "pip install torch"),
        ],
    )
    def test_a_missing_package_is_one_import_error(
        self, require: Any, module: str, command: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"{module}.*{command}"):
            require()

    def test_importing_the_package_imports_neither_framework(self) -> None:
        check = "import sys, jax_bridge; assert not {'jax', 'torch', 'tvm_ffi'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", check], check=True, timeout=60)

    def test_public_names(self) -> None:
        for name in jax_bridge.__all__:
            assert getattr(jax_bridge, name) is not None
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            jax_bridge.nothing  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
