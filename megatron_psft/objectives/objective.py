"""The objective of a run, as the trainer asks it: what it needs, and the losses of label tokens."""

from dataclasses import dataclass

from torch import Tensor

from megatron_psft.errors import UserError
from megatron_psft.objectives.builtin.psft import is_clipped
from megatron_psft.objectives.declare import ExtraStat, Requirement, Settings
from megatron_psft.objectives.labels import LabelInputs, LabelStats
from megatron_psft.objectives.ratio import policy_ratio
from megatron_psft.objectives.registry import find_objective, needs_of


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The token loss that a configuration names, with its settings."""

    config: Settings
    """The run's `ObjectiveConfig`."""

    @property
    def needs(self) -> frozenset[Requirement]:
        """What it needs."""
        return needs_of(self.config.objective, self.config)

    @property
    def extra_stats(self) -> frozenset[ExtraStat]:
        """Which statistics it needs."""
        return frozenset({"top_entropy", "sum_squares"}) & self.needs  # type: ignore[return-value]

    @property
    def needs_whole_records(self) -> bool:
        """Whether the loss of a token depends on other tokens of its record, so that all are needed at once."""
        return "records" in self.needs

    def token_loss(self, stats: LabelStats, given: LabelInputs) -> Tensor:
        """Loss of each label token, times its weight in the aggregation, `[n]`.

        Raises:
            UserError: the objective returns another shape.
        """
        losses = find_objective(self.config.objective).loss(stats, given, self.config)
        if losses.shape != stats.log_probs.shape:
            raise UserError(
                f"objective ({self.config.objective}) must return a loss for each label token, shape "
                f"{list(stats.log_probs.shape)}, and returned {list(losses.shape)}; leave the mean to the trainer"
            )
        return losses if given.weights is None else losses * given.weights

    def is_clipped(self, log_probs: Tensor, given: LabelInputs) -> Tensor:
        """Which label tokens the trust region leaves without a gradient, `[n]` bool."""
        old_log_probs = log_probs if given.old_log_probs is None else given.old_log_probs
        own = find_objective(self.config.objective).is_clipped
        if own is not None:
            return own(log_probs, old_log_probs, given.advantages, self.config)
        return is_clipped(policy_ratio(log_probs, old_log_probs), given.advantages, self.config)
