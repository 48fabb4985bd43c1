"""Dynamic fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_psft.objectives.declare import Settings, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats


@objective(title="dynamic fine-tuning", formula="-sg(p) l", source="arXiv 2508.05629")
def dft_loss(stats: LabelStats, given: LabelInputs, config: Settings) -> Tensor:
    """-sg(p) l (arXiv 2508.05629), which has the gradient of 1 - p."""
    return -stats.log_probs.detach().exp() * stats.log_probs
