"""What rank 0 keeps and shows of a run: metrics.jsonl, whatever ended earlier processes, printed lines and the bar."""

import itertools
import json
import sys

import pytest

from megatron_psft.config.schema import LoggingConfig
from megatron_psft.metrics import run_log as module
from megatron_psft.metrics.clip_watch import ClipWatch
from megatron_psft.metrics.run_log import METRICS_FILE, RunLog
from megatron_psft.metrics.trackers import Trackers


def values(step: int, run: int = 0) -> dict[str, float]:
    """A line of a run without `step`; recognizable by run and step."""
    return {
        "loss": step + run / 8,
        "entropy": 1.0,
        "clip_fraction": 0.5,
        "tokens_per_second": 1e3,
        "grad_norm": 0.1 * step,
    }


def report(folder, first_step: int = 1, **options) -> RunLog:
    trackers = Trackers(LoggingConfig(), folder, first_step=first_step)
    return RunLog(folder, trackers, first_step=first_step, **{"train_iters": 9, "log_interval": 100, **options})


def lines(folder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def write_steps(folder, first_step: int, last_step: int, run: int = 0, **options) -> None:
    with report(folder, first_step, **options) as target:
        for step in range(first_step, last_step + 1):
            target.record(step, values(step, run))


def test_each_step_is_one_line_that_is_there_at_once(tmp_path):
    with report(tmp_path) as target:
        target.record(1, values(1))
        assert lines(tmp_path) == [{"step": 1, **values(1)}]
        target.record(2, values(2) | {"valid_nll": 0.5})
        assert lines(tmp_path) == [{"step": 1, **values(1)}, {"step": 2, **values(2), "valid_nll": 0.5}]


def test_what_was_evaluated_before_the_first_step_is_a_line_that_only_a_new_run_replaces(tmp_path, capsys):
    for value in (3.0, 2.0):  # the first of the two was killed before it had a checkpoint
        with report(tmp_path, log_interval=1) as target:
            target.record(0, {"valid_nll/general": value, "valid_nll/target": 1.0, "valid_entropy/target": 0.5})
            target.record(1, values(1))
    with report(tmp_path, first_step=2) as target:
        target.record(2, values(2))
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    assert lines(tmp_path)[0]["valid_nll/general"] == 2.0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 0")]
    assert printed[1] == "step 0 of 9: valid_nll/general 2, valid_nll/target 1"


@pytest.mark.parametrize("cut", [0, 1, 5, 40])
def test_a_resumed_run_repeats_no_step_and_leaves_none_out(tmp_path, cut):
    write_steps(tmp_path, 1, 6)
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes()[: -cut or None])  # the run was killed within its sixth line
    write_steps(tmp_path, 5, 7, run=1)
    earlier = [{"step": step, **values(step)} for step in range(1, 5)]
    assert lines(tmp_path) == earlier + [{"step": step, **values(step, run=1)} for step in range(5, 8)]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_a_half_line_right_after_the_checkpoint_is_dropped_too(tmp_path):
    write_steps(tmp_path, 1, 3)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "lo')
    write_steps(tmp_path, 4, 4, run=1)
    assert [line["loss"] for line in lines(tmp_path)] == [1, 2, 3, 4.125]


def test_a_run_that_starts_anew_drops_what_an_earlier_one_left(tmp_path):
    write_steps(tmp_path, 1, 3)
    write_steps(tmp_path, 1, 2, run=1)
    assert [line["loss"] for line in lines(tmp_path)] == [1.125, 2.125]


def test_without_trackers_nothing_else_is_written(tmp_path):
    write_steps(tmp_path, 1, 2)
    assert [path.name for path in tmp_path.rglob("*")] == [METRICS_FILE]


def printed_steps(text: str) -> list[int]:
    return [int(line.split()[1]) for line in text.splitlines() if line.startswith("step ")]


def test_lines_are_printed_every_so_often_and_at_both_ends(tmp_path, capsys):
    write_steps(tmp_path, 1, 9, log_interval=4)
    assert printed_steps(capsys.readouterr().out) == [1, 4, 8, 9]


def test_a_short_run_prints_its_ends(tmp_path, capsys):
    write_steps(tmp_path, 1, 2, train_iters=2)
    assert printed_steps(capsys.readouterr().out) == [1, 2]


def test_a_resumed_run_prints_its_first_step(tmp_path, capsys):
    write_steps(tmp_path, 4, 6, train_iters=8)
    assert printed_steps(capsys.readouterr().out) == [4]


@pytest.mark.parametrize("name", ["valid_nll", "valid_entropy"])
def test_each_evaluation_is_printed(tmp_path, capsys, name):
    with report(tmp_path) as target:
        for step in range(1, 8):
            target.record(step, values(step) | ({name: 0.5} if step in (3, 6) else {}))
    out = capsys.readouterr().out
    assert printed_steps(out) == [1, 3, 6]
    assert out.count("valid_nll 0.5, ") == (2 if name == "valid_nll" else 0)


def test_nll_comes_first_and_what_a_run_lacks_is_left_out(tmp_path, capsys):
    with report(tmp_path) as target:
        target.record(1, {"loss": -1.0, "nll": 2.34567, "lr": 1e-6})
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "step 1 of 9: nll 2.346, loss -1, lr 1e-06"


def test_the_remaining_time_is_that_of_the_steps_so_far(tmp_path, capsys, monkeypatch):
    """Without the first, in which libraries are loaded and kernels built."""
    times = itertools.chain([1000.0], (1000.0 + 90.0 * step for step in itertools.count(1)))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    write_steps(tmp_path, 3, 9, log_interval=1)
    etas = [line.partition(", eta ")[2] for line in capsys.readouterr().out.splitlines()]
    assert etas == ["", "0:07:30", "0:06:00", "0:04:30", "0:03:00", "0:01:30", ""]


def test_a_file_gets_lines_and_no_bar(tmp_path, capsys):
    write_steps(tmp_path, 1, 9, log_interval=1)
    out, err = capsys.readouterr()
    assert (len(out.splitlines()), err) == (9, "")
    assert "\r" not in out


def test_a_terminal_gets_a_bar_and_the_same_lines(tmp_path, capsys, monkeypatch):
    write_steps(tmp_path, 1, 9, log_interval=4)
    lines_of_file = capsys.readouterr().out
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    write_steps(tmp_path, 1, 9, log_interval=4)
    out, err = capsys.readouterr()
    assert printed_steps(out) == printed_steps(lines_of_file)
    assert "9/9" in err
    assert "\r" in err


def test_what_the_clip_watch_says_is_printed_once(tmp_path, capsys):
    watch = ClipWatch(lambda step: range(step - step % 3, step - step % 3 + 3))
    write_steps(tmp_path, 1, 7, clip_watch=watch)
    assert capsys.readouterr().out.count("WARNING") == 0, "half of the tokens, and no more"
    with report(tmp_path, clip_watch=watch) as target:
        for step in range(1, 8):
            target.record(step, values(step) | {"clip_fraction": 0.7})
    out = capsys.readouterr().out
    assert out.count("WARNING: 70 % of the label tokens of steps 1 to 3 were clipped") == out.count("WARNING") == 1
