"""The rules of the fusion: each is one pure function of plain values with one named, explained answer.

The order of `RULES` is the order of the report. What the user asked for comes first, then the rules that
SGLang checks, then what FlashInfer's kernel itself needs. Fusion is possible when every rule passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from shared_config.hardware import FlashInferInfo, HardwareInfo
from shared_config.layout import ParallelLayout

ARCHITECTURES = frozenset(
    {
        "DeepseekV3ForCausalLM",
        "DeepseekV32ForCausalLM",
        "GptOssForCausalLM",
        "GlmMoeDsaForCausalLM",
        "Glm4MoeForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "KimiK25ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5ForConditionalGeneration",
    }
)
SM_FAMILIES = (90, 100)
GROUP_SIZES = (2, 4, 8, 16)
ROW_ALIGNMENT_BYTES = 16
MODES = ("auto", "on", "off")
BACKENDS = ("auto", "trtllm", "mnnvl", "reference")

# Without these the call cannot be made; every other parameter is passed only where it is taken.
NEEDED_WORKSPACE_PARAMS = frozenset(
    {"backend", "world_size", "rank", "max_token_num", "hidden_dim", "dtype", "comm_backend"}
)
NEEDED_OP_PARAMS = frozenset(
    {"input", "workspace", "pattern", "residual_in", "residual_out", "norm_out", "rms_gamma", "rms_eps"}
)


class FusibleModel(Protocol):
    """What the rules need to know about a model; `Qwen3NextConfig` and `ModelFacts` both have it."""

    @property
    def architecture(self) -> str: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def itemsize(self) -> int: ...


@dataclass(frozen=True)
class ModelFacts:
    """A model of any architecture, reduced to what the rules look at."""

    architecture: str
    hidden_size: int
    itemsize: int = 2  # bytes of one activation

    def __post_init__(self) -> None:
        for name in ("hidden_size", "itemsize"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


@dataclass(frozen=True)
class FusionRequest:
    """What the user asks for. `max_bytes` replaces the measured limit of one fused call. `own_kernels` allows
    `pair_allreduce` where it was measured to be faster; FlashInfer's kernel is none of the project's own."""

    mode: str = "auto"
    deterministic: bool = False
    backend: str = "auto"
    allow_multicast: bool = False
    max_bytes: int | None = None
    moe_a2a_backend: str = "none"
    own_kernels: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("mode", MODES), ("backend", BACKENDS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"fusion {name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(
                f"max_bytes must be at least 1 byte, got {self.max_bytes}: use mode='off' to never fuse"
            )


@dataclass(frozen=True)
class RuleResult:
    """One rule's answer: `value` was looked at, `why` says what follows.

    `source` is who set the rule, as project#number for a public issue or pull request.
    """

    name: str
    passed: bool
    value: str | int | bool | None
    why: str
    source: str


@dataclass(frozen=True)
class DeviceBan:
    """GPUs on which the fused op is known to fail, for the FlashInfer versions that are known to fail."""

    name_has: str
    name_lacks: str  # keeps the ban off a longer name that contains the first one
    flashinfer_versions: str  # a version specifier; an unknown version counts as covered
    why: str
    source: str

    def covers(self, gpu_name: str, flashinfer_version: str) -> bool:
        name = gpu_name.upper()
        if self.name_has not in name or self.name_lacks in name:
            return False
        try:
            version = Version(flashinfer_version)
        except InvalidVersion:
            return True
        return SpecifierSet(self.flashinfer_versions).contains(version, prereleases=True)


DEVICE_BANS = (
    DeviceBan(
        name_has="H20",
        name_lacks="H200",
        # SGLang pinned 0.6.11.post1 when it ran the fusion on an H20 again and dropped its check. Which
        # release fixed it is not recorded, so everything older stays banned.
        flashinfer_versions="<0.6.11.post1",
        why="FlashInfer's all-reduce module does not build there",
        source="flashinfer#2204, lifted in sglang#26470",
    ),
)


@dataclass(frozen=True)
class Facts:
    """All inputs of a rule. `backend` is the request's, with "auto" resolved."""

    model: FusibleModel
    layout: ParallelLayout
    hardware: HardwareInfo
    flashinfer: FlashInferInfo
    request: FusionRequest
    backend: str


