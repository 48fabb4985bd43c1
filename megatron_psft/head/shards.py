"""The softmax of a vocabulary that is split over the tensor-parallel group: what each rank says of its columns, joined.

Dimension letters: n label tokens, v columns of the vocabulary on this rank, V columns of the true vocabulary."""

from collections.abc import Set as AbstractSet
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_psft.head.kernels.portable import GradientFactors, ShardSums, shard_squares, shard_top
from megatron_psft.objectives.declare import ExtraStat
from megatron_psft.objectives.labels import TOP_TOKENS, LabelStats


class ShardSoftmax(NamedTuple):
    """What turns a rank's exponentials into the gradient of its logits; fp32 `[n]`."""

    maximum: Tensor
    """This rank's largest logit."""
    share: Tensor
    """exp(logit - maximum) times this is the probability of a column of this rank."""
    other_probs: Tensor
    """1 - p of the label, summed from the other tokens' probabilities: by subtraction it has half of its digits at p =
    0.9999, and SFT is full of such tokens."""

    def gradient_factors(self, grad_log_probs: Tensor, label_index: Tensor) -> GradientFactors:
        """Of the logits' gradient, from that of the label's log-probability `[n]` and the label's column `[n]`."""
        scale, label_gradient = -grad_log_probs * self.share, grad_log_probs * self.other_probs
        return GradientFactors(self.maximum, scale, label_gradient, label_index)


def shard_width(num_columns: int, vocab_size: int, rank: int) -> int:
    """True columns among the `num_columns` of a rank. Padding stands at the end; a rank may hold nothing else."""
    return min(max(vocab_size - rank * num_columns, 0), num_columns)


class ShardExtras(NamedTuple):
    """What one rank's columns say of each row for the statistics that not every objective needs; None where unasked."""

    top: Tensor | None = None
    """Its `TOP_TOKENS` largest logits, fp32 `[n, TOP_TOKENS]`."""
    squares: Tensor | None = None
    """Sum of exp(2 * (logit - maximum)), fp32 `[n]`."""

    @classmethod
    def of(cls, logits: Tensor, extra_stats: AbstractSet[ExtraStat]) -> "ShardExtras":
        """Of logits `[n, v]` of any float dtype, before `shard_sums_` or a kernel has written to them."""
        return cls(
            top=shard_top(logits, TOP_TOKENS) if "top_entropy" in extra_stats else None,
            squares=shard_squares(logits) if "sum_squares" in extra_stats else None,
        )


def join_shards(
    sums: ShardSums, group: dist.ProcessGroup, extras: ShardExtras | None = None
) -> tuple[LabelStats, ShardSoftmax]:
    """Makes the statistics over all columns out of each rank's sums; collective over the group that splits them.

    The one communication is a small all-gather, after which every rank adds the same numbers in the same order.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    extras = extras or ShardExtras()
    rows = [*sums]
    rows += [] if extras.squares is None else [extras.squares]
    rows += [] if extras.top is None else extras.top.unbind(dim=1)
    own = gathered = torch.stack(rows)
    if size > 1:
        gathered = own.new_empty(size * own.shape[0], own.shape[1])
        dist.all_gather_into_tensor(gathered, own, group=group)
    maximum, others, label_weight, weighted, label_logit, *rest = gathered.view(size, *own.shape).unbind(dim=1)
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
    stats = LabelStats(
        log_probs,
        normalizer.log() - weighted / normalizer,
        top_entropy=None if extras.top is None else _top_entropy(torch.cat(rest[-TOP_TOKENS:])),
        sum_squares=None if extras.squares is None else (rest[0] * rebase**2).sum(dim=0) / normalizer**2,
    )
    return stats, ShardSoftmax(sums.maximum, rebase[rank] / normalizer, others / normalizer)


def _top_entropy(candidates: Tensor) -> Tensor:
    """Entropy of the renormalized `TOP_TOKENS` largest of all ranks' largest logits, `[candidates, n]` to `[n]`."""
    probs = candidates.topk(TOP_TOKENS, dim=0).values.softmax(dim=0)
    return torch.special.entr(probs).sum(dim=0)
