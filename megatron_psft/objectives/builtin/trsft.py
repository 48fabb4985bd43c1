"""Trust-region SFT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_psft.objectives.declare import Setting, Settings, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats

TRSFT_ALPHA = Setting(
    name="trsft_alpha",
    default=0.1,
    range="positive probability",
    help="tokens of a probability below it have their gradient scaled down by its share of it.",
)


@objective(
    title="trust-region SFT",
    formula="-sg(p / max(p, trsft_alpha)) l",
    source="TRAPO, arXiv 2512.17636",
    settings=(TRSFT_ALPHA,),
)
def trsft_loss(stats: LabelStats, given: LabelInputs, config: Settings) -> Tensor:
    """-sg(p / max(p, trsft_alpha)) l: cross-entropy where p is at least alpha, and of a gradient scaled down by p /
    alpha below (the trust-region SFT of TRAPO, arXiv 2512.17636, whose gradient is grad p / max(p, alpha), alpha 0.1).
    """
    probs = stats.log_probs.detach().exp()
    return -(probs / probs.clamp(min=config.trsft_alpha)) * stats.log_probs
