"""Importance-weighted SFT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_psft.objectives.declare import Requirement, Setting, Settings, objective
from megatron_psft.objectives.ratio import MAX_LOG_RATIO

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats

IW_LEVEL = Setting(
    name="iw_level",
    default="sequence",
    choices=("sequence", "token"),
    help="one importance weight per record, or one per token.",
)

# From the authors' code: the exponent and the bounds per sequence, the bounds per token.
_SEQUENCE_EXPONENT, _SEQUENCE_BOUNDS, _TOKEN_BOUNDS = 2.0, (0.0, 16.0), (0.2, 1.8)


def _needs(config: Settings) -> frozenset[Requirement]:
    return frozenset({"reference", "records"} if config.iw_level == "sequence" else {"reference"})


@objective(
    title="importance-weighted SFT",
    formula="-sg(w) l, per record w = clip(exp(2 mean(l - f)), 0, 16), per token w = clip(exp(l - f), 0.2, 1.8)",
    source="arXiv 2507.12856, its code",
    needs=_needs,
    settings=(IW_LEVEL,),
)
def iw_sft_loss(stats: LabelStats, given: LabelInputs, config: Settings) -> Tensor:
    """-sg(w) l (arXiv 2507.12856 and emmyqin/iw_sft, `IwSFTLoss`).

    Per sequence w = clip(exp(2 * mean over its label tokens of (l - f)), 0, 16), per token w = clip(exp(l - f), 0.2,
    1.8). (2 is the default of that code; its own training script passes 1.)
    """
    assert given.ref_log_probs is not None
    log_ratio = stats.log_probs.detach() - given.ref_log_probs
    if config.iw_level == "token":
        weight = log_ratio.exp().clamp(*_TOKEN_BOUNDS)
    else:
        assert given.records is not None
        # The clamp before the exponential keeps it finite; the bound of 16 lies far below.
        exponent = (_SEQUENCE_EXPONENT * given.records.means(log_ratio)).clamp(max=MAX_LOG_RATIO)
        weight = exponent.exp().clamp(*_SEQUENCE_BOUNDS)
    return -weight * stats.log_probs
