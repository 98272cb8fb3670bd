"""Plain values and rules that both frameworks share. Importing this imports neither torch nor jax."""

from shared_config.decision import (
    BatchAnswer,
    FusionDecision,
    FusionError,
    FusionWarning,
    resolve_fusion,
)
from shared_config.hardware import FlashInferInfo, HardwareInfo
from shared_config.layout import ParallelLayout, RankGroups
from shared_config.model import Qwen3NextConfig
from shared_config.probe import probe_flashinfer, probe_hardware
from shared_config.rules import FusionRequest, ModelFacts, RuleResult

__all__ = [
    "BatchAnswer",
    "FlashInferInfo",
    "FusionDecision",
    "FusionError",
    "FusionRequest",
    "FusionWarning",
    "HardwareInfo",
    "ModelFacts",
    "ParallelLayout",
    "Qwen3NextConfig",
    "RankGroups",
    "RuleResult",
    "probe_flashinfer",
    "probe_hardware",
    "resolve_fusion",
]
