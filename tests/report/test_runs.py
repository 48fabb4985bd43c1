"""Reading of run folders, good and bad."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_psft.config.schema import LoggingConfig
from megatron_psft.errors import UserError
from megatron_psft.metrics import clipped_tokens, run_log
from megatron_psft.metrics.trackers import Trackers
from megatron_psft.report import runs as report_runs
from megatron_psft.report.charts import SECTIONS, charts_of
from megatron_psft.report.drawing import curves_of, draw
from megatron_psft.report.runs import read_runs
from megatron_psft.report.tables import ABSENT, config_table, summary_table


def write(folder, text: str):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(text)
    return str(folder)


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_the_files_are_those_that_the_trainer_writes():
    assert report_runs.METRICS_FILE == run_log.METRICS_FILE
    assert report_runs.CLIPPED_TOKENS_FILE == clipped_tokens.CLIPPED_TOKENS_FILE


def test_what_the_writer_wrote_is_read(tmp_path):
    trackers = Trackers(LoggingConfig(), tmp_path, first_step=1)
    with run_log.RunLog(tmp_path, trackers, first_step=1, train_iters=2, log_interval=9) as report:
        values = {"loss": 1.0, "entropy": 0.1, "clip_fraction": 0.0, "tokens_per_second": 9.0}
        report.record(1, values)
        report.record(2, {**values, "loss": 0.5, "valid_nll": 0.25})
    (run,) = read_runs([str(tmp_path)])
    assert run.steps.tolist() == [1, 2]
    assert run.metrics["loss"].tolist() == [1.0, 0.5]
    assert math.isnan(run.metrics["valid_nll"][0])
    assert run.metrics["valid_nll"][1] == 0.25
    assert (run.config, run.clipped_tokens, run.not_finite) == ({}, None, {})


def test_a_run_from_before_a_rename_is_read_by_the_present_names(tmp_path):
    rows = [{"step": 1, "loss_tokens": 7.0, "loss": 1.0}, {"step": 2, "label_tokens": 5.0, "loss_tokens": 5.0}]
    (run,) = read_runs([write(tmp_path, lines(*rows))])
    assert set(run.metrics) == {"step", "label_tokens", "loss"}
    assert run.metrics["label_tokens"].tolist() == [7, 5]


def test_the_half_written_line_of_a_live_run_is_left_out(tmp_path):
    whole = lines({"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0})
    for end in ("", '{"step": 3, "lo', '{"step": 3, "loss": 3.0}'):
        (run,) = read_runs([write(tmp_path, whole + end)])
        assert run.steps.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n', "metrics.jsonl:2 is not JSON"),
        ('{"step": 1}\n\n{"step": 3}\n', "metrics.jsonl:2 is not JSON"),
        ('{"step": 1}\n[2]\n', "metrics.jsonl:2 must be an object of numbers"),
        ('{"loss": 1}\n', "metrics.jsonl:1 must be an object of numbers with a whole number as step"),
        ('{"step": 1, "loss": "low"}\n', "metrics.jsonl:1 must be an object of numbers"),
        ('{"step": 1, "loss": null}\n', "metrics.jsonl:1 must be an object of numbers"),
        ('{"step": 5}\n{"step": 5}\n', "metrics.jsonl:2: step (5) must be above the one before"),
        ("", "metrics.jsonl has no step yet"),
        ('{"step": 1', "metrics.jsonl has no step yet"),
    ],
)
def test_damage_is_named_by_file_and_line(tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        read_runs([write(tmp_path / "run", text)])
    assert message in str(caught.value)
    assert str(tmp_path / "run") in str(caught.value)


@pytest.mark.parametrize("text", ["lr: [1\n", "- lr\n", "\x00"])
def test_a_damaged_configuration_is_named(tmp_path, text):
    folder = write(tmp_path, lines({"step": 1}))
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_runs([folder])


def test_settings_that_changed_on_resume_are_told_with_their_steps(tmp_path):
    folder = write(tmp_path, lines({"step": 1}))
    (tmp_path / "config.yaml").write_text("train_iters: 4\nlr: 0.1\nobjective: psft\n")
    starts = [
        (0, {"train_iters": 4, "lr": 0.1, "objective": "psft"}),
        (2, {"train_iters": 8, "lr": 0.2, "objective": "psft"}),  # ended before a checkpoint
        (2, {"train_iters": 8, "lr": 0.3, "objective": "psft"}),
        (5, {"train_iters": 8, "lr": 0.1, "objective": "psft"}),
    ]
    rows = [{"time": "2026-01-01T00:00:00+00:00", "step": step, "settings": settings} for step, settings in starts]
    (tmp_path / "starts.jsonl").write_text(lines(*rows))
    (run,) = read_runs([folder])
    assert run.config == {"train_iters": 8, "lr": 0.1, "objective": "psft"}
    assert run.changes == {"train_iters": [(1, 4), (3, 8)], "lr": [(1, 0.1), (3, 0.3), (6, 0.1)]}
    cells = {row.name: row.cells for row in config_table([run])}
    assert cells == {
        "train_iters": ["4; from step 3 on 8"],
        "lr": ["0.1; from step 3 on 0.3; from step 6 on 0.1"],
        "objective": ["psft"],
    }


@pytest.mark.parametrize("text", ["{", "[]", '{"step": 1}', '{"step": "a", "settings": {}}'])
def test_damaged_starts_are_named(tmp_path, text):
    folder = write(tmp_path, lines({"step": 1}))
    (tmp_path / "starts.jsonl").write_text(text + "\n")
    with pytest.raises(UserError, match=r"starts\.jsonl:1 is not a start of the run"):
        read_runs([folder])


@pytest.mark.parametrize("text", ["{", "[]", '{"tokens": 3}', '{"tokens": [{"id": 1}]}'])
def test_damaged_clipped_tokens_are_named(tmp_path, text):
    folder = write(tmp_path, lines({"step": 1}))
    (tmp_path / "clipped_tokens.json").write_text(text)
    with pytest.raises(UserError, match=r"clipped_tokens\.json is damaged"):
        read_runs([folder])


def test_a_folder_of_runs_is_told_from_a_run(tmp_path):
    inner = [write(tmp_path / name, lines({"step": 1})) for name in ("a", "b")]
    with pytest.raises(UserError) as caught:
        read_runs([str(tmp_path)])
    assert str(caught.value).endswith(f"name its runs: {inner[0]} {inner[1]}")


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        (["one"], ["one"]),
        (["x/sft", "x/psft"], ["sft", "psft"]),
        (["x/seed-0/run", "x/seed-1/run"], ["seed-0", "seed-1"]),
        (["x/a/lr/run", "x/b/lr/run", "x/b/k/run"], ["a/lr", "b/lr", "b/k"]),
        (["x", "x/inner"], ["x", "x/inner"]),
    ],
)
def test_labels_are_what_differs_in_the_paths(tmp_path, folders, labels):
    paths = [write(tmp_path / folder, lines({"step": 1})) for folder in folders]
    assert [run.label for run in read_runs(paths)] == labels


def test_a_run_is_read_once(tmp_path):
    folder = write(tmp_path, lines({"step": 1}))
    with pytest.raises(UserError, match="is given 2 times; keep one"):
        read_runs([folder, folder + "/."])


@pytest.mark.parametrize(
    ("ratios", "syncs", "interval"),
    [
        ([1, 1.1, 1.2, 1, 1.1, 1.2, 1], [1, 4], 3),  # windows of three; the last has but begun
        ([1, 1, 1, 1.1, 1, 1.2], [3, 5], 2),  # two steps of warm-up
        ([1, 1.5, 2.5, 0.9], [1], 1),  # fixed
        ([1, 1, 1], [], 1),  # SFT, or windows of one step
    ],
)
def test_syncs_of_earlier_releases_are_where_the_ratios_start_anew(tmp_path, ratios, syncs, interval):
    rows = [{"step": step, "ratio_max": value} for step, value in enumerate(ratios, 1)]
    (run,) = read_runs([write(tmp_path, lines(*rows))])
    assert (run.syncs, run.interval) == (syncs, interval)
    assert run.has_old_policy == bool(syncs)


@pytest.mark.parametrize(
    ("places", "syncs", "interval"),
    [
        ([0, 1, 2, 0, 1, 2, 0], [1, 4, 7], 3),  # the last window has but begun
        ([None, None, 0, 1, 0, 1], [3, 5], 2),  # two steps of warm-up
        ([2, 3, 0, 1], [3], 1),  # the file begins within a window
        ([0, 0, 0], [], 1),  # windows of one step
        ([None, None], [], 1),  # SFT
    ],
)
def test_syncs_are_where_the_run_says(tmp_path, places, syncs, interval):
    """Whatever the ratios are: after a first step with a learning rate of 0 the second one's are 1 as well."""
    rows = [
        {"step": step, "ratio_max": 1.0 if step < 3 else 1.1} | ({} if place is None else {"window_step": place})
        for step, place in enumerate(places, 1)
    ]
    (run,) = read_runs([write(tmp_path, lines(*rows))])
    assert (run.syncs, run.interval) == (syncs, interval)
    assert run.has_old_policy == bool(syncs)


