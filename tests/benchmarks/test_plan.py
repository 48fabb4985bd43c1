"""The plan against the memory that training really takes."""

import json
import subprocess
import sys

import pytest

from tests.support.cli import REPOSITORY


@pytest.mark.slow
def test_planned_memory_is_that_of_training():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "benchmarks/plan.py"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=1200,
    )
    figures = {figure["name"]: figure for figure in map(json.loads, done.stdout.splitlines())}
    ratios = {name: figure["value"] for name, figure in figures.items() if name.startswith("plan_over_measured_")}
    assert len(ratios) == 5
    assert all(0.85 < ratio < 1.15 for ratio in ratios.values()), ratios
    assert all(figures[name]["measured_gib"] > 0.3 for name in ratios)  # enough for the figure to mean something
