"""Workspaces: what is passed to which FlashInfer, growth, memory, errors; and the self-test's sharpness.

Ranks are threads with a stand-in FlashInfer; the installed one is asked for its signatures, sizes and choices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor

from core_torch.kernels import buffers, contract, flashinfer_api, selftest
from core_torch.kernels.contract import add_rmsnorm, fold_weight, sum_in_rank_order
from core_torch.kernels.flashinfer_api import FlashInferApi, buffer_bytes, try_allocation, use_oneshot
from core_torch.kernels.moe_prefill import ChoiceParts
from core_torch.kernels.workspace import Workspace, WorkspaceError, open_workspace
from shared_config import FlashInferInfo, FusionDecision, probe_flashinfer
from tests.fusion_ranks import HIDDEN, FakeFlashInfer, ThreadComm, decide, on_threads, operands, plain_combine

CPU = torch.device("cpu")
BF16 = torch.bfloat16
EPS = 1e-6


@pytest.fixture(params=[False, True], ids=["current API", "older API"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFlashInfer]:
    fake = FakeFlashInfer(old=request.param)
    monkeypatch.setattr(buffers, "try_allocation", lambda _sizes, _device: None)
    with mock.patch.dict(sys.modules, fake.modules):
        yield fake


def is_old(fake: FakeFlashInfer) -> bool:
    return "weight_bias" not in probe_flashinfer(fake).op_params


def with_workspaces(
    fake: FakeFlashInfer, use: Callable[[Workspace], Any], *, dtype: torch.dtype = BF16, max_tokens: int = 67
) -> list[Any]:
    """`use(workspace)` on two ranks; results by rank. An exception of one is the test's."""
    info = probe_flashinfer(fake, "0.7.2")
    decision = decide(2, flashinfer=info, backend="auto")

    def main(comm: ThreadComm) -> Any:
        with open_workspace(
            decision,
            comm,
            hidden_size=HIDDEN,
            dtype=dtype,
            device=CPU,
            max_tokens=max_tokens,
            flashinfer=info,
        ) as workspace:
            return use(workspace)

    results = on_threads(2, main)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def expected(num_tokens: int, dtype: torch.dtype, weight_bias: float) -> tuple[torch.Tensor, torch.Tensor]:
    parts = torch.stack([operands(num_tokens, rank, dtype)[0] for rank in range(2)])
    _, residual, weight = operands(num_tokens, 0, dtype)
    return add_rmsnorm(sum_in_rank_order(parts), residual, weight, EPS, weight_bias)


@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32])
def test_a_call_passes_what_this_flashinfer_takes(fake: FakeFlashInfer, dtype: torch.dtype):
    def use(workspace: Workspace) -> Any:
        fake.calls.clear()
        return workspace.run(*operands(3, workspace.rank, dtype), EPS, 1.0)

    want = expected(3, dtype, 1.0)
    for residual, normed in with_workspaces(fake, use, dtype=dtype):
        assert torch.equal(residual, want[0])
        torch.testing.assert_close(normed, want[1], rtol=2e-2 if dtype == BF16 else 2e-3, atol=0)
    call = fake.calls[-1]
    assert call["pattern"] == 1
    assert call["launch_with_pdl"] is True
    if is_old(fake):
        assert "fp32_acc" not in call
        assert torch.equal(call["rms_gamma"], fold_weight(operands(3, 0, dtype)[2], 1.0))
    else:
        assert call["trigger_completion_at_end"] is True
        assert call["fp32_acc"] is (dtype != torch.float32)
        assert call["weight_bias"] == 1.0
        assert call["use_oneshot"] is True
        assert call["output"] is not None, "without it FlashInfer allocates one"


def test_small_batches_may_let_the_next_kernel_start_early(fake: FakeFlashInfer):
    def use(workspace: Workspace) -> None:
        workspace.max_early_tokens = 2
        fake.calls.clear()
        for num_tokens in (2, 3):
            workspace.run(*operands(num_tokens, workspace.rank, BF16), EPS, 1.0)

    with_workspaces(fake, use)
    asked = {(len(call["input"]), call.get("trigger_completion_at_end")) for call in fake.calls}
    assert asked == ({(2, None), (3, None)} if is_old(fake) else {(2, False), (3, True)})


