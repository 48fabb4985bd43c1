"""Entropy-adaptive fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_psft.objectives.declare import Setting, Settings, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats

EAFT_ALPHA = Setting(
    name="eaft_alpha", default=1.0, range="non-negative", help="exponent of the entropy that weighs a token."
)

# About the largest entropy of 20 tokens, log 20, so that weights lie between 0 and 1.
_SCALE = 3.0


@objective(
    title="entropy-adaptive fine-tuning",
    formula="-sg(H20 / 3)^eaft_alpha l, H20 the entropy of the 20 most probable tokens",
    source="arXiv 2601.02151, LLaMA-Factory",
    needs={"top_entropy"},
    settings=(EAFT_ALPHA,),
)
def eaft_loss(stats: LabelStats, given: LabelInputs, config: Settings) -> Tensor:
    """-sg(H / 3)^eaft_alpha l with H the entropy of the 20 most probable tokens, renormalized (arXiv 2601.02151, as
    LLaMA-Factory's `_eaft_cross_entropy` has it)."""
    assert stats.top_entropy is not None
    weight: Tensor = (stats.top_entropy / _SCALE) ** config.eaft_alpha
    return -weight * stats.log_probs
