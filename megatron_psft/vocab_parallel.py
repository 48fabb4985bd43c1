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

    The softmax is taken in fp32 whatever the dtype of the logits. For the label's own logit the gradient `1 - p` is
    summed from the other tokens' probabilities: by subtraction it has half of its digits at p = 0.9999, and SFT is full
    of such tokens.
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
        label_logit = torch.where(owned, shifted.gather(-1, label_index).squeeze(-1), 0.0)
        probs = shifted.exp()
        weighted_logits = shifted.mul_(probs).sum(dim=-1)
        # The label's weight stays out of the sum of the others: 1 - p and log p of a confident token are made of the
        # rest.
        label_weight = probs.gather(-1, label_index).squeeze(-1)
        probs.scatter_(-1, label_index, torch.where(owned, 0.0, label_weight).unsqueeze(-1))
        sums = torch.stack([probs.sum(dim=-1), torch.where(owned, label_weight, 0.0), weighted_logits, label_logit])
        probs.scatter_(-1, label_index, label_weight.unsqueeze(-1))
        dist.all_reduce(sums, group=group)
        others, label_weight, weighted_logits, label_logit = sums
        normalizer = others + label_weight
        is_likely = label_weight > others
        log_probs = torch.where(is_likely, -torch.log1p(others / label_weight), label_logit - normalizer.log())
        entropy = normalizer.log() - weighted_logits / normalizer

        probs /= normalizer.unsqueeze(-1)
        ctx.save_for_backward(probs, others / normalizer, label_index, owned)
        ctx.logits_dtype = logits.dtype
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, _grad_entropy: Tensor | None) -> tuple[Tensor, None, None, None]:
        probs, other_probs, label_index, owned = ctx.saved_tensors
        grad = probs * -grad_log_probs.unsqueeze(-1)
        label_grad = other_probs * grad_log_probs
        other_grad = grad.gather(-1, label_index).squeeze(-1)
        grad.scatter_(-1, label_index, torch.where(owned, label_grad, other_grad).unsqueeze(-1))
        return grad.to(ctx.logits_dtype), None, None, None