def test_a_weight_is_folded_once(fake: FakeFlashInfer, monkeypatch: pytest.MonkeyPatch):
    folded = []
    monkeypatch.setattr(
        buffers, "fold_weight", lambda w, bias: folded.append(bias) or contract.fold_weight(w, bias)
    )

    def use(workspace: Workspace) -> None:
        for num_tokens in (1, 3, 3):
            partial, residual, _ = operands(num_tokens, workspace.rank, BF16)
            workspace.run(partial, residual, weights[workspace.rank], EPS, 1.0)
        workspace.run(partial, residual, weights[workspace.rank], EPS, 0.0)

    weights = [operands(1, 0, BF16)[2] for _ in range(2)]
    monkeypatch.setattr(selftest, "run", lambda *_: None)
    with_workspaces(fake, use)
    assert folded == ([1.0, 1.0] if is_old(fake) else [])


def test_folding_adds_in_float32_and_rounds_once():
    weight = torch.tensor([2**-9, -(2**-8), 0.5], dtype=BF16)
    assert fold_weight(weight, 1.0).tolist() == [1.0, 0.99609375, 1.5]


def test_outputs_may_be_given_and_the_residual_may_be_updated_in_place(fake: FakeFlashInfer):
    def use(workspace: Workspace) -> Any:
        partial, residual, weight = operands(3, workspace.rank, BF16)
        normed = torch.full_like(partial, torch.nan)
        got = workspace.run(partial, residual, weight, EPS, 0.0, residual, normed)
        return got[0] is residual, got[1] is normed, residual, normed

    want = expected(3, BF16, 0.0)
    for same_residual, same_normed, residual, normed in with_workspaces(fake, use):
        assert same_residual
        assert same_normed
        assert torch.equal(residual, want[0])
        assert torch.equal(normed, want[1])


def test_closing_gives_everything_back(fake: FakeFlashInfer, monkeypatch: pytest.MonkeyPatch):
    freed = []
    cudart = SimpleNamespace(cudaFree=lambda pointer: freed.append(pointer.value))
    monkeypatch.setitem(sys.modules, "flashinfer.comm.cuda_ipc", SimpleNamespace(cudart=cudart))

    def use(workspace: Workspace) -> None:
        (mine,) = [made for made in fake.workspaces if made.rank == workspace.rank]
        mine.metadata = {"control_flag_ptr": 4096 + workspace.rank}

    with_workspaces(fake, use)
    assert all(made.destroyed and made._internal_workspace is None for made in fake.workspaces)
    assert {id(handles) for handles in fake.released} == {id(made.ipc_handles) for made in fake.workspaces}
    assert sorted(freed) == [4096, 4097]


def test_a_flag_that_a_later_flashinfer_frees_is_not_freed_twice(monkeypatch: pytest.MonkeyPatch):
    fake = FakeFlashInfer()
    info = probe_flashinfer(fake, "0.8.0")
    made = SimpleNamespace(metadata={"control_flag_ptr": 4096}, destroy=lambda: None)
    monkeypatch.setitem(sys.modules, "flashinfer.comm.cuda_ipc", SimpleNamespace())  # any use of it fails
    FlashInferApi(info, fake).destroy_workspace(made)


def test_the_raw_kernel_is_reachable(fake: FakeFlashInfer):
    for rank, raw in enumerate(with_workspaces(fake, lambda workspace: workspace.raw())):
        assert raw.function == "the kernel"
        assert (raw.world_size, raw.rank) == (2, rank)
        assert raw.workspace_ptrs.dtype == torch.int64


