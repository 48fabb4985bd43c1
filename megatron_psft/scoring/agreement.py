"""What precision alone makes of the ratio: measured at the start of each window, where it should be 1."""

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_psft.distributed.grid import Parallel
from megatron_psft.loss.objectives import policy_ratio

log = logging.getLogger(__name__)


class PrecisionNoise:
    """How far the weights are from themselves: log-probabilities of the same labels, scored and trained on.

    On the step that begins a window the policy is the old policy, so that every ratio should be 1. That step needs no
    scoring pass; one over its first micro-batches is the price of knowing what precision alone makes of the ratio.
    """

    def __init__(self, clip_ratio_high: float, parallel: Parallel) -> None:
        self._clip_ratio_high, self._parallel = clip_ratio_high, parallel

    def report(self, scored: Sequence[Tensor], trained: Sequence[Tensor]) -> None:
        """Prints what the ratio of a window's first step is, and warns where tokens would be clipped; collective.

        Args:
            scored: of each micro-batch that was measured, the log-probabilities `[n]` of its label tokens in a scoring
                pass; none on ranks without the output layer.
            trained: the same of the training pass.
        """
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
            "precision: as a window starts, the ratio of %d label tokens is %.6f in the mean, and at most %.3g off 1",
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