def test_a_run_without_ratios_has_no_old_policy(tmp_path):
    (run,) = read_runs([write(tmp_path, lines({"step": 1}, {"step": 2}))])
    assert (run.syncs, run.interval, run.has_old_policy) == ([], 1, False)


def test_a_named_set_has_its_chart_and_its_row(tmp_path):
    rows = [{"step": 0, "valid_nll/b.2": 3.0}, {"step": 1, "nll": 2.0}, {"step": 2, "nll": 1.0, "valid_nll/b.2": 2.5}]
    runs = read_runs([write(tmp_path / "x", lines(*rows)), write(tmp_path / "y", lines({"step": 1, "valid_nll": 1.0}))])
    assert [(run.num_steps, run.sets_of("valid_nll"), run.sets_of("nll")) for run in runs] == [
        (2, ["b.2"], []),
        (1, [], []),
    ]
    (learned,) = [section for section in SECTIONS if section.title == "What is learned"]
    charts = {chart.name: chart for chart in charts_of(learned, runs)}
    assert charts["valid_nll-b.2"].title == "Validation: negative log-likelihood, b.2"
    (curve,) = curves_of(charts["valid_nll-b.2"], runs, 9)
    assert (curve.run, curve.steps.tolist(), curve.values.tolist()) == (0, [0, 2], [3.0, 2.5])
    assert [curve.run for curve in curves_of(charts["valid_nll"], runs, 9)] == [1]
    table = {row.name: row.cells for row in summary_table(runs)}
    title = "validation NLL, nats: lowest, last"
    assert (table[title], table[f"b.2: {title}"]) == ([ABSENT, "1 (step 1), 1"], ["2.5 (step 2), 2.5", ABSENT])


