"""Figures are kept as they were printed, a benchmark's all at once, and the pages' tables are made of them."""

import json
import sys
import time

import psutil
import pytest

from docs.figures import TABLES, figures_of
from docs.gpu_figures import NAMES as GPU_NAMES
from docs.gpu_figures import gpu_figures_of
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


def run_store(target, monkeypatch, size: str = "tiny", **scripts: str) -> int:
    for name, text in scripts.items():
        (target.parents[1] / "benchmarks" / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["store.py", *scripts, "--size", size, "--target", str(target)])
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


FAILS = """
sys.stderr.write("Traceback\\nRuntimeError: no such device\\n")
sys.exit(3)
"""
HANGS = """
import subprocess, time
command = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"
own = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True, start_new_session=True)
print(json.dumps({"name": "process", "value": int(own.stdout.readline()), "unit": ""}), flush=True)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_on_a_gpu_a_part_that_fails_or_takes_too_long_leaves_the_others(target, monkeypatch, capfd):
    """Both keep what they have printed, and what is killed is killed with ranks that have sessions of their own."""
    monkeypatch.setitem(store.GPU_SECONDS, "head", 3)
    started = time.monotonic()
    parts = {"environment": PRINTS + FAILS, "head": PRINTS + HANGS, "exits": PRINTS}
    assert run_store(target, monkeypatch, "gpu", **parts) == 1
    assert time.monotonic() - started < 300
    lines = {name: [one for one in lines_of(target) if one["benchmark"] == name] for name in parts}
    assert [one["name"] for one in lines["environment"]] == ["run", "speed", "failed"]
    failed = {"name": "failed", "value": None, "unit": "", "benchmark": "environment"}
    assert lines["environment"][-1] == {**failed, "does_not_run": "RuntimeError: no such device"}
    assert [one["name"] for one in lines["head"]] == ["run", "speed", "process", "failed"]
    assert lines["head"][-1]["does_not_run"] == "killed after 3 s"
    assert not is_running(lines["head"][2]["value"])
    assert [one["name"] for one in lines["exits"]] == ["run", "speed"]
    printed = capfd.readouterr()
    assert "RuntimeError: no such device" in printed.err
    assert "error: failed: environment, head" in printed.err
    run_store(target, monkeypatch, "gpu", environment=PRINTS)
    assert [one["name"] for one in lines_of(target)[:3]] == ["run", "speed", "run"], "its earlier lines are gone"


def test_libraries_of_the_path_are_found_beside_the_checkout(target, monkeypatch):
    """On a machine where the package is not installed, and libraries lie in a folder."""
    monkeypatch.setenv("PYTHONPATH", "/a/folder")
    shows = "import os; print(json.dumps({'name': os.environ['PYTHONPATH'], 'value': 1, 'unit': ''}))"
    assert run_store(target, monkeypatch, head=PRINTS + shows) == 0
    assert lines_of(target)[-1]["name"] == f"{target.parents[1]}:/a/folder"


def test_every_benchmark_that_is_stored_has_its_table():
    assert set(store.NAMES) == set(TABLES)
    assert set(store.GPU_SECONDS) == set(GPU_NAMES)
    assert all((REPOSITORY / "benchmarks" / f"{name}.py").is_file() for name in store.names_of("tiny"))


@pytest.mark.slow
def test_tables_are_made_of_what_benchmarks_print(tmp_path, monkeypatch):
    """The tables of the others are made when they are measured: each takes minutes, for its many fresh processes."""
    target = tmp_path / "gpu.jsonl"
    names = ("psft_overhead", "environment", "training")
    monkeypatch.setattr(sys, "argv", ["store.py", *names, "--size", "tiny", "--target", str(target)])
    assert store.main() == 0
    assert figures_of("psft_overhead", target).count("\n|") > 1
    assert "| toy step seconds |" in gpu_figures_of("environment", tmp_path)
    (tests,) = (one for one in lines_of(target) if one["name"] == "tests")
    assert tests["value"] >= 14
