"""Token losses, pure: tensors in, sums out. No process group, no Megatron-Core, no host copies.

Every function works on any shape, elementwise over label tokens; `log_probs` are natural-log probabilities in fp32.
"""

from dataclasses import dataclass
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
class Objective:
    """A token loss with its settings."""

    name: ObjectiveName
    clip_ratio_high: float
    """Upper half-width of the clip, which SFT only reports."""

    def token_loss(self, log_probs: Tensor, old_log_probs: Tensor | None) -> Tensor:
        """Loss of each label token. Without `old_log_probs` the old policy is the current one, so that r = 1."""
        if self.name == "sft":
            return sft_loss(log_probs)
        old_log_probs = log_probs.detach() if old_log_probs is None else old_log_probs
        return psft_loss(log_probs, old_log_probs, clip_ratio_high=self.clip_ratio_high)


@dataclass(frozen=True, kw_only=True)
class BatchSums:
    """Sums over the label tokens of one micro-batch: scalars, fp32, on the device, without a gradient.

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


def batch_sums(
    loss: Tensor, log_probs: Tensor, old_log_probs: Tensor | None, entropy: Tensor, *, clip_ratio_high: float
) -> BatchSums:
    """Metrics of the label tokens of a micro-batch, which may have none.

    Args:
        loss: the sum of their losses.
        log_probs: of the labels, `[n]`, fp32, without a gradient.
        old_log_probs: the same under the old policy; None where the old policy is the current one, so that r = 1.
        entropy: of the next-token distributions, nats, `[n]`.
        clip_ratio_high: upper half-width of the clip.
    """
    old_log_probs = log_probs if old_log_probs is None else old_log_probs
    ratio = policy_ratio(log_probs, old_log_probs)
    # fp64: near r = 1, where training mostly is, the divergence is the small difference of larger numbers.
    log_ratio = (log_probs - old_log_probs).double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    approx_kl = torch.expm1(log_ratio) - log_ratio
    return BatchSums(
        loss=loss,
        nll=-log_probs.sum(),
        entropy=entropy.sum(),
        ratio=ratio.sum(),
        clipped=(ratio > 1.0 + clip_ratio_high).sum().to(log_probs.dtype),
        approx_kl=approx_kl.sum().to(log_probs.dtype),
        loss_tokens=log_probs.new_full((), len(log_probs)),
        ratio_max=ratio.max() if len(ratio) else ratio.new_zeros(()),
    )
