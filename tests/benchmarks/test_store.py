"""Figures are kept as they were printed, a benchmark's all at once, and the pages' tables are made of them."""

import json
import sys

import pytest

from docs.figures import TABLES, figures_of
from tests.support.cli import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import store

PRINTS = """
import json, sys
print(json.dumps({"name": "machine", "value": 2, "unit": "threads"}))
print("a warning")
print(json.dumps({"name": "speed", "value": 1.5, "unit": "tokens/s", "size": sys.argv[-1]}))
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    """A repository whose benchmarks are written by the tests."""
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(store, "ROOT", tmp_path)
    return tmp_path / "results" / "cpu.jsonl"


def run_store(target, monkeypatch, **scripts: str) -> int:
    for name, text in scripts.items():
        (target.parents[1] / "benchmarks" / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["store.py", *scripts, "--size", "tiny", "--target", str(target)])
    return store.main()


def lines_of(target) -> list[dict]:
    return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


def test_figures_are_kept_with_where_they_come_from(target, monkeypatch):
    assert run_store(target, monkeypatch, plan=PRINTS, head=PRINTS) == 0
    head, head_figure, plan, plan_figure = lines_of(target)
    assert head_figure == {"benchmark": "head", "name": "speed", "value": 1.5, "unit": "tokens/s", "size": "tiny"}
    assert plan_figure == {**head_figure, "benchmark": "plan"}
    assert (head["name"], head["command"]) == ("run", "python benchmarks/head.py --size tiny")
    assert plan.keys() == head.keys() == {*head_figure} | {"date", "command", "commit", "machine", "versions"}
    assert head["versions"]["megatron-core"]
    assert head["machine"]["cores"] > 0


def test_a_benchmark_that_fails_keeps_its_earlier_figures(target, monkeypatch, capsys):
    run_store(target, monkeypatch, head=PRINTS, plan=PRINTS)
    before = lines_of(target)
    again = PRINTS.replace("1.5", "2.5")
    assert run_store(target, monkeypatch, head=again, plan=again + "sys.exit(1)") == 1
    assert lines_of(target)[2:] == before[2:]
    assert lines_of(target)[1]["value"] == 2.5
    assert "error: not stored, as they failed: plan" in capsys.readouterr().err


def test_every_benchmark_that_is_stored_has_its_table():
    assert set(store.NAMES) == set(TABLES)
    assert all((REPOSITORY / "benchmarks" / f"{name}.py").is_file() for name in store.NAMES)


@pytest.mark.slow
def test_a_table_is_made_of_what_a_benchmark_prints(tmp_path, monkeypatch):
    """The tables of the others are made when they are measured: each takes minutes, for its many fresh processes."""
    target = tmp_path / "cpu.jsonl"
    monkeypatch.setattr(sys, "argv", ["store.py", "psft_overhead", "--size", "tiny", "--target", str(target)])
    assert store.main() == 0
    assert figures_of("psft_overhead", target).count("\n|") > 1