def test_a_workspace_grows_by_the_same_votes(fake: FakeFlashInfer):
    def use(workspace: Workspace) -> Any:
        assert not workspace.sufficient(20)
        workspace.ensure(7)
        workspace.ensure(20)
        assert workspace.sufficient(20)
        return workspace.run(*operands(20, workspace.rank, BF16), EPS, 0.0)

    want = expected(20, BF16, 0.0)
    for got in with_workspaces(fake, use, max_tokens=8):
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    assert sorted(made.max_tokens for made in fake.workspaces) == [8, 8, 20, 20]
    assert all(made.destroyed for made in fake.workspaces), "close() frees the outgrown ones too"


def test_a_growth_that_fails_is_not_tried_again_and_keeps_what_there_is(
    fake: FakeFlashInfer, monkeypatch: pytest.MonkeyPatch
):
    tried = []

    def try_allocation(sizes: tuple[int, ...], _device: Any) -> None:
        tried.append(sizes)
        if sizes[0] > 2 * 8 * HIDDEN * 2:
            raise MemoryError("too much")

    monkeypatch.setattr(buffers, "try_allocation", try_allocation)

    def use(workspace: Workspace) -> Any:
        for _ in range(2):
            with pytest.raises(WorkspaceError, match=r"rank 0 .*too much.*rank 1"):
                workspace.ensure(9)
        return workspace.run(*operands(8, workspace.rank, BF16), EPS, 0.0)

    want = expected(8, BF16, 0.0)
    for got in with_workspaces(fake, use, max_tokens=8):
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    assert len(tried) == 4, "two ranks, twice: at the start and once more"


def test_growing_during_capture_is_refused(fake: FakeFlashInfer):
    def use(workspace: Workspace) -> None:
        workspace.ensure(8)  # there is room: nothing to make, so nothing to refuse
        with pytest.raises(RuntimeError, match="growing a workspace while a CUDA graph is being captured"):
            workspace.ensure(68)

    info = probe_flashinfer(fake, "0.7.2")
    decision = decide(2, flashinfer=info, backend="auto")
    opened = on_threads(2, lambda comm: open_it(decision, comm, info))
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
    ):
        use(opened[0])
        with pytest.raises(RuntimeError, match="opening a workspace while a CUDA graph is being captured"):
            open_it(decision, ThreadComm(0, mock.Mock(), [None]), info)


def open_it(decision: FusionDecision, comm: ThreadComm, info: FlashInferInfo, **changes: Any) -> Workspace:
    values: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "dtype": BF16,
        "device": CPU,
        "max_tokens": 8,
        "flashinfer": info,
    }
    return open_workspace(decision, comm, **{**values, **changes})


def test_operands_that_do_not_fit_the_workspace_are_refused(fake: FakeFlashInfer):
    def use(workspace: Workspace) -> None:
        partial, residual, weight = operands(8, workspace.rank, BF16)
        wide = torch.ones(8, 2 * HIDDEN, dtype=BF16)
        for arguments, kind, message in (
            ((torch.ones(9, HIDDEN, dtype=BF16),) * 2 + (weight,), ValueError, "1 to 8 tokens, got 9"),
            ((partial[:0], residual[:0], weight), ValueError, "1 to 8 tokens, got 0"),
            ((wide, wide, wide[0]), ValueError, f"hidden size {2 * HIDDEN}, the workspace is for {HIDDEN}"),
            (
                (partial.half(), residual.half(), weight.half()),
                TypeError,
                "float16, the workspace is for torch.bfloat16",
            ),
            ((partial, residual[:3], weight), ValueError, r"residual must have shape \(8, 64\)"),
            (
                (partial.to("meta"), residual.to("meta"), weight.to("meta")),
                ValueError,
                "on meta, the workspace on cpu",
            ),
        ):
            with pytest.raises(kind, match=message):
                workspace.run(arguments[0], arguments[1], arguments[2], EPS, 1.0)
        with pytest.raises(ValueError, match=r"out_normed must have shape \(8, 64\).*got \(3, 64\)"):
            workspace.run(partial, residual, weight, EPS, 1.0, None, partial[:3])
        calls = len(fake.calls)
        workspace.close()
        workspace.close()
        assert not workspace.sufficient(1)
        for use_after_close in (lambda: workspace.run(partial, residual, weight, EPS, 1.0), workspace.raw):
            with pytest.raises(RuntimeError, match="the workspace is closed"):
                use_after_close()
        assert len(fake.calls) == calls

    with_workspaces(fake, use, max_tokens=8)


