"""Curves and their pictures, from numbers known by hand."""

import dataclasses
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from megatron_psft.report import drawing, palette
from megatron_psft.report.charts import SECTIONS, Chart
from megatron_psft.report.drawing import curves_of, draw, thinned, window_of
from megatron_psft.report.runs import Run

CHART = Chart(section="learning", name="loss", title="Loss", unit="nats", note="", metric="loss")
RATE = dataclasses.replace(CHART, name="rate", metric="tokens", per="seconds", factor=10)
SVG = "{http://www.w3.org/2000/svg}"


def run_of(label: str = "run", objective: str | None = None, **metrics: list[float]) -> Run:
    values = {name: np.array(column, dtype=np.float64) for name, column in metrics.items()}
    steps = np.arange(1, len(next(iter(values.values()))) + 1)
    return Run(
        folder=Path(label),
        label=label,
        steps=steps,
        metrics=values,
        not_finite={},
        config={} if objective is None else {"objective": objective},
        clipped_tokens=None,
        modified=0,
    )


def test_a_value_is_of_the_steps_around_it():
    run = run_of(loss=[1, 2, 6, 10])
    (curve,) = curves_of(CHART, [run], 3)
    assert (curve.steps.tolist(), curve.values.tolist()) == ([2, 3], [3, 6])
    assert (curve.raw_steps.tolist(), curve.raw.tolist()) == ([1, 2, 3, 4], [1, 2, 6, 10])
    (curve,) = curves_of(dataclasses.replace(CHART, over_steps="max"), [run], 2)
    assert (curve.steps.tolist(), curve.values.tolist(), curve.raw.tolist()) == ([2, 3, 4], [2, 6, 10], [])
    for chart, window in ((CHART, 1), (dataclasses.replace(CHART, over_steps="none"), 2)):
        (curve,) = curves_of(chart, [run], window)
        assert (curve.values.tolist(), curve.raw.tolist()) == ([1, 2, 6, 10], [])


def test_a_run_shorter_than_a_value_has_one():
    (curve,) = curves_of(CHART, [run_of(loss=[1, 2])], 3)
    assert (curve.steps.tolist(), curve.values.tolist()) == ([2], [1.5])


def test_a_mean_of_rates_is_that_of_the_whole_time():
    (curve,) = curves_of(RATE, [run_of(tokens=[10, 10], seconds=[1, 4])], 2)
    assert (curve.values.tolist(), curve.raw.tolist()) == ([10 * 20 / 5], [])
    (curve,) = curves_of(RATE, [run_of(tokens=[10, 10], seconds=[1, 4])], 1)
    assert curve.values.tolist() == [100, 25]


def test_runs_without_the_metric_have_no_curve_and_keep_their_style():
    runs = [run_of(nll=[1]), run_of(loss=[np.nan]), run_of(loss=[np.nan, 2, np.inf, 4])]
    (curve,) = curves_of(CHART, runs, 2)
    assert (curve.run, curve.steps.tolist(), curve.values.tolist()) == (2, [4], [3])


def test_values_are_of_whole_windows_of_the_old_policy():
    sft = run_of(ratio_max=[1] * 120)
    assert window_of([sft]) == 3
    assert window_of([sft, run_of(ratio_max=[1, 2, 2, 2, 2, 2, 2, 2] * 15)]) == 8
    assert window_of([run_of(ratio_max=[1, 2, 2, 2] * 510)]) == 44  # more than 2040 / 50
    assert window_of([run_of(loss=[1, 2])]) == 1


def test_thinning_keeps_ends_and_extremes():
    values = np.sin(np.arange(20_000.0))
    values[[7_001, 13_013]] = 50, -50
    some = thinned(values)
    assert len(some) <= drawing.MAX_POINTS
    assert {0, 7_001, 13_013, 19_999} <= set(some.tolist())
    assert (np.diff(some) > 0).all()
    assert thinned(np.arange(5.0)).tolist() == [0, 1, 2, 3, 4]


