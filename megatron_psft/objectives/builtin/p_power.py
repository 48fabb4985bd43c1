"""A power of the probability: between cross-entropy and dft."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_psft.objectives.declare import Setting, Settings, objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats

P_POWER_Q = Setting(
    name="p_power_q",
    default=1.0,
    range="positive",
    help="q of the loss (1 - p^q) / q. Towards 0 it is cross-entropy; 1 has the gradient of dft.",
)


@objective(
    title="a power of the probability, between cross-entropy and dft",
    formula="(1 - p^q) / q",
    source="arXiv 2510.00526",
    settings=(P_POWER_Q,),
)
def p_power_loss(stats: LabelStats, given: LabelInputs, config: Settings) -> Tensor:
    """(1 - p^q) / q with gradient -p^q grad l (arXiv 2510.00526, the general family; GaotangLi/Beyond-Log-Likelihood,
    `GeneralFamily`)."""
    q: float = config.p_power_q
    return -(q * stats.log_probs).expm1() / q
