"""What an entry of the table of metrics says. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from megatron_psft.objectives.declare import Requirement

Over = Literal["label_tokens", "denominator", "pairs"]
"""What a mean is over, by the name of its sum: label tokens, what the loss aggregation divides by, preference pairs."""

ChartSection = Literal["learning", "forgetting", "old policy", "pairs", "optimizer", "speed"]
"""Part of the report that a chart stands in."""


@dataclass(frozen=True, kw_only=True)
class ChartSpec:
    """How the report draws a metric, or one divided by another, over the steps."""

    section: ChartSection
    title: str
    note: str
    """What to read from it."""
    name: str | None = None
    """Of its PNG; the metric's own if None."""
    unit: str | None = None
    """Of the axis; the metric's own if None."""
    metric: str | None = None
    """Metric whose values are drawn; the one that the chart belongs to if None."""
    per: str | None = None
    """Metric to divide by; a mean over steps is of sum by sum."""
    stderr: str | None = None
    """Metric that is the standard error of the values, drawn as a band around them."""
    factor: float = 1.0
    over_steps: Literal["mean", "max", "none"] = "mean"
    """What is drawn of several steps: their mean or largest value, or each of them."""
    may_be_log: bool = False
    """Whether the axis is logarithmic where values differ much; it has no place for 0."""
    from_zero: bool = False
    """Whether the axis begins at 0, unless it is logarithmic."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A key of metrics.jsonl, of the global batch of a step where nothing else is said."""

    name: str
    unit: str
    help: str
    """What it is, as docs/metrics.md says it."""
    over: Over | None = None
    """What it is a mean over: the sum of its name in `BatchSums` is divided by the sum of this name. None if it is
    no mean of sums."""
    needs: Requirement | None = None
    """What an objective must need for its runs to have the metric; None if all runs have it."""
    is_by_source: bool = False
    """Whether runs on several sources have it of each by itself, too, over its label tokens."""
    ratio_percentile: int | None = None
    """Which percentile it is of the ratios of all label tokens, by nearest rank; None if it is none."""
    former_name: str | None = None
    """Its name before a rename, which is written beside it for one release."""
    is_printed: bool = False
    """Whether the line of every `log_interval` steps has it."""
    is_on_bar: bool = False
    """Whether the progress bar of training has it."""
    chart: ChartSpec | None = None
    """None if the report has no chart of it."""