def texts_of(svg: str) -> list[str]:
    return ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def draw_values(tmp_path, chart: Chart, *columns: list[float], smooth: int = 1):
    runs = [run_of(f"run {number}", **{chart.metric: column}) for number, column in enumerate(columns)]
    return draw(chart, runs, curves_of(chart, runs, smooth), [2], tmp_path / "x.png")


def test_axes_have_units_and_plain_numbers(tmp_path):
    drawn = draw_values(tmp_path, CHART, [1.0000001, 1.0000004, 1.0000002])
    texts = texts_of(drawn.svg)
    assert {"nats", "optimizer step"} <= set(texts)
    assert "1.0000002" in texts
    assert len(set(texts)) == len(texts)  # no two ticks have one label
    assert {"20k", "40k", "0"} <= set(texts_of(draw_values(tmp_path, CHART, [0, 20_000, 40_000]).svg))
    assert "2e\N{MINUS SIGN}6" in texts_of(draw_values(tmp_path, CHART, [0, 2e-6, 4e-6]).svg)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_wide_span_gets_a_logarithmic_axis_where_it_helps(tmp_path):
    wide = dataclasses.replace(CHART, may_be_log=True)
    assert draw_values(tmp_path, wide, [1, 1000]).axes["log"]
    assert not draw_values(tmp_path, wide, [1, 50]).axes["log"]
    assert draw_values(tmp_path, wide, [0, 1, 1000]).axes["log"]
    assert not draw_values(tmp_path, wide, [0, 1000]).axes["log"]
    assert not draw_values(tmp_path, wide, [0, 0]).axes["log"]
    assert not draw_values(tmp_path, CHART, [1, 1000]).axes["log"]


def test_the_place_of_the_axes_finds_a_point_in_the_picture(tmp_path):
    """The curve's second point, in the picture's own units, from what the page's script is told."""
    drawn = draw_values(tmp_path, CHART, [0, 3, 1])
    root = ElementTree.fromstring(drawn.svg)
    _, _, width, height = map(float, root.get("viewBox").split())
    assert root.get("width") is None
    paths = [path.get("d").split() for path in root.iter(f"{SVG}path") if "#0072b2" in path.get("style", "").lower()]
    (path,) = [path for path in paths if len(path) == 9]  # M x y L x y L x y
    left, top, right, bottom = drawn.axes["box"]
    (x0, x1), (y0, y1) = drawn.axes["x"], drawn.axes["y"]
    assert float(path[4]) == pytest.approx(width * (left + (2 - x0) / (x1 - x0) * (right - left)), abs=0.01)
    assert float(path[5]) == pytest.approx(height * (bottom - (3 - y0) / (y1 - y0) * (bottom - top)), abs=0.01)


def test_names_within_pictures_of_one_page_differ(tmp_path):
    pictures = [
        ElementTree.fromstring(draw_values(tmp_path, dataclasses.replace(CHART, name=name), [1, 2]).svg)
        for name in ("a", "b")
    ]
    ids = [[element.get("id") for element in picture.iter() if element.get("id")] for picture in pictures]
    assert not set(ids[0]) & set(ids[1])
    for picture, own in zip(pictures, ids, strict=True):
        href = "{http://www.w3.org/1999/xlink}href"
        links = {element.get(href)[1:] for element in picture.iter() if element.get(href)}
        assert links
        assert links <= set(own)


def test_styles_differ_between_all_runs():
    for objective in ("psft", "sft", "dft"):
        runs = [run_of(loss=[1], objective=objective)] * drawing.MAX_RUNS
        assert len({tuple(style.values()) for style in drawing.styles_of(runs)}) == drawing.MAX_RUNS


def test_psft_and_sft_have_their_colours_in_any_order():
    runs = [run_of(loss=[1], objective=name) for name in ("dft", "sft", "psft", "sft")]
    colours = [style["color"] for style in drawing.styles_of(runs)]
    assert colours == [palette.GREEN, palette.SFT, palette.PSFT, palette.PURPLE]


def test_every_chart_has_a_name_of_its_own_a_title_and_a_unit():
    charts = [chart for section in SECTIONS for chart in section.charts]
    assert len({chart.name for chart in charts}) == len({chart.title for chart in charts}) == len(charts)
    assert all(chart.title and chart.unit and chart.note for chart in charts)
