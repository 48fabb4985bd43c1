"""What precision alone makes of the ratio: measured after each sync, where it should be 1."""

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_psft.distributed.grid import Parallel
from megatron_psft.head.layer import HeadOutput
from megatron_psft.objectives.ratio import policy_ratio

log = logging.getLogger(__name__)


class ScoringAgreement:
    """How far the weights are from themselves: log-probabilities of the same labels, scored and trained on.

    On the first step after a sync the policy is the old policy, so that every ratio should be 1. That step needs no
    scoring pass; one over its first micro-batches is the price of knowing what precision alone makes of the ratio.
    """

    def __init__(self, clip_ratio_high: float, parallel: Parallel) -> None:
        self._clip_ratio_high, self._parallel = clip_ratio_high, parallel
        self._scored: Sequence[Tensor] = ()
        self._trained: list[Tensor] = []

    @property
    def num_micro_batches(self) -> int:
        """How many micro-batches are scored: one, or as many as an interleaved pipeline runs at once."""
        return self._parallel.pipeline_size if self._parallel.virtual_size > 1 else 1

    def expect(self, scored: Sequence[Tensor]) -> None:
        """Says what a scoring pass made of the micro-batches that are trained on next: `[n]` fp32 of the label tokens
        of each; none on ranks without the output layer."""
        self._scored, self._trained = scored, []

    def observe(self, batch: object, output: HeadOutput) -> None:
        """Takes up what the training pass made of a micro-batch, if it was scored."""
        if len(self._trained) < len(self._scored):
            self._trained.append(output.stats.log_probs.detach())

    def report(self) -> None:
        """Logs the ratio of what was scored and trained on, and warns where tokens would be clipped; collective."""
        scored, trained = self._scored, self._trained
        self._scored, self._trained = (), []
        sums, largest = torch.zeros(3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        if scored and self._parallel.reports_sums:
            ratio = torch.cat([policy_ratio(after, before) for before, after in zip(scored, trained, strict=True)])
            ratio = ratio.double().cpu()
            sums = torch.stack([ratio.sum(), (ratio > 1 + self._clip_ratio_high).sum(), ratio.new_tensor(len(ratio))])
            largest = (ratio - 1).abs().max().reshape(1) if len(ratio) else largest
        sums, largest = sums.to(self._parallel.device), largest.to(self._parallel.device)
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        total, clipped, count = sums.tolist()
        if count == 0:
            return
        log.info(
            "precision: after a sync, the ratio of %d label tokens is %.6f in the mean, and at most %.3g off 1",
            count,
            total / count,
            float(largest),
        )
        if clipped:
            log.warning(
                "WARNING: precision alone clips %.3g %% of label tokens (clip_ratio_high %s): the two passes of one "
                "policy differ too much; choose another fp8_recipe, or leave fp8_format away",
                100 * clipped / count,
                self._clip_ratio_high,
            )
