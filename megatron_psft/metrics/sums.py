"""Sums over the label tokens of a micro-batch, of which a step's metrics are made. They stay on the device.

Sums, and not means, because micro-batches and data-parallel ranks hold different numbers of label tokens: the one
division is by the tokens, records or pairs of the global batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.metrics.set_names import metric_of_set
from megatron_psft.objectives.builtin.dpo import pair_metrics
from megatron_psft.objectives.labels import LabelInputs, LabelStats
from megatron_psft.objectives.objective import Objective
from megatron_psft.objectives.ratio import MAX_LOG_RATIO, policy_ratio


class LabelSources(NamedTuple):
    """Which source of the data set each label token of a micro-batch is of."""

    ids: Tensor
    """`[n]` int64."""
    names: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class BatchSums:
    """What the metrics of a micro-batch are reduced from; fp32, without a gradient."""

    totals: Mapping[str, Tensor]
    """Scalars by name: a sum for each metric of `table.means`, and what these are divided by once all are added up:
    `label_tokens`, the `denominator` of losses, and, where records are pairs, `pairs`. With several sources those
    that `table.means` has of each source and `label_tokens` also as `NAME/SOURCE`, over its label tokens."""
    ratios: Tensor
    """`[n]`, the ratio of each label token, for percentiles."""


def batch_sums(
    loss: Tensor,
    stats: LabelStats,
    given: LabelInputs,
    config: ObjectiveConfig,
    *,
    labelled_records: int,
    sources: LabelSources | None = None,
) -> BatchSums:
    """Sums over the label tokens of a micro-batch, which may have none.

    Args:
        loss: the sum of their losses.
        stats: of the labels, `[n]`, without a gradient.
        given: of the labels.
        config: bounds of the clip, and the aggregation.
        labelled_records: records with a label that this rank counts. Those of a row that several ranks share are
            counted by one of them.
        sources: of the labels, where the data set has several.

    Collective over context-parallel ranks where records are pairs.
    """
    log_probs = stats.log_probs
    old_log_probs = log_probs if given.old_log_probs is None else given.old_log_probs
    ratio = policy_ratio(log_probs, old_log_probs)
    label_tokens = log_probs.new_full((), len(log_probs))
    clipped = Objective(config=config).is_clipped(log_probs, given).to(log_probs.dtype)
    totals = {
        "loss": loss,
        "nll": -log_probs.sum(),
        "entropy": stats.entropy.sum(),
        "clip_fraction": clipped.sum(),
        "ratio_mean": ratio.sum(),
        "approx_kl": _approx_kl(log_probs, old_log_probs).sum().to(log_probs.dtype),
        "label_tokens": label_tokens,
        "denominator": _denominator(label_tokens, config, labelled_records),
    }
    if config.needs_pairs:
        totals |= _pair_sums(stats, given, config, labelled_records)
    if sources is not None:
        totals |= _sums_by_source(sources, {"nll": -log_probs, "entropy": stats.entropy, "clip_fraction": clipped})
    return BatchSums(totals=totals, ratios=ratio)


def _sums_by_source(sources: LabelSources, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums of these `[n]` over the label tokens of each source, and their number."""
    given = torch.stack([*values.values(), torch.ones_like(sources.ids, dtype=torch.float32)])
    is_of = sources.ids == torch.arange(len(sources.names), device=sources.ids.device)[:, None]
    # A `where`, as a product would spread what is not finite; and no `index_add`, whose order varies on a GPU.
    sums = torch.where(is_of[:, None], given, 0.0).sum(dim=-1)
    return {
        metric_of_set(metric, name): total
        for name, row in zip(sources.names, sums, strict=True)
        for metric, total in zip((*values, "label_tokens"), row, strict=True)
    }


def _approx_kl(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """r - 1 - log r of each token, the k3 estimate of KL(pi_old || pi) from samples of pi_old; fp64.

    Near r = 1, where training mostly is, it is the small difference of larger numbers.
    """
    log_ratio = (log_probs - old_log_probs).double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


def _denominator(label_tokens: Tensor, config: ObjectiveConfig, labelled_records: int) -> Tensor:
    """What losses are divided by: label tokens, records that have any, or pairs."""
    if config.needs_pairs:
        return torch.full_like(label_tokens, labelled_records // 2)
    return label_tokens if config.loss_aggregation == "token-mean" else torch.full_like(label_tokens, labelled_records)


def _pair_sums(
    stats: LabelStats, given: LabelInputs, config: ObjectiveConfig, labelled_records: int
) -> dict[str, Tensor]:
    """Sums over the pairs that this rank counts, and their number; collective over context-parallel ranks."""
    is_counted = float(labelled_records > 0)
    metrics = pair_metrics(stats, given, config)._asdict()
    sums = {name: values.sum() * is_counted for name, values in metrics.items()}
    return {**sums, "pairs": stats.log_probs.new_full((), labelled_records // 2)}
