"""Every rule by itself, in pairs, and against an account of the rules that was written a second time."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config import FusionError, FusionRequest, HardwareInfo, ModelFacts, ParallelLayout
from shared_config.rules import ARCHITECTURES, RULES
from tests.fusion_cases import BREAKS, FLASHINFER, H200, Case, failed_rules

RULE_NAMES = [
    "deterministic",
    "fusion",
    "architecture",
    "compute capability",
    "tensor parallel",
    "attention data parallel",
    "single node",
    "device ban",
    "MoE all-to-all backend",
    "context parallel",
    "FlashInfer",
    "multicast",
    "group size",
    "row alignment",
    "peer access",
]


def test_a_good_case_fuses_and_reports_every_rule_in_order() -> None:
    decision = Case().decide()
    assert decision.enabled
    assert (decision.backend, decision.decided_by) == ("trtllm", "all rules")
    assert [rule.name for rule in decision.rules] == RULE_NAMES
    assert len(RULES) == len(RULE_NAMES)
    assert all(rule.passed and rule.why and rule.source for rule in decision.rules)


@pytest.mark.parametrize("rule", BREAKS)
def test_each_rule_refuses_by_itself(rule: str) -> None:
    decision = Case().change(**BREAKS[rule]).decide()
    assert failed_rules(decision) == [rule]
    assert not decision.enabled
    assert (decision.backend, decision.decided_by) == ("unfused", rule)
    assert decision.reason.startswith(rule)


def test_one_rank_has_no_sum_and_no_group() -> None:
    decision = Case().change(layout={"tp_size": 1}).decide()
    assert failed_rules(decision) == ["tensor parallel", "group size"]
    assert decision.decided_by == "tensor parallel"


def test_every_rule_but_context_parallel_can_refuse() -> None:
    assert {*BREAKS, "tensor parallel", "context parallel"} == set(RULE_NAMES)


PAIRS = [
    pair
    for pair in combinations(BREAKS, 2)
    if not any(
        set(BREAKS[pair[0]].get(part, {})) & set(BREAKS[pair[1]].get(part, {})) for part in BREAKS[pair[1]]
    )
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_of_two_failing_rules_both_are_reported_and_the_first_decides(first: str, second: str) -> None:
    decision = Case().change(**BREAKS[first]).change(**BREAKS[second]).decide()
    assert failed_rules(decision) == [first, second]
    assert decision.decided_by == first


@pytest.mark.parametrize("rule", sorted(set(BREAKS) - {"deterministic", "fusion"}))
def test_mode_on_raises_and_names_the_rule(rule: str) -> None:
    case = Case().change(**BREAKS[rule])
    on = replace(case, request=replace(case.request, mode="on"))
    with pytest.raises(FusionError, match=rule) as caught:
        on.decide()
    assert caught.value.decision is not None
    assert caught.value.decision.decided_by == rule


def test_mode_on_names_every_failing_rule() -> None:
    case = Case().change(request={"mode": "on"}, hardware={"sm": 80}, layout={"nnodes": 2})
    with pytest.raises(FusionError, match=r"compute capability \(80\).*single node \(2\).*use fusion='auto'"):
        case.decide()


def test_mode_on_fuses_where_every_rule_holds() -> None:
    assert Case().change(request={"mode": "on"}).decide().enabled


@pytest.mark.parametrize("broken", [{}, {"hardware": {"sm": 80}}], ids=["good", "another rule fails too"])
def test_deterministic_overrides_mode_on_with_a_warning_that_names_both(broken: dict) -> None:
    decision = Case().change(**broken).change(request={"mode": "on", "deterministic": True}).decide()
    assert not decision.enabled
    assert decision.decided_by == "deterministic"
    (warning,) = decision.warnings
    assert "deterministic=True" in warning
    assert "fusion='on'" in warning


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_deterministic_warns_only_when_it_overrides(mode: str) -> None:
    decision = Case().change(request={"mode": mode, "deterministic": True}).decide()
    assert decision.decided_by == "deterministic"
    assert decision.warnings == ()


@pytest.mark.parametrize(
    ("sm", "fuses"),
    [(80, False), (89, False), (90, True), (100, True), (103, True), (120, False), (None, False)],
)
def test_compute_capability(sm: int | None, fuses: bool) -> None:
    decision = Case().change(hardware={"sm": sm}).decide()
    assert decision.enabled is fuses
    assert failed_rules(decision) == ([] if fuses else ["compute capability"])


@pytest.mark.parametrize(
    ("gpu_name", "version", "banned"),
    [
        ("NVIDIA H20", "0.6.11", True),
        ("NVIDIA H20-3e", "0.6.11", True),
        ("nvidia h20", "0.6.11", True),
        ("NVIDIA H20", "0.6.11.post1", False),  # the ban names the versions that it covers
        ("NVIDIA H20", "0.7.2.post1", False),
        ("NVIDIA H20", "0.6.11rc1", True),
        ("NVIDIA H20", "", True),  # an unknown version is not known to work
        ("NVIDIA H200", "0.6.11", False),
        ("NVIDIA H200 NVL", "0.6.11", False),
        ("NVIDIA GH200 480GB", "0.6.11", False),
        ("NVIDIA H100 80GB HBM3", "0.6.11", False),
        ("NVIDIA B200", "0.6.11", False),
    ],
)
def test_the_h20_ban_is_not_a_ban_of_the_h200(gpu_name: str, version: str, banned: bool) -> None:
    decision = Case().change(hardware={"gpu_name": gpu_name}, flashinfer={"version": version}).decide()
    assert failed_rules(decision) == (["device ban"] if banned else [])


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_listed_architectures_fuse(architecture: str) -> None:
    assert Case().change(model={"architecture": architecture}).decide().enabled


@pytest.mark.parametrize("attn_cp_size", [1, 2])
def test_context_parallel_of_any_size_holds(attn_cp_size: int) -> None:
    assert Case().change(layout={"attn_cp_size": attn_cp_size}).decide().enabled


@pytest.mark.parametrize(
    ("layout", "fuses"),
    [
        (ParallelLayout(tp_size=2), True),
        (ParallelLayout(tp_size=8), True),
        (ParallelLayout(tp_size=16), True),
        (ParallelLayout(tp_size=3), False),
        (ParallelLayout(tp_size=32), False),
        (ParallelLayout(tp_size=32, attn_cp_size=2), False),  # 16 for attention, 32 for the MoE
        (ParallelLayout(tp_size=32, attn_cp_size=2, moe_dp_size=2), True),
        (ParallelLayout(tp_size=2, attn_cp_size=2), True),  # one rank for attention, two for the MoE
        (ParallelLayout(tp_size=2, attn_cp_size=2, moe_dp_size=2), False),  # one rank everywhere
    ],
)
def test_group_sizes_that_the_kernel_is_built_for(layout: ParallelLayout, fuses: bool) -> None:
    assert failed_rules(replace(Case(), layout=layout).decide()) == ([] if fuses else ["group size"])


@pytest.mark.parametrize(
    ("hidden_size", "itemsize", "aligned"), [(8, 2, True), (4, 2, False), (4, 4, True), (1001, 4, False)]
)
def test_a_row_is_a_multiple_of_16_bytes(hidden_size: int, itemsize: int, aligned: bool) -> None:
    decision = Case().change(model={"hidden_size": hidden_size, "itemsize": itemsize}).decide()
    assert failed_rules(decision) == ([] if aligned else ["row alignment"])


@pytest.mark.parametrize(
    ("flashinfer", "why"),
    [
        (
            {"installed": False, "version": "", "reason": "FlashInfer cannot be imported (gone)"},
            "cannot be imported",
        ),
        ({"has_fused_op": False, "reason": "it has no allreduce_fusion"}, "it has no allreduce_fusion"),
        ({"workspace_params": FLASHINFER.workspace_params - {"comm_backend"}}, "does not take comm_backend"),
        ({"op_params": FLASHINFER.op_params - {"norm_out", "rms_eps"}}, "does not take norm_out, rms_eps"),
    ],
)
def test_flashinfer_must_take_what_the_call_needs(flashinfer: dict, why: str) -> None:
    decision = Case().change(flashinfer=flashinfer).decide()
    assert decision.decided_by == "FlashInfer"
    assert why in decision.reason


def test_flashinfer_may_lack_what_the_call_can_do_without() -> None:
    older = FLASHINFER.op_params - {"weight_bias", "fp32_acc", "trigger_completion_at_end"}
    assert Case().change(flashinfer={"op_params": older}).decide().enabled


def mnnvl_case(**request: object) -> Case:
    b200 = HardwareInfo("cuda", "NVIDIA GB200", sm=100, num_gpus=4, p2p=True, multicast=True)
    return Case(hardware=b200, request=FusionRequest(backend="mnnvl", allow_multicast=True)).change(
        request=request
    )


def test_mnnvl_needs_multicast_and_consent() -> None:
    assert mnnvl_case().decide().backend == "mnnvl"
    assert failed_rules(mnnvl_case(allow_multicast=False).decide()) == ["multicast"]
    for available in (False, None):
        case = mnnvl_case().change(hardware={"multicast": available})
        assert failed_rules(case.decide()) == ["multicast"]


def test_only_mnnvl_on_sm100_spans_nodes() -> None:
    assert mnnvl_case().change(layout={"nnodes": 2}).decide().enabled
    assert mnnvl_case().change(layout={"nnodes": 2}, hardware={"sm": 103}).decide().enabled
    on_sm90 = mnnvl_case().change(layout={"nnodes": 2}, hardware={"sm": 90})
    assert failed_rules(on_sm90.decide()) == ["single node"]


@pytest.mark.parametrize(
    ("nnodes", "allow_multicast", "sm", "backend", "decided_by"),
    [
        (1, True, 100, "trtllm", "all rules"),
        (2, True, 100, "mnnvl", "all rules"),
        (2, False, 100, "unfused", "single node"),
        (2, True, 90, "unfused", "single node"),
    ],
)
def test_auto_backend_takes_multicast_only_by_consent(
    nnodes: int, allow_multicast: bool, sm: int, backend: str, decided_by: str
) -> None:
    case = mnnvl_case(backend="auto", allow_multicast=allow_multicast)
    decision = case.change(layout={"nnodes": nnodes}, hardware={"sm": sm}).decide()
    assert (decision.backend, decision.decided_by) == (backend, decided_by)


LAPTOP = {"hardware": {"device": "cpu", "gpu_name": "", "sm": None, "num_gpus": 0, "p2p": None}}
NO_FLASHINFER = {"installed": False, "version": "", "has_fused_op": False, "op_params": frozenset()}


def test_the_reference_backend_runs_on_a_laptop() -> None:
    case = Case().change(**LAPTOP, flashinfer=NO_FLASHINFER, request={"backend": "reference"})
    decision = case.change(layout={"tp_size": 3}, model={"hidden_size": 67}).decide()
    assert decision.backend == "reference"
    assert {rule.name for rule in decision.rules if "reference backend" in rule.why} == {
        "compute capability",
        "device ban",
        "FlashInfer",
        "multicast",
        "group size",
        "row alignment",
        "peer access",
    }


@pytest.mark.parametrize(
    "rule",
    [
        "deterministic",
        "fusion",
        "architecture",
        "attention data parallel",
        "single node",
        "MoE all-to-all backend",
    ],
)
def test_the_reference_backend_keeps_the_rules_about_model_layout_and_request(rule: str) -> None:
    case = Case().change(**LAPTOP, flashinfer=NO_FLASHINFER).change(**BREAKS[rule])
    decision = case.change(request={"backend": "reference"}).decide()
    assert failed_rules(decision) == [rule]


def test_auto_never_means_the_reference_backend() -> None:
    assert Case().change(**LAPTOP, flashinfer=NO_FLASHINFER).decide().backend == "unfused"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mode": "maybe"}, "mode must be one of auto, on, off, got 'maybe'"),
        ({"backend": "nccl"}, "backend must be one of .*, got 'nccl'"),
        ({"max_bytes": 0}, "max_bytes must be at least 1"),
    ],
)
def test_a_request_refuses_values_it_does_not_know(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        FusionRequest(**arguments)


def test_model_facts_need_a_size() -> None:
    with pytest.raises(ValueError, match="hidden_size must be an integer of at least 1, got 0"):
        ModelFacts("Qwen3NextForCausalLM", 0)


CASES = st.builds(
    Case,
    model=st.builds(
        ModelFacts,
        architecture=st.sampled_from(["Qwen3NextForCausalLM", "GptOssForCausalLM", "LlamaForCausalLM"]),
        hidden_size=st.sampled_from([2048, 7168, 63, 8]),
        itemsize=st.sampled_from([2, 4]),
    ),
    layout=st.sampled_from(
        [
            ParallelLayout(),
            ParallelLayout(tp_size=2),
            ParallelLayout(tp_size=3),
            ParallelLayout(tp_size=4, attn_cp_size=2),
            ParallelLayout(tp_size=4, attn_dp_size=4),
            ParallelLayout(tp_size=8, ep_size=2, moe_dp_size=4),
            ParallelLayout(tp_size=8, nnodes=2),
        ]
    ),
    hardware=st.builds(
        HardwareInfo,
        device=st.just("cuda"),
        gpu_name=st.sampled_from(["NVIDIA H200", "NVIDIA H20", "NVIDIA H20-3e", "NVIDIA B200"]),
        sm=st.sampled_from([80, 89, 90, 100, 103, 120]),
        p2p=st.sampled_from([True, False, None]),
        multicast=st.sampled_from([True, False, None]),
    ),
    flashinfer=st.sampled_from(
        [
            FLASHINFER,
            replace(FLASHINFER, version="0.6.9"),
            replace(FLASHINFER, installed=False),
            replace(FLASHINFER, op_params=frozenset()),
        ]
    ),
    request=st.builds(
        FusionRequest,
        mode=st.sampled_from(["auto", "off"]),
        deterministic=st.booleans(),
        backend=st.sampled_from(["auto", "trtllm", "mnnvl"]),
        allow_multicast=st.booleans(),
        moe_a2a_backend=st.sampled_from(["none", "deepep"]),
    ),
)


def expected_verdict(case: Case) -> bool:
    """The rules once more, as one boolean, without their code."""
    layout, hardware, request = case.layout, case.hardware, case.request
    sm100 = hardware.sm in (100, 103)
    mnnvl = request.backend == "mnnvl" or (
        request.backend == "auto" and layout.nnodes > 1 and sm100 and request.allow_multicast
    )
    groups = {layout.attn_tp_size, layout.moe_reduce_size}
    return (
        not request.deterministic
        and request.mode != "off"
        and case.model.architecture != "LlamaForCausalLM"
        and (hardware.sm == 90 or sm100)
        and layout.tp_size > 1
        and layout.attn_dp_size == 1
        and (layout.nnodes == 1 or (mnnvl and sm100))
        and not (
            hardware.gpu_name.startswith("NVIDIA H20")
            and hardware.gpu_name != "NVIDIA H200"
            and (case.flashinfer.version == "0.6.9")
        )
        and request.moe_a2a_backend == "none"
        and case.flashinfer.installed
        and bool(case.flashinfer.op_params)
        and (not mnnvl or (hardware.multicast is True and request.allow_multicast))
        and groups <= {1, 2, 4, 8, 16}
        and groups != {1}
        and case.model.hidden_size * case.model.itemsize % 16 == 0
        and hardware.p2p is not False
    )


@settings(max_examples=300, deadline=None)
@given(case=CASES)
def test_the_verdict_is_the_conjunction_of_the_rules(case: Case) -> None:
    decision = case.decide()
    assert decision.enabled == all(rule.passed for rule in decision.rules) == expected_verdict(case)
    failed = failed_rules(decision)
    assert decision.decided_by == (failed[0] if failed else "all rules")
    assert decision.backend in (("trtllm", "mnnvl") if decision.enabled else ("unfused",))
    on = replace(case, request=replace(case.request, mode="on"))
    still_failing = set(failed) - {"fusion"}
    if still_failing and not case.request.deterministic:
        with pytest.raises(FusionError):
            on.decide()
    else:
        assert on.decide().enabled == (not still_failing)


def test_good_hardware_is_what_the_cases_say() -> None:
    assert H200.sm_family == 90
    assert replace(H200, sm=103).sm_family == 100
    assert HardwareInfo().sm_family is None
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        HardwareInfo(device="tpu")
