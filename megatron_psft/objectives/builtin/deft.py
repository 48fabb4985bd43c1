"""A power of the probability that follows from how peaked the distribution is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_psft.objectives.declare import Settings, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats


@objective(
    title="p-power with a q that follows the distribution",
    formula="(1 - p^a) / a, a = sg(sum of squared probabilities)",
    source="arXiv 2602.11424",
    needs={"sum_squares"},
)
def deft_loss(stats: LabelStats, given: LabelInputs, config: Settings) -> Tensor:
    """(1 - p^a) / a with a = sg(sum over the vocabulary of p_v^2) (arXiv 2602.11424; luludus/DEFT, without its 1e-6 in
    the denominator: a is at least one over the size of the vocabulary)."""
    assert stats.sum_squares is not None
    return -(stats.sum_squares * stats.log_probs).expm1() / stats.sum_squares
