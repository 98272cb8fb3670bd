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
    op_ulps=Limit(4, "the mean of squares is summed in another order, rsqrt may round differently"),
    layer_rms=Limit(1e-5, "about a hundred roundings of 2^-24 per layer, over the depth of the model"),
    layer_row=Limit(1e-4, "as layer_rms, for the row that happens to cancel most"),
    logits=Limit(1e-4, "the agreement that is asked of both engines with transformers"),
    kl=Limit(1e-6, "second order in the logits' error"),
    top1=Limit(0.999, "only exact ties may flip"),
    top5=Limit(0.999, "only exact ties may flip"),
    tie=Limit(2e-4, "both tokens' logits may be off by the limit for logits"),
)
_BFLOAT16 = Tolerance(
    op_ulps=Limit(1, "float32 inside; the result may round to either neighbour"),
    layer_rms=Limit(
        0.03, "a rounding is 2^-9; XLA keeps float32 between fused operations where PyTorch rounds"
    ),
    layer_row=Limit(0.5, "a router's near tie sends a token to another expert, which changes its row"),
    logits=Limit(0.1, "the last layer's error, and logits are rounded to 8 bits themselves"),
    kl=Limit(0.01, "second order in the logits' error, first order where a router's tie flips"),
    top1=Limit(0.95, "near ties of the two best tokens flip within the logits' error"),
    top5=Limit(0.93, "as top1, for the fifth and sixth token"),
    tie=Limit(0.1, "both tokens' logits carry the limit for logits, in opposite directions at worst by half"),
)
_FLOAT16 = Tolerance(
    op_ulps=Limit(1, "float32 inside; the result may round to either neighbour"),
    layer_rms=Limit(0.005, "as bfloat16, with three more bits"),
    layer_row=Limit(0.5, _BFLOAT16.layer_row.why),
    logits=Limit(0.05, _BFLOAT16.logits.why),
    kl=Limit(0.005, _BFLOAT16.kl.why),
    top1=Limit(0.98, _BFLOAT16.top1.why),
    top5=Limit(0.97, _BFLOAT16.top5.why),
    tie=Limit(0.05, _BFLOAT16.tie.why),
)
TOLERANCES = {"float32": _FLOAT32, "bfloat16": _BFLOAT16, "float16": _FLOAT16}
