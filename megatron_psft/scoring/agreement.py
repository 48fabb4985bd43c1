"""The scoring check: whether the pass that scores a window and training say the same of the same label tokens.

The ratio means something only as far as they do. After a sync both have the same weights, and the ratio of that step is
1 by definition; what would be wrong with all others is measured there.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_psft.config.schema import PrecisionConfig
from megatron_psft.data.micro_batch import to_device
from megatron_psft.errors import UserError
from megatron_psft.head.layer import HeadOutput
from megatron_psft.metrics.histogram import NUM_BINS, count_bins, percentiles

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GapBounds:
    """By how many nats a precision lets the log-probabilities of one label token differ between two passes."""

    p99: float
    """Of all but 1 % of the label tokens."""
    largest: float
    """Of every one."""


BOUNDS = {
    "fp32": GapBounds(p99=1e-4, largest=1e-3),
    "bf16": GapBounds(p99=0.1, largest=0.5),
    "fp8": GapBounds(p99=0.2, largest=1.5),
}
"""Where shapes and kernels are the same, as by default, fp32 and bf16 give 0. The bounds are for passes in other shapes
(`old_policy_micro_batch_size`) and for kernels that round elsewhere or sum in an order of the moment: a test has
attention in fp32 beside a bf16 model. fp8 is a guess."""


def precision_of(config: PrecisionConfig) -> str:
    """What products are computed in, as `BOUNDS` knows it."""
    if config.fp8_format is not None:
        return "fp8"
    return "bf16" if config.bf16 else "fp32"


class Place(Protocol):
    """Of this rank, as `Parallel` has it."""

    @property
    def device(self) -> torch.device: ...

    @property
    def reports_sums(self) -> bool: ...


class ScoringAgreement:
    """How far training's log-probabilities of a global batch's labels are from those of a scoring pass before it."""

    def __init__(self, *, precision: str, clip_ratio_high: float, parallel: Place, after_every_sync: bool) -> None:
        """Nothing is measured yet.

        Args:
            precision: a key of `BOUNDS`.
            clip_ratio_high: of the run.
            parallel: this rank's place.
            after_every_sync: whether to measure after each sync, and not only after the first of this process.
        """
        self._precision, self._parallel, self._after_every_sync = precision, parallel, after_every_sync
        self._clip_width = math.log1p(clip_ratio_high)
        self._is_done = False
        self._expected: list[Tensor] | None = None
        """What the scoring pass said of the micro-batches still to come; None where nothing is measured."""
        self._counts = torch.zeros(NUM_BINS, dtype=torch.float64, device=parallel.device)
        self._largest = torch.zeros((), device=parallel.device)

    @property
    def is_due(self) -> bool:
        """Whether the step after a sync is to be measured; the same on all ranks."""
        return self._after_every_sync or not self._is_done

    def expect(self, scored: Sequence[Tensor]) -> None:
        """Says what the scoring pass made of the micro-batches that are trained on next: `[n]` fp32 of the label tokens
        of each, best in host memory; none on ranks without the output layer."""
        self._expected = list(scored)
        self._counts.zero_()
        self._largest.zero_()

    def observe(self, batch: object, output: HeadOutput) -> None:
        """Takes up what the training pass made of a micro-batch. Does not wait for the device."""
        if not self._expected:
            return
        scored = self._expected.pop(0)
        if self._parallel.reports_sums:
            trained = output.stats.log_probs.detach()
            gaps = (trained - to_device(scored, trained.device)).abs().nan_to_num(nan=math.inf)
            self._counts += count_bins(gaps)
            self._largest = torch.cat([gaps, self._largest.reshape(1)]).max()

    def report(self, step: int) -> dict[str, float]:
        """What was measured of the step (from 1), by the metrics' names; nothing if it was not measured. Collective.

        Raises:
            UserError: on every rank, where the difference alone would be beyond the clip for 1 % of the label tokens.
        """
        if self._expected is None:
            return {}
        assert not self._expected, "every micro-batch is trained on"
        self._expected, self._is_done = None, True
        dist.all_reduce(self._counts)
        dist.all_reduce(self._largest, op=dist.ReduceOp.MAX)
        largest, (p99,) = float(self._largest), percentiles(self._counts, [99])
        p99 = min(p99, largest)
        log.info(
            "scoring check: the old policy's pass and training differ by at most %.3g nats about a label "
            "token, by at most %.3g about 99 %% of them",
            largest,
            p99,
        )
        self._judge(step, largest, p99)
        return {"scoring_gap_max": largest, "scoring_gap_p99": p99}

    def _judge(self, step: int, largest: float, p99: float) -> None:
        bounds = BOUNDS[self._precision]
        if not math.isfinite(largest) or p99 > self._clip_width:
            raise UserError(
                f"step {step}: the old policy's pass and training disagree about the same weights: scoring_gap_p99 "
                f"({p99:.3g} nats) must not exceed the width of the clip, log(1 + clip_ratio_high) = "
                f"{self._clip_width:.3g}, and scoring_gap_max is {largest:.3g}; no checkpoint has this step; "
                f"{self._remedy}"
            )
        if largest > bounds.largest or p99 > bounds.p99:
            log.warning(
                "WARNING: step %d: the old policy's pass and training differ by more than %s allows: scoring_gap_max "
                "%.3g (up to %g), scoring_gap_p99 %.3g (up to %g) nats; every ratio is off by as much; %s",
                step,
                self._precision,
                largest,
                bounds.largest,
                p99,
                bounds.p99,
                self._remedy,
            )

    @property
    def _remedy(self) -> str:
        if self._precision == "fp8":
            return "choose another fp8_recipe, or remove fp8_format (docs/metrics.md, The scoring check)"
        return (
            "remove old_policy_micro_batch_size if it is set, and see if the difference stays with fused_head false, "
            "in fp32, or on one GPU (docs/metrics.md, The scoring check)"
        )
