"""Token losses, pure: tensors in, losses out. No process group, no Megatron-Core, no host copies.

Losses work on any shape, elementwise over label tokens, and on fp32 as on fp64. l is the natural-log probability of a
label, p = exp(l), f its log-probability under the initial model, sg() a factor that carries no gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.loss.labels import ExtraStat, LabelInputs, LabelStats
from megatron_psft.loss.preference import dpo_loss

# exp(20) is far beyond any clip bound and far below the fp32 overflow at exp(88): a diverged policy gives large finite
# numbers.
MAX_LOG_RATIO = 20.0

# iw-sft, from the authors' code: the exponent and the bounds per sequence, the bounds per token.
_IW_SEQUENCE_EXPONENT, _IW_SEQUENCE_BOUNDS, _IW_TOKEN_BOUNDS = 2.0, (0.0, 16.0), (0.2, 1.8)

# eaft: about the largest entropy of 20 tokens, log 20, so that weights lie between 0 and 1.
_EAFT_SCALE = 3.0

Need = Literal["old", "reference", "records"] | ExtraStat
"""What an objective asks for beyond log-probability and entropy: the old policy, the initial model's log-probabilities,
the other tokens of a record, or a statistic."""

TokenLoss = Callable[[LabelStats, LabelInputs, ObjectiveConfig], Tensor]
"""Losses of label tokens, before aggregation."""


def policy_ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """r = pi / pi_old, exactly 1 where the two log-probabilities are equal."""
    return torch.exp(torch.clamp(log_probs - old_log_probs, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def sft_loss(stats: LabelStats, given: LabelInputs, config: ObjectiveConfig) -> Tensor:
    """Cross-entropy, -l; with advantages A the policy gradient's -A l, which is PSFT's gradient at r = 1."""
    return -stats.log_probs if given.advantages is None else -stats.log_probs * given.advantages


def psft_loss(stats: LabelStats, given: LabelInputs, config: ObjectiveConfig) -> Tensor:
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
    clipped_above = torch.clamp(ratio, max=1.0 + config.clip_ratio_high)
    if advantages is None:
        return -clipped_above
    clipped_below = torch.clamp(ratio, min=1.0 - config.clip_ratio_low)
    return -torch.where(advantages < 0, clipped_below, clipped_above) * advantages


def k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """exp(f - l) - (f - l) - 1 (Schulman, "Approximating KL Divergence": k3), never negative, 0 where l = f.

    Over tokens drawn from the policy its mean is KL(pi || initial model). Label tokens are drawn by whoever wrote the
    demonstrations, so that here it is a penalty of that shape on the tokens that are trained, and no unbiased
    estimate. It needs no logits of the initial model.
    """
    log_ratio = torch.clamp(ref_log_probs - log_probs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


def sft_kl_loss(stats: LabelStats, given: LabelInputs, config: ObjectiveConfig) -> Tensor:
    """-l + kl_coef * k3(l, f): the baseline SFT-KL of arXiv 2508.17784, its divergence estimated on label tokens."""
    return -stats.log_probs + config.kl_coef * k3(stats.log_probs, _reference(given))


def dft_loss(stats: LabelStats, given: LabelInputs, config: ObjectiveConfig) -> Tensor:
    """-sg(p) l (arXiv 2508.05629), which has the gradient of 1 - p."""
    return -stats.log_probs.detach().exp() * stats.log_probs


def asft_loss(stats: LabelStats, given: LabelInputs, config: ObjectiveConfig) -> Tensor:
    """dft + kl_coef * k3(l, f) (arXiv 2509.23753).

    The paper anchors by KL(initial model || pi) over the full vocabulary, which would need the logits of both; this is
    k3 on label tokens, and the paper's coefficients do not carry over.
    """
    return dft_loss(stats, given, config) + config.kl_coef * k3(stats.log_probs, _reference(given))


def iw_sft_loss(stats: LabelStats, given: LabelInputs, config: ObjectiveConfig) -> Tensor:
    """-sg(w) l (arXiv 2507.12856 and emmyqin/iw_sft, `IwSFTLoss`).

    Per sequence w = clip(exp(2 * mean over its label tokens of (l - f)), 0, 16), per token w = clip(exp(l - f), 0.2,
    1.8). (2 is the default of that code; its own training script passes 1.)
    """
    log_probs = stats.log_probs.detach()
    log_ratio = log_probs - _reference(given)
    if config.iw_level == "token":
        weight = torch.exp(log_ratio).clamp(*_IW_TOKEN_BOUNDS)
    else:
        assert given.records is not None
        # The clamp before the exponential keeps it finite; the bound of 16 lies far below.
        exponent = (_IW_SEQUENCE_EXPONENT * given.records.means(log_ratio)).clamp(max=MAX_LOG_RATIO)
        weight = torch.exp(exponent).clamp(*_IW_SEQUENCE_BOUNDS)
    return -weight * stats.log_probs


def eaft_loss(stats: LabelStats, given: LabelInputs, config: ObjectiveConfig) -> Tensor:
    """-sg(H / 3)^eaft_alpha l with H the entropy of the 20 most probable tokens, renormalized (arXiv 2601.02151, as
    LLaMA-Factory's `_eaft_cross_entropy` has it)."""
    assert stats.top_entropy is not None
    return -((stats.top_entropy / _EAFT_SCALE) ** config.eaft_alpha) * stats.log_probs


def p_power_loss(stats: LabelStats, given: LabelInputs, config: ObjectiveConfig) -> Tensor:
    """(1 - p^q) / q with gradient -p^q grad l (arXiv 2510.00526, the general family; GaotangLi/Beyond-Log-Likelihood,
    `GeneralFamily`)."""
    return -torch.expm1(config.p_power_q * stats.log_probs) / config.p_power_q


def trsft_loss(stats: LabelStats, given: LabelInputs, config: ObjectiveConfig) -> Tensor:
    """-sg(p / max(p, trsft_alpha)) l: cross-entropy where p is at least alpha, and of a gradient scaled down by p /
    alpha below (the trust-region SFT of TRAPO, arXiv 2512.17636, whose gradient is grad p / max(p, alpha), alpha 0.1).
    """
    probs = stats.log_probs.detach().exp()
    return -(probs / probs.clamp(min=config.trsft_alpha)) * stats.log_probs


def profit_loss(stats: LabelStats, given: LabelInputs, config: ObjectiveConfig) -> Tensor:
    """-l where p >= profit_threshold, 0 elsewhere (arXiv 2601.09195; Utaotao/ProFit, `threshold_direction` higher).

    As in that code under gradient accumulation, tokens that are left out stay in the denominator.
    """
    is_kept = stats.log_probs.detach().exp() >= config.profit_threshold
    return torch.where(is_kept, -stats.log_probs, 0.0)


def deft_loss(stats: LabelStats, given: LabelInputs, config: ObjectiveConfig) -> Tensor:
    """(1 - p^a) / a with a = sg(sum over the vocabulary of p_v^2) (arXiv 2602.11424; luludus/DEFT, without its 1e-6 in
    the denominator: a is at least one over the size of the vocabulary)."""
    assert stats.sum_squares is not None
    return -torch.expm1(stats.sum_squares * stats.log_probs) / stats.sum_squares


def _reference(given: LabelInputs) -> Tensor:
    assert given.ref_log_probs is not None
    return given.ref_log_probs


_LOSSES: Mapping[str, tuple[TokenLoss, frozenset[Need]]] = {
    "sft": (sft_loss, frozenset()),
    "psft": (psft_loss, frozenset({"old"})),
    "sft-kl": (sft_kl_loss, frozenset({"reference"})),
    "dft": (dft_loss, frozenset()),
    "iw-sft": (iw_sft_loss, frozenset({"reference"})),
    "asft": (asft_loss, frozenset({"reference"})),
    "eaft": (eaft_loss, frozenset({"top_entropy"})),
    "p-power": (p_power_loss, frozenset()),
    "trsft": (trsft_loss, frozenset()),
    "profit": (profit_loss, frozenset()),
    "deft": (deft_loss, frozenset({"sum_squares"})),
    "dpo": (dpo_loss, frozenset({"reference", "records"})),
}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The token loss that a configuration names, with its settings."""

    config: ObjectiveConfig

    @property
    def needs(self) -> frozenset[Need]:
        """What it asks for."""
        _, needs = _LOSSES[self.config.objective]
        mixes = self.config.objective == "iw-sft" and self.config.iw_level == "sequence"
        return needs | {"records"} if mixes else needs

    @property
    def extra_stats(self) -> frozenset[ExtraStat]:
        """Which statistics it asks for."""
        return frozenset({"top_entropy", "sum_squares"}) & self.needs  # type: ignore[return-value]

    @property
    def needs_whole_records(self) -> bool:
        """Whether the loss of a token depends on other tokens of its record, so that all are needed at once."""
        return "records" in self.needs

    def token_loss(self, stats: LabelStats, given: LabelInputs) -> Tensor:
        """Loss of each label token, times its weight in the aggregation, `[n]`."""
        loss, _ = _LOSSES[self.config.objective]
        losses = loss(stats, given, self.config)
        return losses if given.weights is None else losses * given.weights


def is_clipped(ratio: Tensor, advantages: Tensor | None, config: ObjectiveConfig) -> Tensor:
    """Where PPO's clip takes the gradient away, bool."""
    above = ratio > 1.0 + config.clip_ratio_high
    if advantages is None:
        return above
    return torch.where(advantages < 0, ratio < 1.0 - config.clip_ratio_low, above & (advantages > 0))
