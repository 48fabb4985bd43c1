"""How far one policy is from another, at a label token."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_psft.objectives.labels import LabelInputs, LabelStats

# exp(20) is far beyond any clip bound and far below the fp32 overflow at exp(88): a diverged policy gives large finite
# numbers.
MAX_LOG_RATIO = 20.0


def policy_ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """r = pi / pi_old, exactly 1 where the two log-probabilities are equal."""
    return (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """exp(f - l) - (f - l) - 1 (Schulman, "Approximating KL Divergence": k3), never negative, 0 where l = f.

    Over tokens drawn from the policy its mean is KL(pi || initial model). Label tokens are drawn by whoever wrote the
    demonstrations, so that here it is a penalty of that shape on the tokens that are trained, and no unbiased
    estimate. It needs no logits of the initial model.
    """
    log_ratio = (ref_log_probs - log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.expm1() - log_ratio


def top_divergence(stats: LabelStats, given: LabelInputs) -> Tensor:
    """KL(initial model || pi) of each next-token distribution, of the initial model's k most probable tokens and of all
    others as if they were one, `[n]`.

    It is never above the divergence over the whole vocabulary, by the divergence within the rest times the rest's
    mass, and equal to it where k is the vocabulary. The gradient of a top token's logit is p - f, as over the whole
    vocabulary; that of another is p (1 - f_rest / p_rest).
    """
    assert stats.top_log_probs is not None
    assert stats.rest_log_probs is not None
    assert given.ref_top_log_probs is not None
    assert given.ref_rest_log_probs is not None
    of_top = given.ref_top_log_probs.exp() * (given.ref_top_log_probs - stats.top_log_probs)
    of_rest = given.ref_rest_log_probs.exp() * (given.ref_rest_log_probs - stats.rest_log_probs)
    return of_top.sum(dim=1) + of_rest
