"""What is drawn of runs: charts of metrics over steps, in sections that each answer one question."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_psft.metrics.metric import ChartSection, ChartSpec, Metric
from megatron_psft.metrics.set_names import metric_of_set
from megatron_psft.metrics.table import METRICS
from megatron_psft.report.runs import Run


@dataclass(frozen=True, kw_only=True)
class Chart(ChartSpec):
    """How a metric is drawn, with what its entry leaves to the metric."""

    name: str
    unit: str
    metric: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """Charts that answer one question."""

    title: str
    note: str
    charts: tuple[Chart, ...]
    of_old_policy: bool = False
    """Whether it is left out where no run has one; its syncs are marked."""


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


SECTIONS = (
    Section(
        title="What is learned",
        note="Nats per label token, on the batches of training and on held-out records.",
        charts=_charts("learning"),
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
            metric = metric_of_set(chart.metric, name)
            yield replace(chart, name=f"{chart.name}-{name}", title=f"{chart.title}, {name}", metric=metric)
