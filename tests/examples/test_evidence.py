"""The sweep's results and its report; the runs themselves are `psft train`."""

import importlib.util
import sys

import pytest

from tests.support.cli import REPOSITORY

FOLDER = REPOSITORY / "examples" / "evidence"


@pytest.fixture(scope="module")
def sweep():
    """Its run.py, under another name than those of other examples."""
    spec = importlib.util.spec_from_file_location("evidence_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules[spec.name]


def line(step, nll=None, clipped=None):
    evaluated = {"valid_nll/target": nll, "valid_entropy/target": 0.5, "drift/general": step / 10}
    evaluated["drift_stderr/general"] = 0.01
    found = {"step": step, "loss": 1.0, **(evaluated if nll is not None else {})}
    return found if clipped is None else {**found, "clip_fraction": clipped}


def test_a_point_has_the_clipped_share_since_the_one_before(sweep):
    lines = [line(0, 2.0), line(1, clipped=0.0), line(2, 1.0, 0.2), line(3, clipped=0.3), line(4, 1.5, 0.5)]
    points = sweep.points(lines)
    assert [(point["step"], point.get("clip_fraction")) for point in points] == [(0, None), (2, 0.1), (4, 0.4)]


def test_the_report_ranks_runs_by_their_best_evaluation_and_not_their_last(sweep, tmp_path):
    import frontier

    late = [line(0, 2.0), line(2, 0.7), line(4, 1.5)]
    steady = [line(0, 2.0), line(2, 1.0, 0.1), line(4, 0.8, 0.3)]
    results = [
        {"data": "far", "method": method, "lr": "1e-4", "seed": 3, "points": sweep.points(lines)}
        for method, lines in (("PSFT, k = 8", steady), ("SFT", late))
    ]
    rows = [row for row in frontier.write(results, tmp_path).read_text().splitlines() if "1e-4" in row]
    assert rows == [
        "| SFT | 1e-4 | 3 | 0.700 | 2 | 0.200 | 1.500 | 0.400 ± 0.010 | 0.500 |  |",
        "| PSFT, k = 8 | 1e-4 | 3 | 0.800 | 4 | 0.400 | 0.800 | 0.400 ± 0.010 | 0.500 | 0.300 |",
    ]
    assert (tmp_path / "frontier_far.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_have_a_result_are_not_made_again(sweep, tmp_path, capsys):
    jobs = [sweep.Job("far", "SFT", lr, 0) for lr in ("1e-5", "1e-4", "1e-3")]
    plan = sweep.Plan(tmp_path, "model", sweep.SIZES["tiny"], jobs)
    plan.result(jobs[1]).parent.mkdir()
    plan.result(jobs[1]).write_text("{}")
    assert list(sweep.waiting(plan)) == [jobs[0], jobs[2]]
    assert "1 of 3 runs done; far_sft_1e-5_0" in capsys.readouterr().out
