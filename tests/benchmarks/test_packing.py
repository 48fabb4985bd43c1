"""The packing benchmark measures, and says clearly where there is nothing to compare with."""

import json
import sys

import pytest

from tests.support import tiny
from tests.support.cli import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import packing


@pytest.fixture
def argv(tmp_path) -> list[str]:
    tokenizer = tiny.build_tokenizer(tmp_path / "tokenizer")
    records = tiny.write_records(tmp_path / "records.jsonl", 40)
    return ["--data", str(records), "--tokenizer", str(tokenizer), "--seq-length", "512", "--copies", "2"]


def test_without_trl_its_own_figures_and_an_error_that_names_the_extra(argv, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    assert packing.main(argv) == 2
    out, err = capsys.readouterr()
    figures = {figure["name"]: figure for figure in map(json.loads, out.splitlines())}
    own = ["fill", "tokenize", "pack", "prepare", "pack_a_million_lengths"]
    assert list(figures) == [*own, "records_cost_over_bound", "deal_out_a_step_of_records"]
    assert 1 <= figures["records_cost_over_bound"]["value"] < 1.03
    assert 0.9 < figures["fill"]["value"] <= 1
    assert (figures["fill"]["records"], figures["tokenize"]["records"]) == (40, 80)
    assert figures["prepare"]["value"] < figures["tokenize"]["value"] < figures["pack"]["value"]
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.endswith("pip install -e '.[rl]'")
