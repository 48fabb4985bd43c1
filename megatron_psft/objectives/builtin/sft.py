"""Cross-entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_psft.objectives.declare import Settings, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats


@objective(title="cross-entropy", formula="-A l", takes_advantages=True)
def sft_loss(stats: LabelStats, given: LabelInputs, config: Settings) -> Tensor:
    """Cross-entropy, -l; with advantages A the policy gradient's -A l, which is PSFT's gradient at r = 1."""
    return -stats.log_probs if given.advantages is None else -stats.log_probs * given.advantages
