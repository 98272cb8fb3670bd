"""`python -m core_torch doctor`: what a person with a problem, or whoever helps them, needs to see first."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from core_torch.kernels import native
from core_torch.kernels.choice import Answers
from core_torch.kernels.pair_allreduce import pair_answer
from core_torch.parallel import REDUCE_GROUPS, open_parallel, rank_device
from core_torch.worker import RankFailure, WorkerGroup
from shared_config import (
    FlashInferInfo,
    FusionDecision,
    FusionError,
    FusionRequest,
    HardwareInfo,
    ModelFacts,
    ParallelLayout,
    Qwen3NextConfig,
    probe_flashinfer,
    probe_hardware,
    resolve_fusion,
)
from shared_config.cli import add_layout_options, layout_options
from shared_config.generation import Request
from shared_config.results import RequestOutput

PACKAGES = (
    "torch", "triton", "flashinfer-python", "apache-tvm-ffi", "nvidia-nccl-cu13", "jax", "jaxlib",
    "jax-cuda13-plugin", "jax-tvm-ffi", "cupy-cuda13x", "flax", "transformers",
)  # fmt: skip
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_MODULE_LOADING", "NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST",
    "NVSHMEM_DISABLE_NVLS", "FLASHINFER_WORKSPACE_BASE", "XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION",
)  # fmt: skip
MODULE = "trtllm_comm"  # FlashInfer's module with the fused all-reduce
SELF_TEST_TIMEOUT_S = 900.0  # without a prebuilt module FlashInfer compiles it first, for minutes


def add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("doctor", help="GPUs, links, versions, and a self-test of the fused op")
    parser.add_argument("--model", metavar="DIR", help="ask for this checkpoint (default: 80B-A3B's width)")
    parser.add_argument(
        "--tp", type=int, default=0, metavar="N", help="ranks of the self-test (default: all GPUs)"
    )
    add_layout_options(parser)
    parser.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    """Print the tables; 0 when every self-test that could run passed."""
    console = Console(width=None if Console().is_terminal else 110)
    hardware, flashinfer = probe_hardware(), probe_flashinfer()
    console.print(_table("versions", [("python", platform.python_version()), *_versions()]))
    console.print(
        _table("machine", [*_machine(hardware), *[(v, os.environ[v]) for v in VARIABLES if v in os.environ]])
    )
    if hardware.device == "cuda":
        console.print(_peer_table())
    console.print(_table("FlashInfer", _flashinfer(flashinfer)))
    console.print(_table("compiled kernels", _compiled_kernels(hardware)))
    model = ModelFacts("Qwen3NextForCausalLM", 2048, 2)
    if args.model is not None:
        config = Qwen3NextConfig.from_hf(args.model)
        model = ModelFacts(config.architecture, config.hidden_size, config.itemsize)
    args.tp = args.tp or max(2, hardware.num_gpus)
    layout = ParallelLayout(args.tp, **layout_options(args))
    reports = [_self_test(model, layout, hardware, flashinfer, FusionRequest())]
    if not reports[0].ran:
        reports.append(_self_test(model, layout, hardware, flashinfer, FusionRequest(backend="reference")))
    console.print(_table(f"self-test over {args.tp} ranks", [(r.backend, r.text) for r in reports]))
    return 0 if all(r.passed for r in reports if r.ran) else 1


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    return table


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append((name, "not installed"))
    return [*found, ("CUDA of torch", str(torch.version.cuda))]


def _machine(hardware: HardwareInfo) -> list[tuple[str, str]]:
    if hardware.device != "cuda":
        return [("GPUs", "none that torch can use")]
    free = [torch.cuda.mem_get_info(i)[0] / 2**30 for i in range(hardware.num_gpus)]
    return [
        ("GPUs", f"{hardware.num_gpus} x {hardware.gpu_name} (SM{hardware.sm})"),
        ("free memory", ", ".join(f"{gib:.1f} GiB" for gib in free)),
        ("driver", f"{hardware.driver}, CUDA {hardware.cuda}"),
        ("NVLinks of a GPU", _known(hardware.nvlinks)),
        ("peer access between all", _known(hardware.p2p)),
        ("NVLink multicast", _known(hardware.multicast)),
    ]


def _known(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)


def _peer_table() -> Table:
    """Which GPU can read which other's memory."""
    count = torch.cuda.device_count()
    table = Table(title="peer access", title_justify="left", box=None)
    for name in ("", *(f"GPU {i}" for i in range(count))):
        table.add_column(name)
    for i in range(count):
        cells = ["self" if i == j else _known(torch.cuda.can_device_access_peer(i, j)) for j in range(count)]
        table.add_row(f"GPU {i}", *cells)
    return table


