"""How improbable each record of a global batch is among the others of it, under the weights before the step.

For objectives that weigh a record by that: one more forward pass over each global batch. No layout has a part in it.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_psft.data.micro_batch import MicroBatch
from megatron_psft.distributed.collective import sum_over_context
from megatron_psft.distributed.grid import Parallel
from megatron_psft.head.layer import label_positions, select_labels
from megatron_psft.objectives.labels import LabelStats, Records

# arXiv 2606.11206: added to the standard deviation, for batches whose records are all alike.
_EPSILON = 1e-6


class LabelScorer(Protocol):
    """Says what the weights of this moment make of a global batch; collective."""

    def score_labels(self, micro_batches: Sequence[MicroBatch]) -> list[LabelStats]:
        """`[n]` for each micro-batch of this rank; none on ranks without the output layer."""
        ...

    def gather_parameters(self) -> None:
        """Makes every parameter current on every rank."""
        ...


def with_nll_z(micro_batches: Sequence[MicroBatch], policy: LabelScorer, parallel: Parallel) -> list[MicroBatch]:
    """The micro-batches of this rank with `nll_z`, on ranks that compute losses; collective over all ranks.

    Mean and standard deviation are over the records of the global batch that have a label, each counted once.
    """
    policy.gather_parameters()
    scored = [stats.log_probs for stats in policy.score_labels(micro_batches)]
    means = [_record_means(*pair, parallel) for pair in zip(micro_batches, scored, strict=False)]
    totals = torch.zeros(3, dtype=torch.float64, device=parallel.device)
    if parallel.reports_sums and parallel.context_rank == 0:
        for batch, nll in zip(micro_batches, means, strict=True):
            labelled = nll[(batch.label_counts > 0).to(nll.device)]
            totals += torch.stack([torch.ones_like(labelled), labelled, labelled.square()]).sum(dim=1)
    dist.all_reduce(totals)
    count, total, squares = totals.clamp(min=0.0)
    mean = total / count.clamp(min=1.0)
    deviation = (squares / count.clamp(min=1.0) - mean.square()).clamp(min=0.0).sqrt()
    if not means:
        return [*micro_batches]
    z_scores = [((nll - mean) / (deviation + _EPSILON)).float().cpu() for nll in means]
    return [replace(batch, nll_z=z) for batch, z in zip(micro_batches, z_scores, strict=True)]


def _record_means(batch: MicroBatch, log_probs: Tensor, parallel: Parallel) -> Tensor:
    """Negative log-likelihood of each record per label token, fp64 `[records]`; 0 where a record has no label."""
    device = log_probs.device
    records = Records(
        ids=select_labels(batch.record_ids, label_positions(batch.label_mask)).to(device),
        label_counts=batch.label_counts.to(device),
        add_up=partial(sum_over_context, parallel=parallel),
    )
    return records.sums(-log_probs.double()) / records.label_counts.clamp(min=1)
