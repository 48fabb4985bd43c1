"""Cross-entropy of the tokens that are probable already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_psft.objectives.declare import Setting, Settings, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats

PROFIT_THRESHOLD = Setting(
    name="profit_threshold",
    default=0.1,
    range="probability",
    help="tokens of a probability below it have no gradient.",
)


@objective(
    title="cross-entropy of probable tokens only",
    formula="-l where p >= profit_threshold, else 0",
    source="arXiv 2601.09195",
    settings=(PROFIT_THRESHOLD,),
)
def profit_loss(stats: LabelStats, given: LabelInputs, config: Settings) -> Tensor:
    """-l where p >= profit_threshold, 0 elsewhere (arXiv 2601.09195; Utaotao/ProFit, `threshold_direction` higher).

    As in that code under gradient accumulation, tokens that are left out stay in the denominator.
    """
    is_kept = stats.log_probs.detach().exp() >= config.profit_threshold
    return (-stats.log_probs).where(is_kept, 0.0)
