"""What is known of label tokens: by the current policy, and besides it. Plain tensors, no process group.

Dimension letters: n label tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

TOP_TOKENS = 20
"""Tokens that `LabelStats.top_entropy` is of."""


class LabelStats(NamedTuple):
    """What the current policy says of each label, `[n]`; fp32, the same on every tensor-parallel rank."""

    log_probs: Tensor
    """log pi(label | context), natural logarithm, normalized over the true vocabulary; differentiable."""
    entropy: Tensor
    """Entropy of the full next-token distribution, nats; a metric, carries no gradient."""
    top_entropy: Tensor | None = None
    """Entropy of its 20 most probable tokens, their probabilities made to sum to 1, nats; without a gradient."""
    sum_squares: Tensor | None = None
    """Sum of its squared probabilities; without a gradient."""
    top_ids: Tensor | None = None
    """`[n, k]` int64, the k tokens that the next two are about: those that were asked for, or the most probable."""
    top_log_probs: Tensor | None = None
    """`[n, k]`, their log-probabilities; in a loss differentiable as `log_probs`."""
    rest_log_probs: Tensor | None = None
    """Log-probability of all other tokens together; in a loss differentiable."""

    @property
    def non_differentiable(self) -> list[Tensor]:
        """All but the log-probabilities."""
        return [values for values in self[1:] if values is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> "LabelStats":
        """Applies `change` to every statistic that is there."""
        return LabelStats(*(None if values is None else change(values) for values in self))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Records:
    """Which record each label token is of: for objectives that weigh a token by others."""

    ids: Tensor
    """`[n]` int64."""
    label_counts: Tensor
    """`[records]` int64, over all context-parallel ranks."""
    add_up: Callable[[Tensor], Tensor]
    """Adds `[records]` of this rank to those of the other context-parallel ranks; collective."""

    def sums(self, values: Tensor) -> Tensor:
        """Sums over the label tokens of each record, `[n]` to `[records]`."""
        return self.add_up(values.new_zeros(len(self.label_counts)).index_add_(0, self.ids, values))

    def means(self, values: Tensor) -> Tensor:
        """Means over the label tokens of each record, `[n]` to `[n]`, where each token has its record's."""
        return (self.sums(values) / self.label_counts.clamp(min=1))[self.ids]


@dataclass(frozen=True, kw_only=True)
class LabelInputs:
    """What is known of label tokens besides the current policy; `[n]` fp32 unless said, None where it is not there."""

    old_log_probs: Tensor | None = None
    """Under the old policy; None where that is the current one, so that the ratio is 1."""
    ref_log_probs: Tensor | None = None
    """Under the initial model."""
    ref_top_ids: Tensor | None = None
    """`[n, k]` int64, the most probable tokens under the initial model: `LabelStats.top_ids` of the policy."""
    ref_top_log_probs: Tensor | None = None
    """`[n, k]`, theirs under the initial model."""
    ref_rest_log_probs: Tensor | None = None
    """That of all other tokens together, under the initial model."""
    advantages: Tensor | None = None
    """None where all are 1."""
    nll_z: Tensor | None = None
    """By how many standard deviations, over the records of the global batch, the mean negative log-likelihood of the
    token's record is above theirs, under the weights before the step."""
    weights: Tensor | None = None
    """Factors of the token losses that aggregate them; None where all are 1."""
    records: Records | None = None
    """Given for all tokens of a micro-batch at once, and only to objectives that need it."""

    def part(self, rows: slice) -> "LabelInputs":
        """The same of some of the tokens."""
        return self.map(lambda values: values[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> "LabelInputs":
        """Applies `change` to every tensor that is there."""
        changed: dict[str, Any] = {
            name: change(values) for name, values in vars(self).items() if isinstance(values, Tensor)
        }
        return replace(self, **changed)
