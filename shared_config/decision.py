"""The one answer to "does this run fuse, and does this batch": resolved once, then shared and obeyed.

resolve_fusion(...)            start-up: every rule, from plain values
FusionDecision.fuses(...)      each batch: arithmetic on the answer, no probing
FusionDecision.without_fusion  start-up went wrong: off for good, with the reason kept
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace

from shared_config.hardware import FlashInferInfo, HardwareInfo
from shared_config.layout import ParallelLayout
from shared_config.limits import ByteLimit, PairLimit, byte_limit, pair_limit
from shared_config.rules import RULES, Facts, FusibleModel, FusionRequest, RuleResult

SIDES = ("attention", "mlp")


class FusionWarning(UserWarning):
    """The category under which an engine emits a decision's `warnings`, once, on rank 0."""


@dataclass(frozen=True)
class BatchAnswer:
    """Whether one reduction of one batch runs fused, and why."""

    fuses: bool
    reason: str


@dataclass(frozen=True)
class FusionDecision:
    """The verdict with everything behind it; equal on all ranks, or those ranks must not run together.

    `backend` is "unfused" unless `enabled`. `decided_by` names the first rule that failed ("all rules" when
    none did). `max_bytes` is the largest `num_tokens * hidden_size * itemsize` that one call of the backend may fuse.
    Calls of more than `pair.above` bytes are for the project's own kernel, up to `pair.max_bytes` (0: it takes none).
    """

    enabled: bool
    backend: str
    reason: str
    decided_by: str
    rules: tuple[RuleResult, ...]
    warnings: tuple[str, ...]
    mode: str
    deterministic: bool
    max_bytes: int
    max_bytes_source: str
    pair: PairLimit
    hidden_size: int
    layout: ParallelLayout

    @property
    def max_fused_bytes(self) -> int:
        """Of one call, in whichever kernel."""
        return self.pair.max_bytes or self.max_bytes

    def max_tokens(self, itemsize: int) -> int:
        """The most tokens of `itemsize`-byte elements that one call may fuse."""
        return self._tokens(self.max_fused_bytes, itemsize)

    def max_backend_tokens(self, itemsize: int) -> int:
        """The most tokens for which the backend's kernel is taken; `pair_allreduce` takes more, where it takes any."""
        return self._tokens(self.pair.above if self.pair.max_bytes else self.max_bytes, itemsize)

    def _tokens(self, num_bytes: int, itemsize: int) -> int:
        if itemsize < 1:
            raise ValueError(f"itemsize must be at least 1 byte, got {itemsize}")
        return num_bytes // (self.hidden_size * itemsize)

    def fuses(
        self,
        num_tokens: int,
        *,
        side: str,
        itemsize: int = 2,
        is_last_layer: bool = False,
        final_norm_takes_sum: bool = True,
        owed_ranks: tuple[int, ...] | None = None,
        op_ranks: tuple[int, ...] | None = None,
    ) -> BatchAnswer:
        """Answer for one reduction: `side` "attention" (before the MLP) or "mlp" (before the next layer).

        `itemsize` is the bytes of one element. `owed_ranks` are the ranks that the sum is owed to, `op_ranks`
        those that the op reduces over: give both or neither (the layout's own groups).
        The conditions are SGLang's, PR 21249 for those about groups.
        """
        if side not in SIDES:
            raise ValueError(f"side must be 'attention' or 'mlp', got {side!r}")
        if (owed_ranks is None) != (op_ranks is None):
            raise ValueError("owed_ranks and op_ranks must be given together, got only one of them")
        limit = self.max_tokens(itemsize)
        group = self.layout.attn_tp_size if side == "attention" else self.layout.moe_reduce_size
        refusal = ""
        if not self.enabled:
            refusal = f"fusion is off for this run: {self.reason}"
        elif num_tokens < 1:
            refusal = "the batch has no tokens"
        elif num_tokens > limit:
            refusal = f"num_tokens {num_tokens} is above the limit of {limit} ({self.max_fused_bytes} bytes)"
        elif group == 1:
            refusal = f"the {side} group has one rank: nothing to reduce"
        elif owed_ranks is not None and op_ranks is not None and sorted(owed_ranks) != sorted(op_ranks):
            refusal = f"the sum is owed to ranks {sorted(owed_ranks)}, the op reduces over {sorted(op_ranks)}"
        elif side == "mlp":
            refusal = self._mlp_refusal(is_last_layer and not final_norm_takes_sum, op_ranks)
        return BatchAnswer(not refusal, refusal or f"num_tokens {num_tokens} is within the limit of {limit}")

    def _mlp_refusal(self, nobody_takes_sum: bool, op_ranks: tuple[int, ...] | None) -> str:
        layout = self.layout
        op_size = layout.moe_reduce_size if op_ranks is None else len(op_ranks)
        if nobody_takes_sum:
            return "the last layer's sum has no norm to go into"
        if layout.attn_cp_size > layout.moe_dp_size:
            return (
                f"attn_cp_size {layout.attn_cp_size} is above moe_dp_size {layout.moe_dp_size}: "
                "the gather over context-parallel ranks would be skipped"
            )
        if layout.ep_size > 1 and layout.moe_tp_size > 1 and op_size != layout.moe_reduce_size:
            return (
                f"ep_size {layout.ep_size} and MoE-TP size {layout.moe_tp_size} need one group of "
                f"{layout.moe_reduce_size} ranks, and the op reduces over {op_size}"
            )
        return ""

    def without_fusion(self, reason: str, decided_by: str) -> FusionDecision:
        """A copy that never fuses. A decision that is off already keeps its first reason."""
        if not self.enabled:
            return self
        failure = RuleResult(decided_by, False, None, reason, "start-up")
        return replace(
            self,
            enabled=False,
            backend="unfused",
            reason=reason,
            decided_by=decided_by,
            rules=(*self.rules, failure),
        )

    def without_pair(self, reason: str) -> FusionDecision:
        """A copy whose calls all run in the backend's kernel, up to its limit."""
        return replace(self, pair=PairLimit(0, 0, reason))

    def to_json(self) -> str:
        """One canonical line: equal decisions give equal text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> FusionDecision:
        """The inverse of `to_json`; raises `ValueError` when `text` is not such a line."""
        try:
            values = json.loads(text)
            values["rules"] = tuple(RuleResult(**rule) for rule in values["rules"])
            values["warnings"] = tuple(values["warnings"])
            values["layout"] = ParallelLayout(**values["layout"])
            values["pair"] = PairLimit(**values["pair"])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a FusionDecision in JSON: {error}") from error

    @property
    def digest(self) -> str:
        """Equal on ranks that agree in every field, so one short exchange finds a rank that does not."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


