"""A run whose saves a node has no memory for ends before its first step."""

from types import SimpleNamespace
from unittest import mock

import psutil

from tests.support.cli import Exit, run_cli
from tests.support.runs import inputs

__all__ = ["inputs"]  # the fixture


def run_with_memory_left(megabytes: int, argv: list[str]) -> Exit:
    with mock.patch.object(psutil, "virtual_memory", return_value=SimpleNamespace(available=megabytes * 2**20)):
        return run_cli(argv)


def test_a_save_beyond_the_hosts_memory_is_refused_before_the_first_step(pool, tmp_path, inputs):
    """Both ranks are on one node, each with half of the weights and states; what is not copied takes nothing."""
    argv = inputs.argv(tmp_path / "run", "--train-iters", "2", "--lr-warmup-iters", "0")
    results = pool.run(run_with_memory_left, 2, 1, [*argv, "--async-save"])
    assert [result.code for result in results] == [2, 2]
    (line,) = [line for line in results[0].err.splitlines() if line.startswith("error: ")]
    assert "error: save: a copy of what a node's ranks write of a checkpoint takes 0.00" in line
    assert "has 0.000977 GiB left; use more nodes, or fewer ranks on each, or save without async_save" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert [result.code for result in pool.run(run_with_memory_left, 2, 1, argv)] == [0, 0]
