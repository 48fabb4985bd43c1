"""What is drawn of runs: charts of metrics over steps, in sections that each answer one question."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_psft.metrics.metric import ChartSection, ChartSpec, Metric
from megatron_psft.metrics.set_names import metric_of_set, split_name
from megatron_psft.metrics.table import METRICS
from megatron_psft.report.runs import Run


@dataclass(frozen=True, kw_only=True)
class Chart(ChartSpec):
    """How a metric is drawn, with what its entry leaves to the metric."""

    name: str
    unit: str
    metric: str
    against: str | None = None
    """Metric of the horizontal axis, where that is not the optimizer step."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Charts that answer one question."""

    title: str
    note: str
    charts: tuple[Chart, ...]
    of_old_policy: bool = False
    """Whether it is left out where no run has one; its syncs are marked."""
    has_frontiers: bool = False
    """Whether each drift is also drawn against what is learned."""


def _charts(section: ChartSection) -> tuple[Chart, ...]:
    """Those of a section, in the table's order."""
    return tuple(
        _chart(metric, metric.chart)
        for metric in METRICS.values()
        if metric.chart is not None and metric.chart.section == section
    )


def _chart(metric: Metric, chart: ChartSpec) -> Chart:
    own = {"name": metric.name, "unit": metric.unit, "metric": metric.name}
    fields: dict[str, Any] = {field: value for field, value in vars(chart).items() if value is not None}
    return Chart(**{**own, **fields})


_TARGET = metric_of_set("valid_nll", "target")
"""What a frontier is drawn with, if there is one of this name."""

SECTIONS = (
    Section(
        title="What is learned",
        note="Nats per label token, on the batches of training and on held-out records.",
        charts=_charts("learning"),
    ),
    Section(
        title="What is forgotten",
        note="How far the model has gone from the initial one, on answers that this one has drawn.",
        charts=_charts("forgetting"),
        has_frontiers=True,
    ),
    Section(
        title="The old policy and its clip",
        note="How far the policy goes from the old one between two syncs.",
        charts=_charts("old policy"),
        of_old_policy=True,
    ),
    Section(title="Preference pairs", note="Chosen against rejected sequence of a pair.", charts=_charts("pairs")),
    Section(title="Optimizer", note="What an update is made of.", charts=_charts("optimizer")),
    Section(title="Speed and memory", note="Of whole steps, with the old policy's pass.", charts=_charts("speed")),
)


def charts_of(section: Section, runs: Sequence[Run]) -> Iterator[Chart]:
    """The section's charts, each followed by those of the named sets that runs have the same metric of."""
    for chart in section.charts:
        yield chart
        for name in dict.fromkeys(name for run in runs for name in run.sets_of(chart.metric)):
            yield replace(
                chart,
                name=f"{chart.name}-{name}",
                title=f"{chart.title}, {name}",
                metric=metric_of_set(chart.metric, name),
                stderr=None if chart.stderr is None else metric_of_set(chart.stderr, name),
            )
    if section.has_frontiers:
        yield from _frontiers(runs)


def _frontiers(runs: Sequence[Run]) -> Iterator[Chart]:
    """Of each drift set: its drift across, and how well the target is learned upwards."""
    targets = _measured(runs, "valid_nll")
    if not targets:
        return
    target = _TARGET if _TARGET in targets else targets[0]
    for drift in _measured(runs, "drift"):
        of_set = split_name(drift)[1]
        yield Chart(
            section="forgetting",
            name=f"frontier-{of_set}".removesuffix("-"),
            title=f"Learned against forgotten, {of_set}".removesuffix(", "),
            note="A path from the initial model at drift 0, with a mark for each evaluation. Where one lies below "
            "another, as much is learned with less drift.",
            unit=f"{target}, nats per label token",
            metric=target,
            against=drift,
            over_steps="none",
        )


def _measured(runs: Sequence[Run], metric: str) -> list[str]:
    """What runs have of a metric: of records without a name first, then of each named set."""
    bare = [metric] if any(metric in run.metrics for run in runs) else []
    return bare + list(dict.fromkeys(metric_of_set(metric, name) for run in runs for name in run.sets_of(metric)))
