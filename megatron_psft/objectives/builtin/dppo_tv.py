"""Divergence proximal policy optimization: PSFT within a bound on the probability's change, not on the ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_psft.objectives.declare import Setting, Settings, objective
from megatron_psft.objectives.ratio import policy_ratio

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats

TV_THRESHOLD = Setting(
    name="tv_threshold",
    default=0.15,
    range="positive probability",
    help="a token has no gradient once its probability is this much above the old policy's; with a negative advantage, "
    "below it.",
)
TV_RATIO_CAP = Setting(
    name="tv_ratio_cap",
    default=20.0,
    range="positive",
    help="largest ratio that a token's gradient is multiplied with.",
)


def is_beyond(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor | None, config: Settings) -> Tensor:
    """Where the label's probability has moved by more than `tv_threshold` in the direction of its advantage, bool."""
    change = log_probs.detach().exp() - old_log_probs.exp()
    above = change > config.tv_threshold
    if advantages is None:
        return above
    return (change < -config.tv_threshold).where(advantages < 0, above & (advantages > 0))


@objective(
    title="PSFT within a bound on the change of the probability",
    formula="-sg(min(r, tv_ratio_cap)) A l where p - p_old <= tv_threshold (A < 0: >= -tv_threshold), else 0",
    source="DPPO-Binary-TV, arXiv 2602.04879, verl",
    needs={"old"},
    settings=(TV_THRESHOLD, TV_RATIO_CAP),
    takes_advantages=True,
    is_clipped=is_beyond,
)
def dppo_tv_loss(stats: LabelStats, given: LabelInputs, config: Settings) -> Tensor:
    """-sg(min(r, tv_ratio_cap)) A l within the trust region, 0 beyond it (DPPO, arXiv 2602.04879, its binary
    approximation of the total variation; 0.15 and 20 as in verl's `dppo_tv`, where the authors' own code has 10).

    The divergence of the two policies is taken over two outcomes, the label and all else, whose total variation is
    |p - p_old|. A rare token may thus become many times as probable, which the ratio's clip does not let it, while a
    frequent one is held. The gradient is that of -r A as far as the ratio is below its cap.
    """
    log_probs = stats.log_probs
    old_log_probs = log_probs.detach() if given.old_log_probs is None else given.old_log_probs
    weight = policy_ratio(log_probs.detach(), old_log_probs).clamp(max=config.tv_ratio_cap)
    weight = weight.masked_fill(is_beyond(log_probs, old_log_probs, given.advantages, config), 0.0)
    return -(weight if given.advantages is None else weight * given.advantages) * log_probs
