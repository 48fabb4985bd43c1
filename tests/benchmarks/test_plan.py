"""The plan against the memory that training really takes."""

import json
import sys

import pytest

from tests.support.cli import REPOSITORY
from tests.support.pool import Pool

sys.path.append(str(REPOSITORY / "benchmarks"))  # for what it imports; examples have a plan.py, too

from benchmarks import plan

pytestmark = pytest.mark.slow


@pytest.fixture
def new_ranks():
    """Without memory that other tests have left to be used again."""
    workers = Pool()
    yield workers
    workers.close()


@pytest.mark.parametrize("name", ["tensor_parallel", "experts", "recomputed"])
def test_planned_memory_is_that_of_training(new_ranks, tmp_path, name):
    """Of the others tells `benchmarks/store.py`."""
    (spec,) = [spec for spec in plan.SPECS["cpu"] if spec["name"] == name]
    records = 1 if name == "tensor_parallel" else 2  # where a second takes no more memory
    spec = {**spec, "flags": [*spec["flags"], "--global-batch-size", records]}
    found, *_ = new_ranks.run(plan.measure, spec["ranks"], plan.prepared(spec, plan.CPU_SHAPE, tmp_path))
    assert found["measured"] > 0.3 * 2**30  # enough for the figure to mean something
    assert found["planned"] == pytest.approx(found["measured"], rel=0.15)


def test_the_script_prints_a_figure_for_each_size(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan.py", "--size", "tiny"])
    plan.main()
    _, *figures = map(json.loads, capsys.readouterr().out.splitlines())
    assert [figure["name"] for figure in figures] == [
        f"plan_over_measured_{spec['name']}" for spec in plan.SPECS["tiny"]
    ]
    for figure in figures:
        assert figure["value"] == pytest.approx(figure["planned_gib"] / figure["measured_gib"], rel=0.01)
        assert 0.8 < figure["value"] < 1.25
