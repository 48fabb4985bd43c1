"""Proximal SFT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_psft.objectives.declare import Settings, objective
from megatron_psft.objectives.ratio import policy_ratio

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats


@objective(
    title="Proximal SFT",
    formula="-min(r, 1 + clip_ratio_high); with advantages "
    "-min(r A, clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high) A)",
    source="arXiv 2508.17784; PPO, arXiv 1707.06347",
    needs={"old"},
    takes_advantages=True,
)
def psft_loss(stats: LabelStats, given: LabelInputs, config: Settings) -> Tensor:
    """Proximal SFT, -min(r, 1 + clip_ratio_high) with r = pi / pi_old (arXiv 2508.17784, equation of the PSFT
    objective).

    It is PPO's clipped surrogate with advantage 1, for which the lower clip never binds. The gradient is -r * grad l
    where r <= 1 + clip_ratio_high and exactly zero elsewhere. With advantages A it is PPO's own (arXiv 1707.06347,
    equation 7), -min(r A, clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high) A), of which the upper bound can bind only
    where A is positive and the lower only where it is negative.
    """
    log_probs, advantages = stats.log_probs, given.advantages
    old_log_probs = log_probs.detach() if given.old_log_probs is None else given.old_log_probs
    ratio = policy_ratio(log_probs, old_log_probs)
    clipped_above = ratio.clamp(max=1.0 + config.clip_ratio_high)
    if advantages is None:
        return -clipped_above
    clipped_below = ratio.clamp(min=1.0 - config.clip_ratio_low)
    return -clipped_below.where(advantages < 0, clipped_above) * advantages


def is_clipped(ratio: Tensor, advantages: Tensor | None, config: Settings) -> Tensor:
    """Where PPO's clip takes the gradient away, bool."""
    above = ratio > 1.0 + config.clip_ratio_high
    if advantages is None:
        return above
    return (ratio < 1.0 - config.clip_ratio_low).where(advantages < 0, above & (advantages > 0))