class FusionError(ValueError):
    """`mode="on"` was asked for and a rule fails; `decision` holds the refusal with all rules."""

    def __init__(self, message: str, decision: FusionDecision | None = None) -> None:
        super().__init__(message)
        self.decision = decision


def resolve_fusion(
    model: FusibleModel,
    layout: ParallelLayout,
    hardware: HardwareInfo,
    flashinfer: FlashInferInfo,
    request: FusionRequest,
) -> FusionDecision:
    """Apply every rule once. Pure: equal inputs give equal answers on every rank and in both frameworks.

    `deterministic` wins over `mode="on"`, with a warning that names both. Otherwise `mode="on"` raises
    `FusionError`, naming every rule that fails.
    """
    backend = _resolve_backend(layout, hardware, request)
    facts = Facts(model, layout, hardware, flashinfer, request, backend)
    rules = tuple(rule(facts) for rule in RULES)
    failed = [rule for rule in rules if not rule.passed]
    limit = _limit(layout, hardware, request)
    warnings = ()
    if request.deterministic and request.mode == "on":
        warnings = ("deterministic=True overrides fusion='on': this run does not fuse; drop one of the two",)
    decision = FusionDecision(
        enabled=not failed,
        backend="unfused" if failed else backend,
        reason=_explain(failed[0]) if failed else f"every rule passed: fusing with the {backend} backend",
        decided_by=failed[0].name if failed else "all rules",
        rules=rules,
        warnings=warnings,
        mode=request.mode,
        deterministic=request.deterministic,
        max_bytes=limit.max_bytes,
        max_bytes_source=limit.source,
        pair=_pair_limit(model, layout, hardware, request, backend),
        hidden_size=model.hidden_size,
        layout=layout,
    )
    if failed and request.mode == "on" and not request.deterministic:
        reasons = "; ".join(_explain(rule) for rule in failed)
        raise FusionError(f"fusion='on' cannot be met: {reasons}; use fusion='auto' or 'off'", decision)
    return decision


def _resolve_backend(layout: ParallelLayout, hardware: HardwareInfo, request: FusionRequest) -> str:
    """What "auto" means: trtllm, or mnnvl where only it can work and the operator allows multicast."""
    if request.backend != "auto":
        return request.backend
    spans_nodes = layout.nnodes > 1 and hardware.sm_family == 100
    return "mnnvl" if spans_nodes and request.allow_multicast else "trtllm"


def _limit(layout: ParallelLayout, hardware: HardwareInfo, request: FusionRequest) -> ByteLimit:
    if request.max_bytes is not None:
        return ByteLimit(request.max_bytes, "set by the user")
    return byte_limit(hardware.sm_family, (layout.attn_tp_size, layout.moe_reduce_size))


def _pair_limit(
    model: FusibleModel, layout: ParallelLayout, hardware: HardwareInfo, request: FusionRequest, backend: str
) -> PairLimit:
    if not request.own_kernels:
        return PairLimit(0, 0, "kernels='plain' was asked for")
    if backend != "trtllm":
        return PairLimit(0, 0, f"pair_allreduce goes with the trtllm backend, not with {backend}")
    if model.itemsize != 2:
        return PairLimit(0, 0, f"pair_allreduce is for bfloat16, not for elements of {model.itemsize} bytes")
    sizes = (layout.attn_tp_size, layout.moe_reduce_size)
    return pair_limit(hardware.sm_family, sizes, request.max_bytes)


def _explain(rule: RuleResult) -> str:
    value = "unknown" if rule.value is None else rule.value
    return f"{rule.name} ({value}): {rule.why}"
