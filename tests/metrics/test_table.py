"""The table of metrics, and what is made of it: the docs' table, lines under former names, charts."""

import subprocess
import sys

import pytest

from docs.generate import metric_table
from megatron_psft.metrics.table import METRICS, means, with_former_names


def test_each_metric_has_one_row_with_unit_and_text():
    rows = metric_table().splitlines()[2:]
    assert len(rows) == len(METRICS)
    for row, metric in zip(rows, METRICS.values(), strict=True):
        _, name, unit, text, _, _ = row.split("|")
        assert name.strip().startswith(f"`{metric.name}`")
        assert unit.strip()
        assert text.strip().endswith(".")


def test_what_divides_a_mean_is_known_to_runs_without_pairs_too():
    assert set(means(of_pairs=False).values()) == {"label_tokens", "denominator"}
    pairs = means(of_pairs=True).items() - means(of_pairs=False).items()
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
