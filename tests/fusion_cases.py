"""A machine, model and layout on which every rule holds, and one change for each rule that breaks it alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from shared_config import (
    FlashInferInfo,
    FusionDecision,
    FusionRequest,
    HardwareInfo,
    ModelFacts,
    ParallelLayout,
    resolve_fusion,
)

H200 = HardwareInfo("cuda", "NVIDIA H200", sm=90, num_gpus=8, p2p=True, nvlinks=18, multicast=False)
FLASHINFER = FlashInferInfo(
    installed=True,
    version="0.7.2.post1",
    has_fused_op=True,
    workspace_params=frozenset(
        {"backend", "world_size", "rank", "max_token_num", "hidden_dim", "dtype", "comm_backend", "group"}
    ),
    op_params=frozenset(
        {
            "input",
            "workspace",
            "pattern",
            "residual_in",
            "residual_out",
            "norm_out",
            "rms_gamma",
            "rms_eps",
            "trigger_completion_at_end",
            "weight_bias",
            "fp32_acc",
        }
    ),
    sufficient_params=frozenset({"tp_size", "num_tokens", "hidden_dim", "dtype", "use_oneshot"}),
    reason="",
)


@dataclass(frozen=True)
class Case:
    """All inputs of `resolve_fusion`; as it stands, every rule holds."""

    model: ModelFacts = field(default_factory=lambda: ModelFacts("Qwen3NextForCausalLM", 2048))
    layout: ParallelLayout = field(default_factory=lambda: ParallelLayout(tp_size=4))
    hardware: HardwareInfo = H200
    flashinfer: FlashInferInfo = FLASHINFER
    request: FusionRequest = field(default_factory=FusionRequest)

    def change(self, **parts: dict[str, Any]) -> Case:
        """A copy with fields of its parts replaced: `change(hardware={"sm": 80})`."""
        return replace(self, **{part: replace(getattr(self, part), **new) for part, new in parts.items()})

    def decide(self) -> FusionDecision:
        return resolve_fusion(self.model, self.layout, self.hardware, self.flashinfer, self.request)


# Rule -> the smallest change of a good case that fails this rule and no other.
BREAKS: dict[str, dict[str, dict[str, Any]]] = {
    "deterministic": {"request": {"deterministic": True}},
    "fusion": {"request": {"mode": "off"}},
    "architecture": {"model": {"architecture": "LlamaForCausalLM"}},
    "compute capability": {"hardware": {"sm": 89}},
    "attention data parallel": {"layout": {"attn_dp_size": 2}},
    "single node": {"layout": {"nnodes": 2}},
    "device ban": {"hardware": {"gpu_name": "NVIDIA H20"}, "flashinfer": {"version": "0.6.9"}},
    "MoE all-to-all backend": {"request": {"moe_a2a_backend": "deepep"}},
    "FlashInfer": {"flashinfer": {"has_fused_op": False, "reason": "its signature cannot be read"}},
    "multicast": {"request": {"backend": "mnnvl"}},
    "group size": {"layout": {"tp_size": 6}},
    "row alignment": {"model": {"hidden_size": 2047}},
    "peer access": {"hardware": {"p2p": False}},
}


def failed_rules(decision: FusionDecision) -> list[str]:
    return [rule.name for rule in decision.rules if not rule.passed]
