"""Log-probability of the labels, and entropy, from logits whose vocabulary is split over the tensor-parallel group.

Dimension letters: s sequence, b batch, n label tokens, v columns of the vocabulary on this rank, V columns of the true
vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_psft.kernels.portable import ShardSums, shard_gradient_, shard_sums_


class LabelStats(NamedTuple):
    """What an objective needs to know of each label; fp32, the same on every tensor-parallel rank."""

    log_probs: Tensor
    """log pi(label | context), natural logarithm, normalized over the true vocabulary; differentiable."""
    entropy: Tensor
    """Entropy of the full next-token distribution, nats; a metric, carries no gradient."""


class ShardSoftmax(NamedTuple):
    """What turns a rank's exponentials into the gradient of its logits; fp32 `[n]`."""

    maximum: Tensor
    """This rank's largest logit."""
    share: Tensor
    """exp(logit - maximum) times this is the probability of a column of this rank."""
    other_probs: Tensor
    """1 - p of the label, summed from the other tokens' probabilities: by subtraction it has half of its digits at p =
    0.9999, and SFT is full of such tokens."""

    def gradient_factors(self, grad_log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the logits in the form that `shard_gradient_` takes: `scale` and `label_gradient`."""
        return -grad_log_probs * self.share, grad_log_probs * self.other_probs


def shard_width(num_columns: int, vocab_size: int, rank: int) -> int:
    """True columns among the `num_columns` of a rank. Padding stands at the end; a rank may hold nothing else."""
    return min(max(vocab_size - rank * num_columns, 0), num_columns)


def join_shards(sums: ShardSums, group: dist.ProcessGroup) -> tuple[LabelStats, ShardSoftmax]:
    """Makes the statistics over all columns out of each rank's sums; collective over the group that splits them.

    The one communication is a small all-gather, after which every rank adds the same numbers in the same order.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    own = gathered = torch.stack(sums)
    if size > 1:
        gathered = own.new_empty(size * own.shape[0], own.shape[1])
        dist.all_gather_into_tensor(gathered, own, group=group)
    maximum, others, label_weight, weighted, label_logit = gathered.view(size, *own.shape).unbind(dim=1)
    top = maximum.amax(dim=0)
    shift = maximum - top
    rebase = shift.exp()
    # A rank of padding alone has the lowest number there is for a maximum, and nothing to add.
    weighted = torch.where(rebase > 0, (weighted + shift * (others + label_weight)) * rebase, 0.0).sum(dim=0)
    others, label_weight = (others * rebase).sum(dim=0), (label_weight * rebase).sum(dim=0)
    normalizer = others + label_weight
    log_probs = torch.where(
        label_weight > others,
        -torch.log1p(others / label_weight),
        label_logit.sum(dim=0) - top - normalizer.log(),
    )
    stats = LabelStats(log_probs, normalizer.log() - weighted / normalizer)
    return stats, ShardSoftmax(sums.maximum, rebase[rank] / normalizer, others / normalizer)


def label_stats(logits: Tensor, labels: Tensor, *, vocab_size: int, group: dist.ProcessGroup) -> LabelStats:
    """Returns log-probabilities and entropy of `labels`, `[b, s]`, without gathering the vocabulary.

    Args:
        logits: `[s, b, v]`, any float dtype; rank r of `group` holds columns `r * v` to `(r + 1) * v`.
        labels: `[b, s]` int64 ids below `vocab_size`; unlabelled positions hold any such id.
        vocab_size: true vocabulary size V. Columns from V on are padding and get no probability and no gradient.
        group: tensor-parallel group over which the vocabulary is split.

    The softmax is taken in fp32 whatever the dtype of the logits.
    """
    log_probs, entropy = _VocabParallelLabelStats.apply(logits, labels.transpose(0, 1), vocab_size, group)
    return LabelStats(log_probs.transpose(0, 1), entropy.transpose(0, 1))


class _VocabParallelLabelStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        num_columns, rank = logits.shape[-1], dist.get_rank(group)
        width = shard_width(num_columns, vocab_size, rank)
        values = logits[..., :width].to(torch.float32, copy=True).flatten(0, 1)
        label_index = labels.flatten() - rank * num_columns
        stats, softmax = join_shards(shard_sums_(values, label_index), group)
        ctx.save_for_backward(values, label_index, *softmax)
        ctx.logits_shape, ctx.logits_dtype = logits.shape, logits.dtype
        log_probs, entropy = (column.view(labels.shape) for column in stats)
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, _grad_entropy: Tensor | None) -> tuple[Tensor, None, None, None]:
        values, label_index, *softmax = ctx.saved_tensors
        factors = ShardSoftmax(*softmax).gradient_factors(grad_log_probs.flatten())
        # In place, for a third of the memory; autograd refuses a second backward pass for it.
        shard_gradient_(values, softmax[0], *factors, label_index)
        gradient = values.new_zeros(ctx.logits_shape, dtype=ctx.logits_dtype)
        gradient.flatten(0, 1)[:, : values.shape[1]] = values
        return gradient, None, None, None