def test_the_frontier_has_a_mark_for_each_evaluation_at_its_drift(tmp_path):
    def evaluated(step: int, drift: float, nll: float) -> dict:
        return {"step": step, "drift/chat": drift, "drift_stderr/chat": 0.01, "valid_nll": 9.0, "valid_nll/target": nll}

    rows = [evaluated(0, 0.0, 3.0), {"step": 1, "nll": 1.0}, evaluated(2, 0.2, 2.0), evaluated(3, 0.15, 1.5)]
    runs = read_runs([write(tmp_path / "x", lines(*rows)), write(tmp_path / "y", lines({"step": 1, "valid_nll": 1.0}))])
    (forgotten,) = [section for section in SECTIONS if section.has_frontiers]
    charts = {chart.name: chart for chart in charts_of(forgotten, runs)}
    assert list(charts) == ["drift", "drift-chat", "frontier-chat"]
    chart = charts["frontier-chat"]
    assert (chart.metric, chart.against) == ("valid_nll/target", "drift/chat")
    (curve,) = curves_of(chart, runs, 9)
    assert (curve.steps.tolist(), curve.across.tolist(), curve.values.tolist()) == (
        [0, 2, 3],
        [0.0, 0.2, 0.15],
        [3.0, 2.0, 1.5],
    )
    drawing = draw(chart, runs, [curve], [], tmp_path / "frontier.png")
    low, high = drawing.axes["x"]
    assert low <= 0 < 0.2 <= high < 0.3
    assert "drift/chat, nats per token" in drawing.svg
    (curve,) = curves_of(charts["drift-chat"], runs, 9)
    wide = replace(curve, stderr=np.array([0.0, 0.5, np.nan]))
    low, high = draw(charts["drift-chat"], runs, [wide], [], tmp_path / "drift.png").axes["y"]
    assert curve.stderr.tolist() == [0.01] * 3
    assert (low <= 0.2 - 0.5, high >= 0.2 + 0.5) == (True, True), "the band lies within the picture"
    cells = {row.name: row.cells for row in summary_table(runs)}
    assert cells["chat: drift from the initial model, nats per token"] == ["0.15 ± 0.01", ABSENT]
