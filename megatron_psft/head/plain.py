"""Log-probability of the labels, and entropy, from logits whose vocabulary is split over the tensor-parallel group.

Dimension letters: s sequence, b batch, n label tokens, v columns of the vocabulary on this rank, V columns of the true
vocabulary.
"""

from collections.abc import Set as AbstractSet
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_psft.head.kernels.portable import shard_gradient_, shard_sums_
from megatron_psft.head.layer import HeadInputs, HeadOutput, loss_of_all, select_labels
from megatron_psft.head.shards import ShardExtras, ShardSoftmax, join_shards, shard_width
from megatron_psft.objectives.declare import ExtraStat
from megatron_psft.objectives.labels import LabelStats


def label_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
    extra_stats: AbstractSet[ExtraStat] = frozenset(),
) -> LabelStats:
    """Returns log-probabilities and entropy of `labels`, `[b, s]`, without gathering the vocabulary.

    Args:
        logits: `[s, b, v]`, any float dtype; rank r of `group` holds columns `r * v` to `(r + 1) * v`.
        labels: `[b, s]` int64 ids below `vocab_size`; unlabelled positions hold any such id.
        vocab_size: true vocabulary size V. Columns from V on are padding and get no probability and no gradient.
        group: tensor-parallel group over which the vocabulary is split.
        extra_stats: further statistics to compute.

    The softmax is taken in fp32 whatever the dtype of the logits.
    """
    every = _VocabParallelLabelStats.apply(logits, labels.transpose(0, 1), vocab_size, group, extra_stats)
    return LabelStats(*every).map(lambda values: values.transpose(0, 1))


def plain_head(logits: Tensor, inputs: HeadInputs, *, vocab_size: int, group: dist.ProcessGroup) -> HeadOutput:
    """What `fused_head` answers, but for tokens besides the label, from all logits: `[s, b, v]`, this rank's columns of
    them; collective over `group`."""
    assert inputs.top_ids is None
    assert not inputs.top_k
    every = label_stats(logits, inputs.labels, vocab_size=vocab_size, group=group, extra_stats=inputs.extra_stats)
    stats = every.map(lambda values: select_labels(values, inputs.label_positions))
    if inputs.token_loss is None:
        return HeadOutput(stats=stats, loss=None)
    return loss_of_all(stats, inputs.token_loss)


class _VocabParallelLabelStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        group: dist.ProcessGroup,
        extra_stats: AbstractSet[ExtraStat],
    ) -> LabelStats:
        num_columns, rank = logits.shape[-1], dist.get_rank(group)
        width = shard_width(num_columns, vocab_size, rank)
        values = logits[..., :width].to(torch.float32, copy=True).flatten(0, 1)
        label_index = labels.flatten() - rank * num_columns
        extras = ShardExtras.of(values, extra_stats)
        stats, softmax = join_shards(shard_sums_(values, label_index), group, extras)
        ctx.save_for_backward(values, label_index, *softmax)
        ctx.logits_shape, ctx.logits_dtype = logits.shape, logits.dtype
        stats = stats.map(lambda values: values.view(labels.shape))
        ctx.mark_non_differentiable(*stats.non_differentiable)
        return stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        values, label_index, *softmax = ctx.saved_tensors
        # In place, for a third of the memory; autograd refuses a second backward pass for it.
        shard_gradient_(values, ShardSoftmax(*softmax).gradient_factors(grad_log_probs.flatten(), label_index))
        gradient = values.new_zeros(ctx.logits_shape, dtype=ctx.logits_dtype)
        gradient.flatten(0, 1)[:, : values.shape[1]] = values
        return gradient, None, None, None, None
