"""Token losses, pure: tensors in, sums out. No process group, no Megatron-Core, no host copies.

Every function works on any shape, elementwise over label tokens; `log_probs` are natural-log probabilities in fp32.
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

ObjectiveName = Literal["psft", "sft"]

# exp(20) is far beyond any clip bound and far below the fp32 overflow at exp(88): a diverged policy gives large finite
# numbers.
MAX_LOG_RATIO = 20.0


def sft_loss(log_probs: Tensor) -> Tensor:
    """Cross-entropy, -log pi."""
    return -log_probs


def psft_loss(log_probs: Tensor, old_log_probs: Tensor, *, clip_ratio_high: float) -> Tensor:
    """Proximal SFT, -min(r, 1 + clip_ratio_high) with r = pi / pi_old (arXiv 2508.17784, equation of the PSFT
    objective).

    It is PPO's clipped surrogate with advantage 1, for which the lower clip never binds. The gradient is -r * grad log
    pi where r <= 1 + clip_ratio_high and exactly zero elsewhere.
    """
    return -torch.clamp(policy_ratio(log_probs, old_log_probs), max=1.0 + clip_ratio_high)


def policy_ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """r = pi / pi_old, exactly 1 where the two log-probabilities are equal."""
    return torch.exp(torch.clamp(log_probs - old_log_probs, -MAX_LOG_RATIO, MAX_LOG_RATIO))


@dataclass(frozen=True, kw_only=True)
class BatchSums:
    """Sums over the label tokens of one micro-batch: scalars, fp32, on the device. Only `loss` carries a gradient.

    Sums, and not means, because micro-batches and data-parallel ranks hold different numbers of label tokens: the one
    division is by the tokens of the global batch.
    """

    loss: Tensor
    nll: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor
    approx_kl: Tensor
    """Sum of r - 1 - log r, the k3 estimate of KL(pi_old || pi) from samples of pi_old."""
    loss_tokens: Tensor
    ratio_max: Tensor
    """A maximum, not a sum."""

    def detached(self) -> "BatchSums":
        """The same numbers without the graph."""
        return BatchSums(**{field.name: getattr(self, field.name).detach() for field in fields(self)})


def batch_sums(
    objective: ObjectiveName,
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    entropy: Tensor,
    loss_mask: Tensor,
    *,
    clip_ratio_high: float,
) -> BatchSums:
    """Loss and metrics of a micro-batch.

    Args:
        objective: which token loss.
        log_probs: of the labels, any shape, fp32.
        old_log_probs: the same under the old policy; None where the old policy is the current one, so that r = 1.
        entropy: of the next-token distribution, nats, same shape.
        loss_mask: bool, true where a label counts. What the other inputs hold elsewhere, infinities and NaN included,
            reaches
            neither loss nor gradient: it is replaced before any exponential.
        clip_ratio_high: upper half-width of the clip.
    """
    zero = torch.zeros((), dtype=log_probs.dtype, device=log_probs.device)
    log_probs = torch.where(loss_mask, log_probs, zero)
    current = log_probs.detach()
    old_log_probs = current if old_log_probs is None else torch.where(loss_mask, old_log_probs, zero)
    if objective == "sft":
        token_loss = sft_loss(log_probs)
    else:
        token_loss = psft_loss(log_probs, old_log_probs, clip_ratio_high=clip_ratio_high)

    ratio = policy_ratio(current, old_log_probs)
    # fp64: near r = 1, where training mostly is, the divergence is the small difference of larger numbers.
    log_ratio = (current - old_log_probs).double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    approx_kl = torch.expm1(log_ratio) - log_ratio

    def masked_sum(values: Tensor) -> Tensor:
        return torch.where(loss_mask, values, zero).sum()

    return BatchSums(
        loss=masked_sum(token_loss),
        nll=-current.sum(),
        entropy=masked_sum(entropy.detach()),
        ratio=masked_sum(ratio),
        clipped=(loss_mask & (ratio > 1.0 + clip_ratio_high)).sum().to(log_probs.dtype),
        approx_kl=approx_kl.sum().to(log_probs.dtype),
        loss_tokens=loss_mask.sum().to(log_probs.dtype),
        ratio_max=torch.where(loss_mask, ratio, zero).max(),
    )