def test_what_no_vote_is_needed_for_is_refused_at_once():
    comm = ThreadComm(0, mock.Mock(), [None, None])
    for changes, message in (
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({}, "the reference backend needs device_group"),
    ):
        with pytest.raises(ValueError, match=message):
            open_it(decide(2), comm, FlashInferInfo(), **changes)
    with pytest.raises(TypeError, match="dtype must be one of"):
        open_it(decide(2), comm, FlashInferInfo(), dtype=torch.float64)


def test_a_flashinfer_that_makes_too_little_is_found(fake: FakeFlashInfer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.fusion_ranks.FakeWorkspace.is_buffer_size_sufficient", too_small)
    with pytest.raises(WorkspaceError, match="too small for 67 tokens"):
        with_workspaces(fake, lambda _: None)
    assert all(made.destroyed for made in fake.workspaces)


def too_small(self: Any, tp_size: int, num_tokens: int, hidden_dim: int, dtype: torch.dtype) -> bool:
    del self, tp_size, num_tokens, hidden_dim, dtype
    return False


# FlashInfer missing, unreadable, installed.


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (FlashInferInfo(reason="FlashInfer cannot be imported"), "cannot be imported; pip install"),
        (probe_flashinfer(SimpleNamespace(), "0.2.0"), "it has no create_allreduce_fusion_workspace"),
        (
            probe_flashinfer(SimpleNamespace(create_allreduce_fusion_workspace=max), "0.2.0"),
            "the signature of create_allreduce_fusion_workspace cannot be read",
        ),
        (
            FlashInferInfo(True, "0.5.0", True, frozenset({"backend"}), frozenset(), frozenset(), ""),
            "over WORLD only",
        ),
    ],
    ids=["none", "too old", "compiled functions without a signature", "no communicator"],
)
def test_a_flashinfer_that_cannot_be_used_is_a_reason_and_an_install_command(
    info: FlashInferInfo, message: str
):
    with pytest.raises(ImportError, match=message) as caught:
        FlashInferApi(info, SimpleNamespace())
    assert "pip install" in str(caught.value)
    decision = decide(2, flashinfer=info, backend="auto")
    assert not decision.enabled
    assert decision.decided_by == "FlashInfer"


def test_auto_is_never_passed_on():
    fake = FakeFlashInfer()
    api = FlashInferApi(probe_flashinfer(fake), fake)
    with pytest.raises(ValueError, match="'trtllm' or 'mnnvl', got 'auto'"):
        api.create_workspace(
            "auto", ThreadComm(0, mock.Mock(), [None]), hidden_size=8, dtype=BF16, max_tokens=1
        )


@pytest.fixture(scope="module")
def installed() -> FlashInferInfo:
    pytest.importorskip("flashinfer", exc_type=ImportError)
    return probe_flashinfer()