def _compiled_kernels(hardware: HardwareInfo) -> list[tuple[str, str]]:
    """Where each module lies; which of them a model takes is in `LLM.kernels`."""
    device = torch.device("cuda:0" if hardware.device == "cuda" else "cpu")
    answer = native.check_device(device)
    if not answer.usable:
        return [("usable", f"no: {answer.reason}")]
    arch = native.device_arch(device)
    found = {name: native.find(name, arch) for name in native.MODULES}
    return [(name, str(path or native.check_library(name, device).reason or "compiled on first use"))
            for name, path in found.items()]  # fmt: skip


def _flashinfer(info: FlashInferInfo) -> list[tuple[str, str]]:
    if not info.installed:
        return [("installed", f"no: {info.reason}")]
    rows = [
        ("version", info.version),
        ("fused op usable", "yes" if not info.reason else f"no: {info.reason}"),
        (
            "op takes",
            ", ".join(sorted(info.op_params & {"weight_bias", "fp32_acc", "trigger_completion_at_end"})),
        ),
        (
            "workspace takes",
            ", ".join(sorted(info.workspace_params & {"group", "comm_backend", "gpus_per_node"})),
        ),
    ]
    from flashinfer.jit import env

    for what, folder in (("prebuilt", env.FLASHINFER_AOT_DIR), ("compiled", env.FLASHINFER_JIT_DIR)):
        module = Path(folder) / MODULE / f"{MODULE}.so"
        rows.append((f"{MODULE}, {what}", "yes" if module.exists() else "no"))
    return rows


@dataclass(frozen=True)
class _Report:
    backend: str
    ran: bool
    passed: bool
    text: str


def _self_test(
    model: ModelFacts,
    layout: ParallelLayout,
    hardware: HardwareInfo,
    flashinfer: FlashInferInfo,
    request: FusionRequest,
) -> _Report:
    """Start fusion over real ranks, known-answer test of every group included, and end them again."""
    decision = resolve_fusion(model, layout, hardware, flashinfer, request)
    if not decision.enabled:
        return _Report(request.backend, False, False, f"did not run: {decision.reason}")
    try:
        workers = WorkerGroup(
            partial(_open_self_test, decision, flashinfer, hardware.device),
            layout.tp_size,
            SELF_TEST_TIMEOUT_S,
        )
    except (RankFailure, FusionError) as error:
        return _Report(decision.backend, True, False, f"FAILED: {error}")
    final = workers.decision
    workers.close()
    groups = sorted({group for name in REDUCE_GROUPS for group in layout.all_groups(name) if len(group) > 1})
    text = "passed on" if final.enabled else f"FAILED: {final.reason}; ranks"
    text += f" {' '.join(str([*group]) for group in groups)}"
    pair = pair_answer(final)
    text += "; so did pair_allreduce" if pair.usable else f"; without pair_allreduce: {pair.reason}"
    return _Report(decision.backend, True, final.enabled, text)


@dataclass(frozen=True)
class _Started:
    """A rank whose groups are up: it has a decision, and neither kernels nor a model to generate with."""

    decision: FusionDecision
    kernels: Answers = field(default_factory=dict)

    def generate(self, requests: list[Request]) -> Iterator[list[RequestOutput]]:
        raise ValueError(f"a self-test has no model to run {len(requests)} requests on")


@contextmanager
def _open_self_test(
    decision: FusionDecision, flashinfer: FlashInferInfo, device: str, local_rank: int
) -> Iterator[_Started]:
    where = rank_device(local_rank, device, decision.layout.tp_size)
    with open_parallel(decision, decision.layout, flashinfer, device=where, dtype=torch.bfloat16) as parallel:
        yield _Started(parallel.decision)
