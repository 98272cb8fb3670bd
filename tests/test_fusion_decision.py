"""The decision as a value: its limit, its answer for a batch, its JSON, and its end when start-up fails."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from shared_config import FusionDecision, FusionRequest, ParallelLayout, Qwen3NextConfig, resolve_fusion
from shared_config.limits import MEASURED_LIMITS, MIB, UNMEASURED_LIMIT, PairLimit, byte_limit
from tests.fusion_cases import BREAKS, Case
from tests.test_config import HUB_CONFIG

MEASURED = Case().change(layout={"tp_size": 2})  # 2048 tokens x 2048 hidden x 2 bytes


def test_the_measured_limit_is_in_bytes() -> None:
    decision = MEASURED.decide()
    assert decision.pair.max_bytes == 32 * MIB
    assert decision.max_tokens(2) == 8192
    assert decision.max_tokens(4) == 4096
    assert "measured on 2x H200" in decision.pair.source


def test_without_the_kernel_for_long_calls_the_backends_own_limit_holds() -> None:
    decision = MEASURED.decide().without_pair("no compiler on rank 1")
    assert decision.max_bytes == 8 * MIB
    assert decision.max_tokens(2) == decision.max_backend_tokens(2) == 2048
    assert decision.pair == PairLimit(0, 0, "no compiler on rank 1")
    assert "measured on 2x H200" in decision.max_bytes_source
    assert not decision.fuses(2049, side="mlp").fuses


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"request": {"own_kernels": False}}, "kernels='plain' was asked for"),
        ({"request": {"backend": "reference"}}, "goes with the trtllm backend, not with reference"),
        ({"model": {"itemsize": 4}}, "for bfloat16, not for elements of 4 bytes"),
        ({"layout": {"tp_size": 4}}, "for groups of 2 ranks on SM90"),
        ({"layout": {"tp_size": 4, "moe_dp_size": 2}}, "for groups of 2 ranks"),
        ({"hardware": {"sm": 100}}, "for groups of 2 ranks on SM90"),
        ({"request": {"max_bytes": 2 * MIB}}, "for more than 2097152 bytes, and the user's limit is 2097152"),
    ],
)
def test_the_kernel_for_long_calls_has_its_own_conditions(change: dict, why: str) -> None:
    decision = MEASURED.change(**change).decide()
    assert decision.pair.max_bytes == 0
    assert why in decision.pair.source
    assert decision.max_tokens(2) == decision.max_backend_tokens(2) == decision.max_bytes // 4096


def test_long_calls_are_for_the_own_kernel() -> None:
    decision = MEASURED.decide()
    assert decision.max_backend_tokens(2) == 512
    assert decision.fuses(8192, side="mlp").fuses
    refused = decision.fuses(8193, side="mlp")
    assert not refused.fuses
    assert "above the limit of 8192 (33554432 bytes)" in refused.reason
    more = MEASURED.change(request={"max_bytes": 64 * MIB}).decide()
    assert (more.max_tokens(2), more.max_backend_tokens(2)) == (16384, 512)
    assert more.pair.source == "set by the user"


@pytest.mark.parametrize("change", [{"layout": {"tp_size": 4}}, {"hardware": {"sm": 100}}])
def test_what_was_not_measured_gets_a_careful_limit_that_says_so(change: dict) -> None:
    decision = MEASURED.change(**change).decide()
    assert decision.max_bytes == UNMEASURED_LIMIT.max_bytes < 8 * MIB
    assert "not measured" in decision.max_bytes_source


def test_the_smallest_limit_of_the_groups_holds() -> None:
    assert byte_limit(90, (2, 2)) == byte_limit(90, (1, 2)) == MEASURED_LIMITS[90, 2]
    assert byte_limit(90, (2, 4)) == byte_limit(None, (2,)) == byte_limit(90, (1, 1)) == UNMEASURED_LIMIT


def test_the_user_sets_the_limit() -> None:
    decision = MEASURED.change(request={"max_bytes": 3 * 4096 + 4095}).decide()
    assert decision.max_tokens(2) == 3
    assert decision.max_bytes_source == "set by the user"


@pytest.mark.parametrize("itemsize", [0, -2])
def test_an_element_has_bytes(itemsize: int) -> None:
    with pytest.raises(ValueError, match=f"itemsize must be at least 1 byte, got {itemsize}"):
        MEASURED.decide().max_tokens(itemsize)


@pytest.mark.parametrize("side", ["attention", "mlp"])
@pytest.mark.parametrize(
    ("num_tokens", "itemsize", "fuses"),
    [
        (-1, 2, False),
        (0, 2, False),
        (1, 2, True),
        (8192, 2, True),
        (8193, 2, False),
        (4096, 4, True),
        (4097, 4, False),
    ],
)
def test_a_batch_fuses_within_the_limit(side: str, num_tokens: int, itemsize: int, fuses: bool) -> None:
    answer = MEASURED.decide().fuses(num_tokens, side=side, itemsize=itemsize)
    assert answer.fuses is fuses
    assert answer.reason


def test_a_run_that_is_off_gives_its_reason_for_every_batch() -> None:
    decision = MEASURED.change(**BREAKS["architecture"]).decide()
    answer = decision.fuses(1, side="attention")
    assert not answer.fuses
    assert decision.reason in answer.reason


def test_the_last_layer_fuses_only_when_the_final_norm_takes_the_sum() -> None:
    decision = MEASURED.decide()
    assert decision.fuses(1, side="mlp", is_last_layer=True).fuses
    refused = decision.fuses(1, side="mlp", is_last_layer=True, final_norm_takes_sum=False)
    assert not refused.fuses
    assert "last layer" in refused.reason
    assert decision.fuses(1, side="mlp", is_last_layer=False, final_norm_takes_sum=False).fuses
    assert decision.fuses(1, side="attention", is_last_layer=True, final_norm_takes_sum=False).fuses


@pytest.mark.parametrize("side", ["attention", "mlp"])
def test_the_op_must_reduce_over_the_ranks_that_are_owed(side: str) -> None:
    decision = MEASURED.decide()
    assert decision.fuses(1, side=side, owed_ranks=(0, 1), op_ranks=(0, 1)).fuses
    refused = decision.fuses(1, side=side, owed_ranks=(0, 1), op_ranks=(0, 2))
    assert not refused.fuses
    assert "[0, 1]" in refused.reason
    assert "[0, 2]" in refused.reason


def test_a_gather_over_context_parallel_ranks_must_not_be_skipped() -> None:
    decision = replace(Case(), layout=ParallelLayout(tp_size=4, attn_cp_size=2)).decide()
    assert decision.fuses(1, side="attention").fuses
    refused = decision.fuses(1, side="mlp")
    assert not refused.fuses
    assert "attn_cp_size 2 is above moe_dp_size 1" in refused.reason
    same_slices = replace(Case(), layout=ParallelLayout(tp_size=4, attn_cp_size=2, moe_dp_size=2)).decide()
    assert same_slices.fuses(1, side="mlp").fuses


def test_expert_and_tensor_parallel_experts_need_one_group() -> None:
    decision = replace(Case(), layout=ParallelLayout(tp_size=4, ep_size=2)).decide()
    assert decision.fuses(1, side="mlp").fuses
    assert decision.fuses(1, side="mlp", owed_ranks=(0, 1, 2, 3), op_ranks=(0, 1, 2, 3)).fuses
    refused = decision.fuses(1, side="mlp", owed_ranks=(0, 1), op_ranks=(0, 1))
    assert not refused.fuses
    assert "one group of 4 ranks" in refused.reason
    only_experts = replace(Case(), layout=ParallelLayout(tp_size=2, ep_size=2)).decide()
    assert only_experts.fuses(1, side="mlp", owed_ranks=(0, 1), op_ranks=(0, 1)).fuses


def test_a_group_of_one_owes_nothing() -> None:
    decision = replace(Case(), layout=ParallelLayout(tp_size=2, attn_cp_size=2)).decide()
    assert decision.enabled
    refused = decision.fuses(1, side="attention")
    assert not refused.fuses
    assert "one rank" in refused.reason


def test_a_batch_question_must_be_complete() -> None:
    decision = MEASURED.decide()
    with pytest.raises(ValueError, match="side must be 'attention' or 'mlp', got 'moe'"):
        decision.fuses(1, side="moe")
    with pytest.raises(ValueError, match="owed_ranks and op_ranks must be given together"):
        decision.fuses(1, side="mlp", owed_ranks=(0, 1))


@pytest.mark.parametrize("rule", [None, *BREAKS])
def test_json_round_trip(rule: str | None) -> None:
    decision = Case().change(**(BREAKS[rule] if rule else {})).decide()
    again = FusionDecision.from_json(decision.to_json())
    assert again == decision
    assert again.digest == decision.digest
    assert json.loads(decision.to_json())["decided_by"] == decision.decided_by


@pytest.mark.parametrize("text", ["{", "[]", "{}", '"yes"', '{"rules": 3}'])
def test_json_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        FusionDecision.from_json(text)


def test_json_with_a_missing_field_is_refused() -> None:
    values = json.loads(Case().decide().to_json())
    del values["hidden_size"]
    with pytest.raises(ValueError, match=r"not a FusionDecision in JSON: .*hidden_size"):
        FusionDecision.from_json(json.dumps(values))


def test_ranks_that_agree_have_one_digest() -> None:
    assert Case().decide().digest == Case().decide().digest


@pytest.mark.parametrize(
    "change",
    [
        {
            "hardware": {"gpu_name": "NVIDIA H100 80GB HBM3"}
        },  # the verdict is the same, what it rests on is not
        {"flashinfer": {"version": "0.7.3"}},
        {"request": {"max_bytes": 4096}},
        {"layout": {"ep_size": 2}},
        {"model": {"hidden_size": 4096}},
        {"request": {"mode": "on"}},
        {"request": {"own_kernels": False}},
    ],
)
def test_ranks_that_disagree_have_different_digests(change: dict) -> None:
    assert Case().change(**change).decide().digest != Case().decide().digest


def test_a_failed_start_keeps_its_first_reason() -> None:
    decision = MEASURED.decide()
    failed = decision.without_fusion("rank 1 ran out of memory", "workspace allocation")
    assert (failed.enabled, failed.backend) == (False, "unfused")
    assert (failed.reason, failed.decided_by) == ("rank 1 ran out of memory", "workspace allocation")
    assert failed.rules[:-1] == decision.rules
    assert (failed.rules[-1].name, failed.rules[-1].passed) == ("workspace allocation", False)
    assert failed.digest != decision.digest
    assert not failed.fuses(1, side="attention").fuses
    assert FusionDecision.from_json(failed.to_json()) == failed
    assert failed.without_fusion("again", "self-test") is failed
    assert decision.enabled, "the original is not changed"


def test_a_model_config_is_as_good_as_its_facts() -> None:
    case = Case(request=FusionRequest())
    config = Qwen3NextConfig.from_hf(HUB_CONFIG)
    from_config = resolve_fusion(config, case.layout, case.hardware, case.flashinfer, case.request)
    assert from_config == case.decide()
