"""The report: one HTML page that needs nothing else, and a PNG of each chart beside it."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_psft import __version__
from megatron_psft.atomic import replace_file
from megatron_psft.report.charts import SECTIONS, Chart, Section, charts_of
from megatron_psft.report.drawing import MAX_SYNCS, Curve, curves_of, draw, styles_of, thinned, window_of
from megatron_psft.report.runs import Run
from megatron_psft.report.tables import END_STEPS, clipped_tokens, config_table, date, differing, number, summary_table

PAGE_FILE = "report.html"
SAME_TASK = ("load_hf", "tokenizer", "data", "valid_data", "objective", "loss_on", "system_prompt")
"""Fields that a comparison of losses wants equal."""
_DASH_ARRAYS = {"solid": "", "dashed": "7 3", "dotted": "3 3"}


def write_report(runs: Sequence[Run], folder: Path, *, smooth: int | None) -> Path:
    """Writes `report.html` and the PNGs into `folder`, and returns the path of the page.

    Args:
        runs: to compare, at most `drawing.MAX_RUNS`.
        folder: that exists.
        smooth: steps that a curve's value is of; where None, as of `drawing.window_of`.
    """
    window = smooth or window_of(runs)
    drawn = [_section(section, runs, window, folder) for section in SECTIONS]
    sections = [section for section in drawn if section["charts"]]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.get_template("page.html").render(
        runs=[_legend_entry(run, style) for run, style in zip(runs, styles_of(runs), strict=True)],
        summary=summary_table(runs),
        config=config_table(runs),
        mixed=differing(runs, SAME_TASK),
        sections=sections,
        charts={chart["name"]: chart.pop("hover") for section in sections for chart in section["charts"]},
        clipped_tokens=[clipped_tokens(run) for run in runs if run.clipped_tokens],
        end_steps=END_STEPS,
        window=window,
        version=__version__,
        written=date(time.time()),
    )
    path = folder / PAGE_FILE
    replace_file(path, page)
    return path


def _legend_entry(run: Run, style: Mapping[str, str]) -> dict[str, str]:
    return {"label": run.label, "color": style["color"], "dash": _DASH_ARRAYS[style["linestyle"]]}


def _section(section: Section, runs: Sequence[Run], window: int, folder: Path) -> dict[str, Any]:
    if section.of_old_policy and not any(run.has_old_policy for run in runs):
        return {"charts": []}
    syncs = _common_syncs(runs) if section.of_old_policy else []
    shown = [
        _chart(chart, runs, curves, syncs, folder)
        for chart in charts_of(section, runs)
        if (curves := curves_of(chart, runs, window))
    ]
    return {"title": section.title, "note": section.note, "charts": shown, "syncs": bool(syncs)}


def _common_syncs(runs: Sequence[Run]) -> list[int]:
    """The steps at which all runs that have an old policy sync it, where they agree and are not too many to see."""
    syncs = [run.syncs for run in runs if run.syncs]
    return syncs[0] if syncs and all(steps == syncs[0] for steps in syncs) and len(syncs[0]) <= MAX_SYNCS else []


def _chart(
    chart: Chart, runs: Sequence[Run], curves: Sequence[Curve], syncs: Sequence[int], folder: Path
) -> dict[str, Any]:
    drawing = draw(chart, runs, curves, syncs, folder / f"{chart.name}.png")
    courses = [f"{runs[curve.run].label}: {_course(curve)}" for curve in curves]
    left_out = [
        f"{runs[curve.run].label}: {count} {'value is' if count == 1 else 'values are'} nan or infinite and not drawn."
        for curve in curves
        if (count := runs[curve.run].not_finite.get(chart.metric))
    ]
    if drawing.axes["log"] and any((curve.values <= 0).any() for curve in curves):
        left_out.append("Values of 0 have no place on a logarithmic axis.")
    return {
        "name": chart.name,
        "title": chart.title,
        "note": " ".join([chart.note, *left_out]),
        "svg": Markup(drawing.svg),
        "text": f"{chart.title}, {chart.unit}, over {chart.against or 'optimizer steps'}. {'; '.join(courses)}.",
        "hover": {**drawing.axes, "curves": [_points(curve) for curve in curves]},
    }


def _course(curve: Curve) -> str:
    first, last = number(curve.values[0]), number(curve.values[-1])
    return f"{first} at step {curve.steps[0]} to {last} at step {curve.steps[-1]}"


def _points(curve: Curve) -> dict[str, Any]:
    some = thinned(curve.values)
    values = [float(f"{value:.5g}") for value in curve.values[some]]
    points = {"run": curve.run, "steps": curve.steps[some].tolist(), "values": values}
    if curve.against is not None:
        points["against"] = [float(f"{place:.5g}") for place in curve.against[some]]
    return points