def test_the_installed_flashinfer_takes_all_that_is_passed(installed: FlashInferInfo):
    """A parameter that was renamed would be left out silently: `fp32_acc` without a word."""
    api = FlashInferApi(installed, mock.Mock())
    workspace = mock.Mock(world_size=2)
    partial, residual, weight = operands(3, 0, BF16)
    everything = mock.patch.object(flashinfer_api, "_taken", lambda values, _params: values)
    with everything:
        api.run(workspace, partial, residual, weight, EPS, 1.0, residual, partial)
        api.create_workspace(
            "trtllm", ThreadComm(0, mock.Mock(), [None, None]), hidden_size=64, dtype=BF16, max_tokens=3
        )
    passed = set(api.comm.allreduce_fusion.call_args.kwargs)
    assert passed <= installed.op_params
    created = set(api.comm.create_allreduce_fusion_workspace.call_args.kwargs)
    assert created - installed.workspace_params <= {"use_fp32_lamport"}, "which older versions take"
    checked = set(api.comm.create_allreduce_fusion_workspace().is_buffer_size_sufficient.call_args.kwargs)
    assert checked == installed.sufficient_params - {"use_oneshot"}


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_one_shot_is_chosen_as_flashinfer_does(installed: FlashInferInfo, world_size: int):
    assert installed.has_fused_op
    from flashinfer.comm.trtllm_ar import _should_use_oneshot

    for hidden_size in (2048, 7168):
        for dtype in (BF16, torch.float32):
            for num_tokens in (world_size + 1, 64, 67, 500, 2048, 20000):
                chosen = use_oneshot(num_tokens, hidden_size, dtype.itemsize, world_size)
                assert chosen == _should_use_oneshot(num_tokens, hidden_size, dtype, world_size)
    assert use_oneshot(world_size, 1 << 40, 4, world_size), "two-shot needs more tokens than ranks"


@pytest.mark.filterwarnings("ignore:use the unified API:DeprecationWarning")
@pytest.mark.parametrize(("max_tokens", "dtype"), [(67, BF16), (2048, torch.float32), (1 << 20, BF16)])
def test_the_sizes_tried_are_those_that_flashinfer_allocates(
    installed: FlashInferInfo, monkeypatch: pytest.MonkeyPatch, max_tokens: int, dtype: torch.dtype
):
    assert installed.has_fused_op
    from flashinfer.comm import trtllm_ar

    sizes = []

    class StopError(Exception):
        pass

    class Recorder:
        def __init__(self, *, buf_size: int, enable_multicast: bool, **_: Any) -> None:
            sizes.append(buf_size)
            assert enable_multicast is False

        def get_buffer_ptrs_host(self) -> list[int]:
            if len(sizes) == 3:
                raise StopError
            return [0]

    monkeypatch.setattr(trtllm_ar, "SymmDeviceMemory", Recorder)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(StopError):
        trtllm_ar.trtllm_create_ipc_workspace_for_all_reduce_fusion(
            0, 2, max_tokens, 2048, use_fp32_lamport=dtype == torch.float32, create_metadata=True,
            comm_backend=mock.Mock(), use_symm_dev_mem=True,
        )  # fmt: skip
    assert tuple(sizes) == buffer_bytes(2, max_tokens, 2048, dtype)


def test_a_tried_allocation_is_given_back_also_when_it_does_not_fit(monkeypatch: pytest.MonkeyPatch):
    held: list[int] = []
    ok, full = SimpleNamespace(name="CUDA_SUCCESS"), SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY")
    room = 10 << 20

    def create(size: int, _prop: Any, _flags: int) -> Any:
        if sum(held) + size > room:
            return full, None
        held.append(size)
        return ok, size

    driver = mock.MagicMock()
    driver.CUresult.CUDA_SUCCESS = ok
    driver.cuMemGetAllocationGranularity = lambda _prop, _flags: (ok, 2 << 20)
    driver.cuMemCreate = create
    driver.cuMemRelease = held.remove
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    try_allocation((1 << 20, 4096, 3 << 20), 0)
    assert held == []
    with pytest.raises(
        MemoryError, match=r"allocating 6291456 bytes on GPU 3 failed with CUDA_ERROR_OUT_OF_MEMORY"
    ):
        try_allocation((5 << 20, 5 << 20), 3)
    assert held == []


# The self-test: right answers pass, wrong ones do not.


def answer(case: selftest.Case, world_size: int, ranks: list[int]) -> None:
    """Fills a case's outputs with the contract's answer for the parts of `ranks`."""
    shape, dtype = tuple(case.partial.shape), case.partial.dtype
    parts = torch.stack([selftest._partial(case.index, rank, world_size, shape, dtype) for rank in ranks])
    outputs = add_rmsnorm(
        sum_in_rank_order(parts), case.residual, case.weight, selftest.EPS, case.weight_bias
    )
    case.out_residual.copy_(outputs[0])
    case.out_normed.copy_(outputs[1])


