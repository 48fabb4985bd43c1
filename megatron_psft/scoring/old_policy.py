"""The old policy: the weights of every k-th optimizer step, kept as log-probabilities of the labels to come.

Before the first step of a window of k steps comes a sync: the old policy becomes the current one. It is never held as
weights; at the sync one forward-only pass stores what the weights of that moment say of the window's labels.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.objectives.objective import Objective
from megatron_psft.progress import progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NoOldPolicy:
    """The objective of the step compares with none, as in warm-up."""


@dataclass(frozen=True)
class CurrentPolicy:
    """The old policy is the current one, as in the first step after a sync: every ratio is 1."""


@dataclass(frozen=True)
class Scores:
    """The old policy is an earlier one, known by what it said of the step's labels."""

    log_probs: Sequence[Tensor]
    """`[n]` fp32 for each micro-batch of this rank, of its label tokens in the order of `HeadInputs.label_positions`;
    none on ranks without the output layer."""


OldPolicy = NoOldPolicy | CurrentPolicy | Scores
"""What a step's loss compares the current policy with; of one kind on all ranks."""

ScoreStep = Callable[[int], Sequence[Tensor]]
"""Scores the global batch of a step (from 0) with the current weights, as `Scores.log_probs` has it. Collective."""


def objective_at(config: ObjectiveConfig, step: int) -> Objective:
    """What `step` (from 0) trains with: in warm-up an objective that has an old policy is plain SFT."""
    is_warmup = config.needs_old_policy and step < config.sft_warmup_iters
    return Objective(config=replace(config, objective="sft") if is_warmup else config)


class OldPolicyWindow:
    """The old policy at each step of a run: says when a sync comes, makes it, and keeps the window's scores.

    A window is `old_policy_interval` steps, counted from the end of warm-up. Its first batch needs no scores: it is
    trained on by the very weights that would score it. Steps go up; `at` and `syncs_before` change nothing.
    """

    def __init__(
        self,
        objective: ObjectiveConfig,
        *,
        train_iters: int,
        score: ScoreStep,
        prepare: Callable[[Sequence[int]], None] | None = None,
        show_progress: bool = False,
    ) -> None:
        """Starts outside of any window.

        Args:
            objective: of the run, with its warm-up and interval.
            train_iters: steps of the run; the last window ends there.
            score: scores a step's global batch.
            prepare: told the steps that are about to be scored, before the first pass of this process. Collective.
            show_progress: whether a long pass shows a progress bar.
        """
        self._objective, self._train_iters = objective, train_iters
        self._score, self._prepare = score, prepare
        self._show_progress = show_progress
        self._start: int | None = None
        """First step of the window; None before any."""
        self._end = 0
        """First step after the window."""
        self._scores: dict[int, list[Tensor]] = {}
        """`Scores.log_probs` of the window's steps, in host memory."""

    @property
    def interval(self) -> int:
        """Steps of a window; with `fixed` those of the run."""
        interval = self._objective.old_policy_interval
        return self._train_iters if interval == "fixed" else interval

    def window_of(self, step: int) -> range:
        """The steps of the window that `step` is in, by count; none where it has no old policy."""
        if not self._has_old_policy(step):
            return range(0)
        start = step - (step - self._objective.sft_warmup_iters) % self.interval
        return range(start, min(start + self.interval, self._train_iters))

    def syncs_before(self, step: int) -> bool:
        """Whether a sync has to come before `step` (from 0), as no window holds it yet. The same on all ranks."""
        return self._has_old_policy(step) and step >= self._end

    @property
    def start(self) -> int | None:
        """First step of the window that is held, or was last; None before any."""
        return self._start

    def window_step(self, step: int) -> int | None:
        """The place in the window of a step that it holds, 0 for the step after the sync; None without old policy."""
        if not self._has_old_policy(step):
            return None
        assert self._start is not None
        return step - self._start

    def sync(self, step: int, *, between_batches: Callable[[], None] = lambda: None) -> None:
        """Makes the old policy the current one, and scores the window that `step` begins; collective.

        `between_batches` is called after each global batch; where it raises, the window has not begun.
        """
        self._scores.clear()
        window = self.window_of(step)
        if step != window.start:
            log.info(
                "old policy: synced before step %d, within the window of steps %d to %d, of which no scores were kept "
                "as the run had ended there",
                *(step + 1, window.start + 1, window.stop),
            )
        end = window.stop
        scored_steps = range(step + 1, end)
        if scored_steps and self._prepare is not None:
            self._prepare(scored_steps)
            self._prepare = None
        scores: dict[int, list[Tensor]] = {}
        for later in progress(scored_steps, "old policy", unit="step", is_shown=self._show_progress):
            scores[later] = self.score(later)
            between_batches()
        self._start, self._end, self._scores = step, end, scores

    def score(self, step: int) -> list[Tensor]:
        """What the current weights say of the labels of `step`, as `Scores.log_probs`, in host memory: k global batches
        of them are needed one at a time, far apart. Collective."""
        return [log_probs.cpu() for log_probs in self._score(step)]

    def at(self, step: int) -> OldPolicy:
        """The old policy of `step`, which a window must hold if it has one."""
        if not self._has_old_policy(step):
            return NoOldPolicy()
        if step == self._start:
            return CurrentPolicy()
        return Scores(self._scores[step])

    def state(self, step: int) -> dict[int, list[Tensor]]:
        """What of the window is still to come when steps before `step` are completed: `Scores.log_probs` by step."""
        return {later: log_probs for later, log_probs in self._scores.items() if later >= step}

    def load_state(self, scores: Mapping[int, Sequence[Tensor]], *, start: int | None = None) -> None:
        """Goes on within the window that `state` was taken of, and whose first step was `start`, by count if None."""
        self._scores = {step: list(log_probs) for step, log_probs in scores.items()}
        self._start, self._end = None, max(scores, default=-1) + 1
        if scores:
            self._start = self.window_of(min(scores)).start if start is None else start

    def _has_old_policy(self, step: int) -> bool:
        return objective_at(self._objective, step).config.needs_old_policy
