"""How equal two engines have to be, by dtype, each limit with its reason.

Both engines compute the same sums in another order, so they differ by roundings of the dtype; a fault differs by
far more. Limits lie between the two, a few times above what was measured on the trained checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """`value` is the largest error that passes (for shares the smallest share)."""

    value: float
    why: str


@dataclass(frozen=True)
class Tolerance:
    """The limits of one dtype.

    op_ulps: largest error of the op's outputs, in units of the last place.
    layer_rms: RMS error of all rows of a point, relative to its RMS. layer_row: the same of the worst single row.
    logits: largest error of a logit, relative to its row's largest. kl: mean KL divergence in nats.
    top1, top5: share of rows with the same best token; mean overlap of the five best.
    tie: how far apart, relative to the largest logit, two tokens may be and still count as a tie.
    """

    op_ulps: Limit
    layer_rms: Limit
    layer_row: Limit
    logits: Limit
    kl: Limit
    top1: Limit
    top5: Limit
    tie: Limit


_FLOAT32 = Tolerance(
    op_ulps=Limit(8, "the mean of squares is summed in another order, and rsqrt may round differently"),
    layer_rms=Limit(1e-5, "some roundings of 2^-24 a layer, over the depth of the model (measured 6e-7)"),
    layer_row=Limit(1e-4, "as layer_rms, for the row that happens to cancel most"),
    logits=Limit(1e-4, "the agreement that is asked of both engines with transformers"),
    kl=Limit(1e-6, "second order in the logits' error"),
    top1=Limit(0.999, "only ties within rounding may flip"),
    top5=Limit(0.999, "only ties within rounding may flip"),
    tie=Limit(2e-4, "both tokens' logits may be off by the limit for logits"),
)
_BFLOAT16 = Tolerance(
    op_ulps=Limit(1, "float32 inside, so the result rounds to one of two neighbours"),
    layer_rms=Limit(0.04, "roundings of 2^-9, over the depth of the model (measured 0.013)"),
    layer_row=Limit(0.5, "a router's near tie sends a token to another expert, which changes its row"),
    logits=Limit(
        0.2, "the worst of all rows, one that a router sent elsewhere (measured 0.06; nine in ten: 0.01)"
    ),
    kl=Limit(0.005, "second order in the logits' error (measured 0.0003)"),
    top1=Limit(0.95, "the two best tokens flip where they are nearly tied (measured 0.98)"),
    top5=Limit(0.95, "as top1, for the fifth and sixth token (measured 0.99)"),
    tie=Limit(0.03, "three times the logits' error of nine rows in ten"),
)
_FLOAT16 = Tolerance(
    op_ulps=Limit(1, _BFLOAT16.op_ulps.why),
    layer_rms=Limit(0.01, "as bfloat16 with three more bits, but a router's ties flip as they do"),
    layer_row=Limit(0.5, _BFLOAT16.layer_row.why),
    logits=Limit(0.2, _BFLOAT16.logits.why),
    kl=Limit(0.002, "second order in the logits' error"),
    top1=Limit(0.98, "the two best tokens flip where they are nearly tied"),
    top5=Limit(0.98, "as top1, for the fifth and sixth token"),
    tie=Limit(0.01, "as bfloat16, with three more bits"),
)
TOLERANCES = {"float32": _FLOAT32, "bfloat16": _BFLOAT16, "float16": _FLOAT16}
