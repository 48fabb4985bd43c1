"""Reduces a step's sums over all ranks, and writes what a run reports."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_psft.data.loader import MicroBatch
from megatron_psft.distributed.grid import Parallel
from megatron_psft.errors import UserError
from megatron_psft.loss.labels import LabelStats
from megatron_psft.loss.objectives import BatchSums
from megatron_psft.loss.preference import PAIR_METRICS

_SUMMED = tuple(field.name for field in fields(BatchSums) if field.name not in ("ratios", "pairs"))
_RATIO_PERCENTILES = {"ratio_p05": 5, "ratio_p50": 50, "ratio_p95": 95, "ratio_max": 100}


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Means over the label tokens of the global batch, except where stated; the same on every rank."""

    loss: float
    """The objective that was optimized, under its aggregation."""
    nll: float
    """-log pi, nats."""
    entropy: float
    """Of the next-token distribution, nats."""
    ratio_mean: float
    """pi / pi_old; 1 where the step has no old policy."""
    ratio_p05: float
    """Percentiles of the ratio over label tokens, by nearest rank: each is the ratio of a token."""
    ratio_p50: float
    ratio_p95: float
    ratio_max: float
    clip_fraction: float
    """Share of label tokens that have no gradient, as their ratio is beyond the bound of the clip."""
    approx_kl: float
    """r - 1 - log r, nats."""
    tokens: int
    """Tokens that went through the model, padding not counted."""
    label_tokens: int
    """Label tokens."""
    records: int
    """Demonstrations; of preference pairs both sides."""
    pairs: Mapping[str, float]
    """Means over preference pairs of `PAIR_METRICS`; empty where records are no pairs."""

    def line(self) -> dict[str, float]:
        """What metrics.jsonl has of them."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "pairs"}
        # The names of 0.1, for one release.
        former = {"loss_tokens": self.label_tokens, "sequences": self.records}
        return {**values, **former, **self.pairs}


def reduce_metrics(
    sums: Sequence[BatchSums],
    micro_batches: Sequence[MicroBatch],
    parallel: Parallel,
    step: int,
    *,
    are_pairs: bool = False,
) -> StepMetrics:
    """Adds the sums of all micro-batches and data-parallel ranks and divides once; collective over the world.

    Args:
        sums: one per micro-batch on the last pipeline stage, empty elsewhere.
        micro_batches: of this data-parallel rank.
        parallel: this rank's place.
        step: from 1, for the error.
        are_pairs: whether records are preference pairs.

    Raises:
        UserError: on every rank, where the loss of any rank is not finite; names step and rank.
    """
    summed = (*_SUMMED, *PAIR_METRICS) if are_pairs else _SUMMED
    totals = {name: 0.0 for name in (*summed, "tokens", "records", "ratios")}
    ratios = torch.empty(0, device=parallel.device)
    bad_rank = 0.0
    if parallel.reports_sums:
        # One host copy per step. fp64: a sum of 10^7 fp32 losses would otherwise lose its last digits.
        columns = torch.stack([torch.stack(_values(entry)) for entry in sums]).double()
        totals.update(zip(summed, columns.sum(dim=0).tolist(), strict=True))
        if parallel.context_rank == 0:
            # These are told of whole rows; losses are of each rank's own part.
            totals["tokens"] = float(sum(batch.num_tokens for batch in micro_batches))
            totals["records"] = float(sum(batch.num_records for batch in micro_batches))
        ratios = torch.cat([entry.ratios for entry in sums])
        totals["ratios"] = float(len(ratios))
        bad_rank = 0.0 if math.isfinite(totals["loss"]) else parallel.rank + 1.0
    added = torch.tensor(list(totals.values()), dtype=torch.float64, device=parallel.device)
    largest = torch.tensor([len(ratios), bad_rank], dtype=torch.float64, device=parallel.device)
    dist.all_reduce(added)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    if largest[1] > 0:
        raise UserError(
            f"step {step}: the loss is not finite on rank {int(largest[1]) - 1}; nothing was updated; resume "
            "from the last checkpoint with a lower lr, or check the data of this step"
        )
    summed_up = dict(zip(totals, added.tolist(), strict=True))
    return _means(summed_up, _ratio_percentiles(ratios, most=int(largest[0]), count=int(summed_up["ratios"])))


def _values(sums: BatchSums) -> list[Tensor]:
    return [*(getattr(sums, name) for name in _SUMMED), *(sums.pairs[name] for name in PAIR_METRICS if sums.pairs)]


def _ratio_percentiles(ratios: Tensor, *, most: int, count: int) -> dict[str, float]:
    """Percentiles of the ratios of all ranks, by nearest rank; collective over the world.

    Args:
        ratios: of this rank.
        most: that any rank has.
        count: that all ranks have.
    """
    if not count:
        return dict.fromkeys(_RATIO_PERCENTILES, 0.0)
    padded = torch.nn.functional.pad(ratios, (0, most - len(ratios)), value=math.inf)
    gathered = ratios.new_empty(most * dist.get_world_size())
    dist.all_gather_into_tensor(gathered, padded)
    ordered = gathered.sort().values
    places = [math.ceil(percent * count / 100) - 1 for percent in _RATIO_PERCENTILES.values()]
    return dict(zip(_RATIO_PERCENTILES, ordered[places].tolist(), strict=True))


def _means(totals: Mapping[str, float], percentiles: Mapping[str, float]) -> StepMetrics:
    count, denominator = max(totals["label_tokens"], 1.0), max(totals["denominator"], 1.0)
    return StepMetrics(
        loss=totals["loss"] / denominator,
        nll=totals["nll"] / count,
        entropy=totals["entropy"] / count,
        ratio_mean=totals["ratio"] / count,
        **percentiles,
        clip_fraction=totals["clipped"] / count,
        approx_kl=totals["approx_kl"] / count,
        tokens=int(totals["tokens"]),
        label_tokens=int(totals["label_tokens"]),
        records=int(totals["records"]),
        pairs={name: totals[name] / denominator for name in PAIR_METRICS if name in totals},
    )


class EvalSums:
    """Adds up log-probabilities and entropy over the batches of an evaluation: sums over all tokens, one division at
    the end."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._sums = torch.zeros(3, dtype=torch.float64, device=parallel.device)

    def add(self, stats: Sequence[LabelStats], micro_batches: Sequence[MicroBatch]) -> None:
        """Adds a scored global batch; `stats` is empty on ranks without the output layer."""
        if not self._parallel.reports_sums:
            return
        for entry, batch in zip(stats, micro_batches, strict=True):
            mask: Tensor = batch.label_mask.to(self._parallel.device)
            nll = torch.where(mask, -entry.log_probs, 0.0).sum(dtype=torch.float64)
            entropy = torch.where(mask, entry.entropy, 0.0).sum(dtype=torch.float64)
            self._sums += torch.stack([nll, entropy, mask.sum().double()])

    def means(self) -> dict[str, float]:
        """Returns `valid_nll` and `valid_entropy` in nats per label token; collective."""
        dist.all_reduce(self._sums)
        nll, entropy, count = self._sums.tolist()
        return {"valid_nll": nll / max(count, 1.0), "valid_entropy": entropy / max(count, 1.0)}
