"""Log-probability of the labels, and entropy, from logits whose vocabulary is split over the tensor-parallel group.

Dimension letters: s sequence, b batch, v columns of the vocabulary on this rank, V columns of the true vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class LabelStats(NamedTuple):
    """What an objective needs to know of each label; fp32 `[b, s]`, the same on every tensor-parallel rank."""

    log_probs: Tensor
    """log pi(label | context), natural logarithm, normalized over the true vocabulary; differentiable."""
    entropy: Tensor
    """Entropy of the full next-token distribution, nats; a metric, carries no gradient."""


def label_stats(logits: Tensor, labels: Tensor, *, vocab_size: int, group: dist.ProcessGroup) -> LabelStats:
    """Returns log-probabilities and entropy of `labels` without gathering the vocabulary.

    Args:
        logits: `[s, b, v]`, any float dtype; rank r of `group` holds columns `r * v` to `(r + 1) * v`.
        labels: `[b, s]` int64 ids below `vocab_size`; unlabelled positions hold any such id.
        vocab_size: true vocabulary size V. Columns from V on are padding and get no probability and no gradient.
        group: tensor-parallel group over which the vocabulary is split.

    The softmax is taken in fp32 whatever the dtype of the logits. The gradient of the label's own logit is formed as
    `-expm1(log_prob)` and not as `1 - p`, which loses its digits on confident tokens (half of them at p = 0.9999).
    """
    log_probs, entropy = _VocabParallelLabelStats.apply(logits, labels.transpose(0, 1), vocab_size, group)
    return LabelStats(log_probs.transpose(0, 1), entropy.transpose(0, 1))


class _VocabParallelLabelStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        columns = logits.shape[-1]
        first_column = dist.get_rank(group) * columns
        shifted = logits.to(torch.float32, copy=True)
        # Padding stands at the end; a rank may hold nothing else. Not -inf, which times probability zero is NaN.
        shifted[..., max(vocab_size - first_column, 0) :] = torch.finfo(torch.float32).min
        maximum = shifted.amax(dim=-1, keepdim=True)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        shifted -= maximum

        local_labels = labels - first_column
        owned = (local_labels >= 0) & (local_labels < columns)
        label_index = local_labels.clamp(0, columns - 1).unsqueeze(-1)
        label_logits = torch.where(owned, shifted.gather(-1, label_index).squeeze(-1), 0.0)
        probs = shifted.exp()
        sums = torch.stack([probs.sum(dim=-1), shifted.mul_(probs).sum(dim=-1), label_logits])
        dist.all_reduce(sums, group=group)
        normalizer, weighted_logits, label_logits = sums
        log_probs = label_logits - normalizer.log()
        entropy = normalizer.log() - weighted_logits / normalizer

        probs /= normalizer.unsqueeze(-1)
        ctx.save_for_backward(probs, log_probs, label_index, owned)
        ctx.logits_dtype = logits.dtype
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, _grad_entropy: Tensor | None) -> tuple[Tensor, None, None, None]:
        probs, log_probs, label_index, owned = ctx.saved_tensors
        grad = probs * -grad_log_probs.unsqueeze(-1)
        label_grad = -torch.expm1(log_probs) * grad_log_probs
        other_grad = grad.gather(-1, label_index).squeeze(-1)
        grad.scatter_(-1, label_index, torch.where(owned, label_grad, other_grad).unsqueeze(-1))
        return grad.to(ctx.logits_dtype), None, None, None
