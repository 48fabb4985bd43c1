"""Reduces sums over all ranks to the metrics of a step, or of an evaluation."""

import math
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_psft.data.micro_batch import MicroBatch
from megatron_psft.distributed.grid import Parallel
from megatron_psft.errors import DivergenceError
from megatron_psft.metrics.histogram import count_bins, percentiles
from megatron_psft.metrics.lines import in_order
from megatron_psft.metrics.set_names import split_name
from megatron_psft.metrics.sums import BatchSums
from megatron_psft.metrics.table import METRICS, means
from megatron_psft.objectives.declare import Requirement
from megatron_psft.objectives.labels import LabelStats

_PERCENTILES = {m.name: m.ratio_percentile for m in METRICS.values() if m.ratio_percentile is not None}
_OF_BATCHES = ("tokens", "records")


def reduce_metrics(
    sums: Sequence[BatchSums],
    micro_batches: Sequence[MicroBatch],
    parallel: Parallel,
    step: int,
    *,
    needs: Collection[Requirement],
    sources: Sequence[str] = (),
) -> dict[str, float]:
    """Adds the sums of all micro-batches and data-parallel ranks and divides once; collective over the world.

    Args:
        sums: one per micro-batch on the last pipeline stage, empty elsewhere.
        micro_batches: of this data-parallel rank.
        parallel: this rank's place.
        step: from 1, for the error.
        needs: of the run's objective, from which its metrics follow.
        sources: names of the training set's, where it has several.

    Returns:
        The step's means, percentiles and counts by name, the same on every rank; of a source without label tokens in
        the batch nothing.

    Raises:
        DivergenceError: on every rank, where the loss of any rank is not finite; names step and rank.
    """
    over = means(needs, sources)
    summed = tuple(dict.fromkeys([*over, *over.values()]))
    totals = dict.fromkeys((*summed, *_OF_BATCHES), 0.0)
    ratios = torch.empty(0, device=parallel.device)
    if parallel.reports_sums:
        # One host copy per step. fp64: a sum of 10^7 fp32 losses would otherwise lose its last digits.
        columns = torch.stack([torch.stack([entry.totals[name] for name in summed]) for entry in sums]).double()
        totals |= zip(summed, columns.sum(dim=0).tolist(), strict=True)
        ratios = torch.cat([entry.ratios for entry in sums])
        if parallel.context_rank == 0:
            # These are told of whole rows; losses are of each rank's own part.
            totals["tokens"] = float(sum(batch.num_tokens for batch in micro_batches))
            totals["records"] = float(sum(batch.num_records for batch in micro_batches))
    bad_rank = 0.0 if math.isfinite(totals["loss"]) else parallel.rank + 1.0
    has_old_policy = "old" in needs
    added = torch.tensor(list(totals.values()), dtype=torch.float64, device=parallel.device)
    if has_old_policy:
        added = torch.cat([added, count_bins(ratios.log())])
    highest_ratio = torch.cat([ratios, ratios.new_zeros(1)]).max()
    largest = torch.stack([added.new_tensor(bad_rank), highest_ratio.double()])
    dist.all_reduce(added)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    if largest[0] > 0:
        raise DivergenceError(
            f"step {step}: the loss is not finite on rank {int(largest[0]) - 1}; nothing was updated; resume "
            "from the last checkpoint with a lower lr, or check the data of this step"
        )
    world = dict(zip(totals, added[: len(totals)].tolist(), strict=True))
    values = {
        **{name: world[name] / max(world[divisor], 1.0) for name, divisor in over.items() if _has(world, divisor)},
        **(_ratios(added[len(totals) :], float(largest[1])) if has_old_policy else {}),
        **{name: int(world[name]) for name in ("label_tokens", *_OF_BATCHES)},
    }
    return {name: values[name] for name in in_order(values)}


def _has(world: Mapping[str, float], divisor: str) -> bool:
    """Whether a mean over `divisor` is told: for all label tokens always, for those of a source where it has any."""
    return world[divisor] > 0 or not split_name(divisor)[1]


def _ratios(counts: Tensor, highest: float) -> dict[str, float]:
    """Percentiles and the maximum of the ratios of all ranks, from the counts of their logarithms."""
    found = [math.exp(log_ratio) for log_ratio in percentiles(counts, list(_PERCENTILES.values()))]
    # The middle of a bin may be above all that is in it. Without label tokens all are 0.
    return {name: min(ratio, highest) for name, ratio in zip(_PERCENTILES, found, strict=True)} | {"ratio_max": highest}


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
