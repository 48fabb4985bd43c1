"""The table of metrics, and what is made of it: the docs' table, lines under former names, charts."""

import subprocess
import sys

import pytest

from docs.generate import metric_table
from megatron_psft.metrics.lines import with_former_names
from megatron_psft.metrics.table import METRICS, means


def test_each_metric_has_one_row_with_unit_and_text():
    rows = metric_table().splitlines()[2:]
    assert len(rows) == len(METRICS)
    for row, metric in zip(rows, METRICS.values(), strict=True):
        _, name, unit, text, _, _, _ = row.split("|")
        assert name.strip().startswith(f"`{metric.name}`")
        assert unit.strip()
        assert text.strip().endswith(".")


def test_a_metric_is_of_the_runs_whose_objective_needs_what_it_is_about():
    shared = means(())
    assert set(shared.values()) == {"label_tokens", "denominator"}
    assert means({"reference", "records"}) == shared
    old = means({"old"}).items() - shared.items()
    assert dict(old) == dict.fromkeys(("clip_fraction", "ratio_mean", "approx_kl"), "label_tokens")
    pairs = means({"pairs", "reference"}).items() - shared.items()
    assert dict(pairs) == dict.fromkeys(("margin", "accuracy", "chosen_log_probs", "rejected_log_probs"), "pairs")


def test_a_renamed_metric_is_written_under_both_names():
    line = with_former_names({"label_tokens": 3, "records": 2, "nll": 0.5})
    assert line == {"label_tokens": 3, "loss_tokens": 3, "records": 2, "sequences": 2, "nll": 0.5}


def test_a_metric_without_an_entry_is_not_written():
    with pytest.raises(KeyError, match="perplexity"):
        with_former_names({"perplexity": 3.0})


def test_the_table_is_read_without_torch():
    code = "import sys, megatron_psft.metrics.table, megatron_psft.report.charts; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
