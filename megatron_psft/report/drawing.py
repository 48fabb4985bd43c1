"""Draws a chart of all runs, as SVG for the page and as PNG."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import Formatter, MaxNLocator
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from megatron_psft.report import palette
from megatron_psft.report.charts import Chart
from megatron_psft.report.runs import Run

DASHES = ("solid", "dashed", "dotted")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
MAX_RUNS = len(palette.RUNS) * len(DASHES)
_OWN = {"psft": palette.PSFT, "sft": palette.SFT}

MAX_POINTS = 600
"""Of a curve that is drawn: two for each point of the axis."""
MAX_MARKERS = 40
"""Of a curve over all of the axis."""
CURVE_VALUES = 50
MAX_SYNCS = 40
"""More of them would be a grey area."""
LOG_SPAN = 100
"""Largest over smallest positive value from which on a logarithmic axis shows more."""

_STYLE: Any = {  # matplotlib's type of it lists all its settings
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": "#444444",
    "axes.axisbelow": True,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "#444444",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E6E6E6",
    "xtick.color": "#999999",
    "xtick.labelcolor": "#444444",
    "ytick.color": "#999999",
    "ytick.labelcolor": "#444444",
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "svg.hashsalt": "megatron_psft",  # the same runs make the same file
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run's part of a chart; nan and infinite values are left out."""

    run: int
    """Its place among the runs."""
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    """Each of as many steps as lie around its own; at the ends of the run there are none where they are several."""
    raw_steps: NDArray[np.int64]
    raw: NDArray[np.float64]
    """Each step's own; empty where a line of them would say less than that of `values`."""
    against: NDArray[np.float64] | None = None
    """Where each of `values` lies on the horizontal axis; at its step if None."""
    stderr: NDArray[np.float64] | None = None
    """Standard error of each of `values`; None where the chart has none."""

    @property
    def across(self) -> NDArray[Any]:
        return self.steps if self.against is None else self.against


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A chart as the page shows it."""

    svg: str
    curves: Sequence[Curve]
    axes: dict[str, Any]
    """Where the axes lie within the picture and what they span: what turns a place into a step and back."""


def window_of(runs: Sequence[Run]) -> int:
    """Steps that a curve's value is of, so that the longest run has about CURVE_VALUES independent ones: whole windows
    of the old policy, as clipping begins anew in each."""
    longest = max(run.num_steps for run in runs)
    return max(run.interval * math.ceil(longest / CURVE_VALUES / run.interval) for run in runs)


def curves_of(chart: Chart, runs: Sequence[Run], window: int) -> list[Curve]:
    """The curves of those runs that have the metric, each value of `window` steps."""
    return [
        curve
        for place, run in enumerate(runs)
        if {chart.metric, chart.against or chart.metric} <= run.metrics.keys()
        and len((curve := _curve(chart, run, place, window)).steps)
    ]


def _curve(chart: Chart, run: Run, place: int, window: int) -> Curve:
    values = chart.factor * run.metrics[chart.metric]
    weights = run.metrics[chart.per] if chart.per else np.ones_like(values)
    against = None if chart.against is None else run.metrics[chart.against]
    shown = np.isfinite(values) & np.isfinite(weights)
    shown &= True if against is None else np.isfinite(against)
    steps, values, weights = run.steps[shown], values[shown], weights[shown]
    window = min(window, len(steps)) if chart.over_steps != "none" else 1
    if window <= 1:
        return Curve(
            run=place,
            steps=steps,
            values=values / weights,
            raw_steps=steps[:0],
            raw=values[:0],
            against=None if against is None else against[shown],
            stderr=run.metrics[chart.stderr][shown] if chart.stderr and chart.stderr in run.metrics else None,
        )
    around = sliding_window_view(values, window)
    means = around.sum(axis=1) / sliding_window_view(weights, window).sum(axis=1)
    has_raw = chart.over_steps == "mean" and chart.per is None
    return Curve(
        run=place,
        steps=steps[window // 2 :][: len(around)],
        values=around.max(axis=1) if chart.over_steps == "max" else means,
        raw_steps=steps if has_raw else steps[:0],
        raw=values if has_raw else values[:0],
    )


def thinned(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of at most MAX_POINTS values, with the extremes of each stretch among them: no peak is lost."""
    indices = np.arange(len(values))
    if len(values) <= MAX_POINTS:
        return indices
    stretches = np.array_split(indices, MAX_POINTS // 2 - 1)
    extremes = [stretch[pick(values[stretch])] for stretch in stretches for pick in (np.argmin, np.argmax)]
    return np.unique([0, *extremes, len(values) - 1])


def draw(chart: Chart, runs: Sequence[Run], curves: Sequence[Curve], syncs: Sequence[int], png: Path) -> Drawing:
    """Draws the chart, with `syncs` marked, and writes it with a title and a legend to `png` too."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.0, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for step in syncs:
            axes.axvline(step, color="#D8D8D8", linewidth=0.7, linestyle=(0, (2, 2)), zorder=0)
        first, last = _ends(chart, runs, curves)
        styles = styles_of(runs)
        lines = [_plot(axes, curve, last - first, styles[curve.run]) for curve in curves]
        margin = 0.02 * (last - first) + (0.1 if chart.against is None else 1e-9)
        axes.set_xlim(first - margin, last + margin)
        _scale(axes, chart, curves)
        svg = StringIO()
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        drawing = Drawing(svg=_inline(svg.getvalue(), chart.name), curves=curves, axes=_place(axes))
        # Outside of the picture, which grows by what they need.
        figure.text(0.02, 1.02, chart.title, fontsize=11, fontweight="bold", color="#111111")
        labels = [runs[curve.run].label for curve in curves]
        legend = figure.legend(
            lines,
            [str(curve.run) for curve in curves],  # texts, as a label that begins with _ would be left out
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            ncols=max(1, min(3, 50 // (max(map(len, labels)) + 6))),
            frameon=False,
        )
        for text, label in zip(legend.get_texts(), labels, strict=True):
            text.set(text=label, parse_math=False)
        figure.savefig(png, dpi=200, bbox_inches="tight")
    return drawing


def _ends(chart: Chart, runs: Sequence[Run], curves: Sequence[Curve]) -> tuple[float, float]:
    """Of the horizontal axis: all steps of the runs, or all that the chart is drawn against, and 0."""
    if chart.against is None:
        return float(min(run.steps[0] for run in runs)), float(max(run.steps[-1] for run in runs))
    places = np.concatenate([curve.across for curve in curves])
    return min(0.0, float(places.min())), float(places.max())


def _plot(axes: Axes, curve: Curve, span: float, style: Mapping[str, str]) -> Line2D:
    some = thinned(curve.raw)
    axes.plot(curve.raw_steps[some], curve.raw[some], color=style["color"], linewidth=0.6, alpha=0.35, zorder=1.5)
    some = thinned(curve.values)
    if curve.stderr is not None:
        low, high = (curve.values[some] + side * curve.stderr[some] for side in (-1, 1))
        axes.fill_between(curve.across[some], low, high, color=style["color"], alpha=0.2, linewidth=0, zorder=1.5)
    is_sparse = curve.against is not None or curve.steps[-1] - curve.steps[0] >= (len(some) - 1) * span / MAX_MARKERS
    (line,) = axes.plot(
        curve.across[some],
        curve.values[some],
        color=style["color"],
        linestyle=style["linestyle"],
        linewidth=1.4,
        marker=MARKERS[curve.run % len(MARKERS)] if is_sparse else "",
        markersize=3.5,
    )
    return line


def styles_of(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Colour and dashes of each run: the first run of PSFT and of SFT have the colours that they have in all pictures,
    the others what is left, in order."""
    objectives = [run.config.get("objective") for run in runs]
    own = {objectives.index(name): palette.RUNS.index(colour) for name, colour in _OWN.items() if name in objectives}
    left = (place for place in range(MAX_RUNS) if place not in own.values())
    places = [own[run] if run in own else next(left) for run in range(len(runs))]
    count = len(palette.RUNS)
    return [{"color": palette.RUNS[place % count], "linestyle": DASHES[place // count]} for place in places]


def _scale(axes: Axes, chart: Chart, curves: Sequence[Curve]) -> None:
    values = np.concatenate([part for curve in curves for part in (curve.values, curve.raw)])
    strong = np.concatenate([curve.values[curve.values > 0] for curve in curves])
    if chart.may_be_log and len(strong) and strong.max() >= LOG_SPAN * strong.min():
        axes.set_yscale("log", nonpositive="mask")
    elif chart.from_zero:
        axes.set_ylim(0, 1.05 * values.max() if values.max() > 0 else 1)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(_Plain())
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=chart.against is None))
    axes.xaxis.set_major_formatter(_Plain())
    axes.set_xlabel("optimizer step" if chart.against is None else f"{chart.against}, nats per token")
    axes.set_title(chart.unit, loc="left", fontsize=9.5, color="#444444")


class _Plain(Formatter):
    """Numbers in full, with one number of decimals; thousands as k, millions as M, tiny ones with an exponent."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return self.format_ticks([x])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        largest = max(map(abs, values), default=0.0)
        divisor, suffix = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e4 else (1.0, "")
        scaled = [value / divisor for value in values]
        if 0 < largest < 1e-3:
            texts = [f"{value:.3g}".replace("e-0", "e-") for value in scaled]
        else:
            error = 1e-9 * largest
            decimals = next((n for n in range(9) if all(abs(round(x, n) - x) <= error for x in scaled)), 9)
            texts = [f"{value:.{decimals}f}" for value in scaled]
        return [self.fix_minus(text) + (suffix if value else "") for text, value in zip(texts, values, strict=True)]


def _place(axes: Axes) -> dict[str, Any]:
    box = axes.get_position()
    return {
        "box": [round(float(part), 5) for part in (box.x0, 1 - box.y1, box.x1, 1 - box.y0)],
        "x": [float(end) for end in axes.get_xlim()],
        "y": [float(end) for end in axes.get_ylim()],
        "log": axes.get_yscale() == "log",
    }


def _inline(svg: str, prefix: str) -> str:
    """A picture as an element of a page that has others: its names are its own, and the page sets its size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg [^>]*?)\swidth="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?)\sheight="[^"]*"', r"\1", svg))
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