REFERENCE_WHY = "the reference backend needs no GPU and no FlashInfer"


def deterministic(facts: Facts) -> RuleResult:
    asked = facts.request.deterministic
    why = (
        "the kernel's launch shape depends on the number of tokens, so its bits may too"
        if asked
        else "not asked for"
    )
    return RuleResult("deterministic", not asked, asked, why, "sglang#24629")


def requested_mode(facts: Facts) -> RuleResult:
    mode = facts.request.mode
    why = {
        "auto": "fuse when every rule holds",
        "on": "a rule that fails is an error",
        "off": "switched off by the user",
    }[mode]
    return RuleResult("fusion", mode != "off", mode, why, "request")


def architecture(facts: Facts) -> RuleResult:
    name = facts.model.architecture
    known = name in ARCHITECTURES
    why = "it is on the list" if known else "it is not on the list of architectures that fuse"
    return RuleResult("architecture", known, name, why, "sglang#22664")


def compute_capability(facts: Facts) -> RuleResult:
    sm = facts.hardware.sm
    passed = facts.hardware.sm_family in SM_FAMILIES
    if facts.backend == "reference":
        passed, why = True, REFERENCE_WHY
    elif sm is None:
        why = "no CUDA GPU was found"
    else:
        why = f"SM{sm} is {'' if passed else 'not '}of the SM90 or SM100 family"
    return RuleResult("compute capability", passed, sm, why, "sglang#22664")


def tensor_parallel(facts: Facts) -> RuleResult:
    tp_size = facts.layout.tp_size
    why = "there are partial sums to reduce" if tp_size > 1 else "one rank has nothing to reduce"
    return RuleResult("tensor parallel", tp_size > 1, tp_size, why, "sglang#22664")


def attention_data_parallel(facts: Facts) -> RuleResult:
    size = facts.layout.attn_dp_size
    why = "off" if size == 1 else "ranks hold different tokens, so sums are not just all-reduced"
    return RuleResult("attention data parallel", size == 1, size, why, "sglang#22664")


def single_node(facts: Facts) -> RuleResult:
    nnodes = facts.layout.nnodes
    if nnodes == 1:
        passed, why = True, "all ranks share one node"
    elif facts.backend != "mnnvl":
        passed, why = False, f"the {facts.backend} backend works within one node"
    elif facts.hardware.sm_family != 100:
        passed, why = False, "mnnvl spans nodes only on the SM100 family"
    else:
        passed, why = True, "mnnvl spans nodes on the SM100 family"
    return RuleResult("single node", passed, nnodes, why, "flashinfer#2006")


def device_ban(facts: Facts) -> RuleResult:
    gpu_name = facts.hardware.gpu_name
    source = DEVICE_BANS[0].source
    if facts.backend == "reference":
        return RuleResult("device ban", True, gpu_name, REFERENCE_WHY, source)
    for ban in DEVICE_BANS:
        if ban.covers(gpu_name, facts.flashinfer.version):
            have = facts.flashinfer.version or "unknown"
            why = f"{ban.why} with FlashInfer {ban.flashinfer_versions} (here: {have})"
            return RuleResult("device ban", False, gpu_name, why, ban.source)
    return RuleResult("device ban", True, gpu_name, "no ban covers this GPU and FlashInfer", source)


def moe_all_to_all(facts: Facts) -> RuleResult:
    name = facts.request.moe_a2a_backend
    why = "the MoE leaves partial sums" if name == "none" else "all-to-all combines the experts' sums itself"
    return RuleResult("MoE all-to-all backend", name == "none", name, why, "sglang#22664")


