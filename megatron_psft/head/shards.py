"""The softmax of a vocabulary that is split over the tensor-parallel group: what each rank says of its columns, joined.

Dimension letters: n label tokens, v columns of the vocabulary on this rank, V columns of the true vocabulary."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_psft.head.kernels.portable import GradientFactors, ShardSums, shard_squares, shard_top
from megatron_psft.objectives.declare import ExtraStat
from megatron_psft.objectives.labels import TOP_TOKENS, LabelStats

LEAST_REST = 2.0**-23
"""The least probability that is left for tokens outside of the k that were asked about: what 1 minus theirs is wrong by
in fp32. Where k is the vocabulary it is the whole of it, for the initial model and the current one alike."""


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
    tokens: "ShardTokens | None" = None

    @classmethod
    def of(
        cls, logits: Tensor, extra_stats: AbstractSet[ExtraStat], tokens: "ShardTokens | None" = None
    ) -> "ShardExtras":
        """Of logits `[n, v]` of any float dtype, before `shard_sums_` or a kernel has written to them."""
        return cls(
            top=shard_top(logits, TOP_TOKENS).values if "top_entropy" in extra_stats else None,
            squares=shard_squares(logits) if "sum_squares" in extra_stats else None,
            tokens=tokens,
        )


class ShardTokens(NamedTuple):
    """What one rank's columns say of k tokens of each row, of which `LabelStats.top_log_probs` are."""

    logits: Tensor
    """fp32 `[n, k]`; -inf where another rank has the token, or this one has fewer."""
    ids: Tensor | None
    """int64 `[n, k]`, which tokens they are: this rank's largest, of which the largest of all are to be found. None
    where all ranks were asked for the same."""

    @classmethod
    def most_probable(cls, logits: Tensor, count: int, first_column: int) -> "ShardTokens":
        """The `count` largest of this rank."""
        top = shard_top(logits, count)
        return cls(top.values, top.columns + first_column)

    @classmethod
    def named(cls, logits: Tensor, columns: Tensor) -> "ShardTokens":
        """Those in `columns`, int64 `[n, k]`, as far as this rank has them."""
        if logits.shape[1] == 0:
            return cls(logits.new_full(columns.shape, -torch.inf, dtype=torch.float32), None)
        owned = (columns >= 0) & (columns < logits.shape[1])
        found = logits.gather(1, columns.clamp(0, logits.shape[1] - 1)).float()
        return cls(found.masked_fill(~owned, -torch.inf), None)

    def rows(self) -> list[Tensor]:
        """As rows of fp32 `[n]`, in which any id of a vocabulary is exact."""
        ids = () if self.ids is None else self.ids.float().unbind(dim=1)
        return [*self.logits.unbind(dim=1), *ids]

    def join(self, gathered: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Logits and, where they were to be found, ids of the tokens, `[n, k]`, from all ranks' `rows`, `[ranks, n]`
        each."""
        count = self.logits.shape[1]
        logits = torch.stack([*gathered[:count]], dim=2)
        if self.ids is None:
            return logits.amax(dim=0), None
        top = logits.transpose(0, 1).flatten(1).topk(count, dim=1)
        ids = torch.stack([*gathered[count:]], dim=2).transpose(0, 1).flatten(1)
        return top.values, ids.gather(1, top.indices).long()


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
    num_others = len(rows) - len(sums)
    rows += [] if extras.tokens is None else extras.tokens.rows()
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
        top_entropy=None if extras.top is None else _top_entropy(torch.cat(rest[num_others - TOP_TOKENS : num_others])),
        sum_squares=None if extras.squares is None else (rest[0] * rebase**2).sum(dim=0) / normalizer**2,
    )
    if extras.tokens is not None:
        logits, ids = extras.tokens.join(rest[num_others:])
        shifted = logits - top.unsqueeze(1)
        top_probs = (shifted.exp() / normalizer.unsqueeze(1)).sum(dim=1)
        stats = stats._replace(
            top_ids=ids,
            top_log_probs=shifted - normalizer.log().unsqueeze(1),
            rest_log_probs=(1 - top_probs).clamp(min=LEAST_REST).log(),
        )
    return stats, ShardSoftmax(sums.maximum, rebase[rank] / normalizer, others / normalizer)


def _top_entropy(candidates: Tensor) -> Tensor:
    """Entropy of the renormalized `TOP_TOKENS` largest of all ranks' largest logits, `[candidates, n]` to `[n]`."""
    probs = candidates.topk(TOP_TOKENS, dim=0).values.softmax(dim=0)
    return torch.special.entr(probs).sum(dim=0)
