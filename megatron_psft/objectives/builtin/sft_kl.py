"""Cross-entropy with a penalty on the distance from the initial model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_psft.objectives.declare import Setting, Settings, objective
from megatron_psft.objectives.ratio import k3

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats

KL_COEF = Setting(
    name="kl_coef",
    default=0.5,
    range="non-negative",
    help="factor of the estimated divergence from the initial model.",
)


@objective(
    title="cross-entropy and a penalty on the divergence from the initial model",
    formula="-l + kl_coef k3",
    source="baseline of arXiv 2508.17784",
    needs={"reference"},
    settings=(KL_COEF,),
)
def sft_kl_loss(stats: LabelStats, given: LabelInputs, config: Settings) -> Tensor:
    """-l + kl_coef * k3(l, f): the baseline SFT-KL of arXiv 2508.17784, its divergence estimated on label tokens."""
    assert given.ref_log_probs is not None
    divergence: Tensor = config.kl_coef * k3(stats.log_probs, given.ref_log_probs)
    return -stats.log_probs + divergence
