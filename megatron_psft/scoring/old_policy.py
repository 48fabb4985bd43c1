"""The old policy: the weights of every k-th optimizer step, kept as log-probabilities of the labels to come."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_psft.metrics.progress import progress

log = logging.getLogger(__name__)

ScoreStep = Callable[[int], list[Tensor]]
"""Scores the global batch of a step (from 0) with the current weights: `[b, s]` fp32 per micro-batch of this rank, none
on ranks without the output layer. Collective."""


class OldPolicyWindow:
    """Provides `old_log_probs` for each step of a run, scoring ahead when a window begins.

    The old policy is never held as weights. When a window of k steps begins, one forward-only pass over its global
    batches stores what the weights of that moment say of their labels. The window's first batch needs no pass: it is
    trained on by the very weights that would score it, so that r = 1. A step without stored values is what begins a
    window, which holds for the first step, after warm-up, every k steps, and never inside a window that was restored
    from a checkpoint.
    """

    def __init__(
        self,
        *,
        interval: int,
        warmup_iters: int,
        train_iters: int,
        score: ScoreStep,
        prepare: Callable[[Sequence[int]], None] | None = None,
        show_progress: bool = False,
    ) -> None:
        """Describes the windows.

        Args:
            interval: k, optimizer steps per window.
            warmup_iters: leading steps without an old policy.
            train_iters: steps of the run; the last window ends there.
            score: scores a step's global batch.
            prepare: told the steps that are about to be scored, before the first pass of this process. Collective.
            show_progress: whether a long pass shows a progress bar.
        """
        self._show_progress = show_progress
        self._interval = interval
        self._warmup_iters = warmup_iters
        self._train_iters = train_iters
        self._score = score
        self._prepare = prepare
        self.stored: dict[int, list[Tensor]] = {}
        """Step to its old log-probabilities, on the CPU, for the steps of the window that are still to come."""

    def is_warmup(self, step: int) -> bool:
        """Whether `step` (from 0) trains without an old policy."""
        return step < self._warmup_iters

    def syncs_before(self, step: int) -> bool:
        """Whether the old policy becomes the current one before `step` (from 0). The same on all ranks."""
        return not self.is_warmup(step) and step not in self.stored

    def old_log_probs(self, step: int, *, between_batches: Callable[[], None] = lambda: None) -> list[Tensor] | None:
        """Returns the old log-probabilities of the batch of `step`, or None where the old policy is the current one.

        Collective; steps must be asked for in order. At the start of a window this scores the rest of the window, and
        calls `between_batches` after each global batch; where that raises, the window has not begun.
        """
        if not self.syncs_before(step):
            return self.stored.pop(step, None)
        rest = range(step + 1, self._window_end(step))
        if rest and self._prepare is not None:
            self._prepare(rest)
            self._prepare = None
        scored: dict[int, list[Tensor]] = {}
        for later in progress(rest, "old policy", unit="step", is_shown=self._show_progress):
            # Host memory: k global batches of log-probabilities are needed one at a time, far apart.
            scored[later] = [_to_host(log_probs) for log_probs in self._score(later)]
            between_batches()
        self.stored.update(scored)
        return None

    def _window_end(self, step: int) -> int:
        past = step - self._warmup_iters
        return min(step + self._interval - past % self._interval, self._train_iters)


def _to_host(log_probs: Tensor) -> Tensor:
    """A copy in host memory; pinned where it comes from a GPU, so that its way back does not hold up training."""
    host = torch.empty(log_probs.shape, dtype=log_probs.dtype, pin_memory=log_probs.is_cuda)
    return host.copy_(log_probs)