def cases(world_size: int, dtype: torch.dtype, max_tokens: int = 67) -> list[selftest.Case]:
    return selftest.prepare(
        world_size=world_size,
        rank=0,
        hidden_size=1024,
        dtype=dtype,
        device=CPU,
        token_counts=selftest.token_counts(max_tokens, max_tokens),
        choice_counts=[3],
    )


@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32])
@pytest.mark.parametrize("world_size", [2, 4, 8, 16])
def test_the_self_test_accepts_the_contract(dtype: torch.dtype, world_size: int):
    for case in cases(world_size, dtype):
        with pytest.raises(RuntimeError, match="are wrong"):
            selftest.check(case, world_size)  # still NaN
        answer(case, world_size, list(range(world_size)))
        selftest.check(case, world_size)


@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32])
def test_the_self_test_finds_another_ranks_data_and_single_elements(dtype: torch.dtype):
    for case in cases(4, dtype):
        for ranks in ([0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 3, 3]):
            answer(case, 4, ranks)
            with pytest.raises(RuntimeError, match="of the residual are wrong"):
                selftest.check(case, 4)
        for output, name in ((case.out_residual, "residual"), (case.out_normed, "norm")):
            for value in (torch.nan, torch.inf, 9.0):
                answer(case, 4, [0, 1, 2, 3])
                output[-1, -1] = value
                with pytest.raises(
                    RuntimeError, match=f"1 of {output.numel()} values of the {name} are wrong"
                ):
                    selftest.check(case, 4)


def test_the_self_test_covers_one_odd_and_full_batches():
    assert selftest.token_counts(2048, 2048) == [1, 3, 64, 2048, 1]
    assert selftest.token_counts(8192, 512) == [1, 3, 64, 512, 8192, 1]  # each kernel's largest
    assert selftest.token_counts(2, 512) == [1, 2, 1]
    assert selftest.token_counts(1, 512) == [1, 1]


def test_the_self_test_covers_choices_where_a_kernel_adds_them():
    adds = SimpleNamespace(adds_choices=lambda num_tokens: num_tokens > 512)
    assert selftest.choice_counts(cast("Any", adds), 8192, 512) == [515]
    assert selftest.choice_counts(cast("Any", adds), 514, 512) == [514]
    assert selftest.choice_counts(cast("Any", adds), 512, 512) == []


@pytest.mark.parametrize("wrong", [False, True])
def test_the_self_test_gives_choices_to_who_adds_them(wrong: bool):
    """A stand-in on one rank, which has the other's part from its seed, and adds choices as the reference does."""

    def run(
        partial: Tensor, residual: Tensor, weight: Tensor, eps: float, bias: float, *outputs: Tensor
    ) -> None:
        index = next(case.index for case in tested if case.out_normed is outputs[1])
        parts = torch.stack((partial, selftest._partial(index, 1, 2, tuple(partial.shape), BF16)))
        for out, value in zip(
            outputs, add_rmsnorm(sum_in_rank_order(parts), residual, weight, eps, bias), strict=True
        ):
            out.copy_(value)

    def run_choices(choices: ChoiceParts, *rest: Any) -> None:
        experts = torch.zeros_like(choices.experts) if wrong else choices.experts
        run(plain_combine(choices.parts, experts, num_experts=choices.num_experts), *rest)

    tested = cases(2, BF16)
    assert [case.choices is not None for case in tested] == [False] * (len(tested) - 1) + [True]
    stand_in = cast("Any", SimpleNamespace(run=run, run_choices=run_choices))
    if wrong:
        with pytest.raises(RuntimeError, match="values of the residual are wrong for 3 tokens"):
            selftest.run(stand_in, tested, 2)
    else:
        selftest.run(stand_in, tested, 2)