def context_parallel(facts: Facts) -> RuleResult:
    size = facts.layout.attn_cp_size
    return RuleResult("context parallel", True, size, "any size will do", "sglang#21249")


def flashinfer_api(facts: Facts) -> RuleResult:
    info = facts.flashinfer
    version = info.version or None
    if facts.backend == "reference":
        return RuleResult("FlashInfer", True, version, REFERENCE_WHY, "sglang#26197")
    missing = sorted((NEEDED_WORKSPACE_PARAMS - info.workspace_params) | (NEEDED_OP_PARAMS - info.op_params))
    if not info.installed:
        passed, why = False, info.reason or "FlashInfer is not installed"
    elif not info.has_fused_op:
        passed, why = False, info.reason or "it has no fused all-reduce"
    elif missing:
        passed, why = False, f"its fused all-reduce does not take {', '.join(missing)}"
    else:
        passed, why = True, "it takes what the call needs"
    return RuleResult("FlashInfer", passed, version, why, "sglang#26197")


def multicast(facts: Facts) -> RuleResult:
    available = facts.hardware.multicast
    if facts.backend == "reference":
        passed, why = True, REFERENCE_WHY
    elif facts.backend != "mnnvl":
        passed, why = True, f"{facts.backend} does not use NVLink multicast"
    elif not facts.request.allow_multicast:
        passed, why = False, "mnnvl uses NVLink multicast, and allow_multicast was not given"
    elif not available:
        state = "is not known to have" if available is None else "has no"
        passed, why = False, f"mnnvl needs NVLink multicast, and this machine {state} it"
    else:
        passed, why = True, "available, and the operator consents"
    return RuleResult("multicast", passed, available, why, "vllm#45800")


def group_size(facts: Facts) -> RuleResult:
    sizes = {"attention": facts.layout.attn_tp_size, "MoE": facts.layout.moe_reduce_size}
    value = ", ".join(f"{name} {size}" for name, size in sizes.items())
    wrong = [size for size in sizes.values() if size != 1 and size not in GROUP_SIZES]
    if all(size == 1 for size in sizes.values()):
        passed, why = False, "every group has one rank: there is nothing to reduce"
    elif facts.backend == "reference":
        passed, why = True, REFERENCE_WHY
    elif wrong:
        passed, why = False, f"the kernel is not built for {wrong[0]} ranks, only for 2, 4, 8 and 16"
    else:
        passed, why = True, "the kernel is built for 2, 4, 8, 16"
    return RuleResult("group size", passed, value, why, "flashinfer 0.7.2")


def row_alignment(facts: Facts) -> RuleResult:
    row_bytes = facts.model.hidden_size * facts.model.itemsize
    aligned = row_bytes % ROW_ALIGNMENT_BYTES == 0
    if facts.backend == "reference":
        passed, why = True, REFERENCE_WHY
    else:
        passed, why = (
            aligned,
            f"a row is {'' if aligned else 'not '}a multiple of {ROW_ALIGNMENT_BYTES} bytes",
        )
    return RuleResult("row alignment", passed, row_bytes, why, "flashinfer 0.7.2")


def peer_access(facts: Facts) -> RuleResult:
    p2p = facts.hardware.p2p
    if facts.backend == "reference":
        passed, why = True, REFERENCE_WHY
    elif p2p is None:
        passed, why = True, "start-up will tell"
    else:
        passed, why = p2p, f"the GPUs {'can' if p2p else 'cannot'} read each other's memory"
    return RuleResult("peer access", passed, p2p, why, "flashinfer 0.7.2")


RULES: tuple[Callable[[Facts], RuleResult], ...] = (
    deterministic,
    requested_mode,
    architecture,
    compute_capability,
    tensor_parallel,
    attention_data_parallel,
    single_node,
    device_ban,
    moe_all_to_all,
    context_parallel,
    flashinfer_api,
    multicast,
    group_size,
    row_alignment,
    peer_access,
)
