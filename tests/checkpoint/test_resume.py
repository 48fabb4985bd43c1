"""Runs that are stopped, killed or starved of disk go on as if nothing had happened."""

import functools
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from types import SimpleNamespace

import pytest
import torch

from megatron_psft.checkpoint.folders import step_folder, step_folders
from tests.support.cli import Exit, run_cli
from tests.support.marks import slow
from tests.support.pool import WorkerError
from tests.support.runs import DIST_OPT, ONE, OVERLAP, PP2, TP2_SP, forget_steps_from, inputs, metrics_of, refuse, train

__all__ = ["inputs"]  # the fixture

EVERY_STEP = ("--save-interval", "1")
EVALUATED = ("--valid-data", "{data}", "--eval-interval", "2")


def evaluated(inputs) -> list[str]:
    return [text.format(data=inputs.data) for text in EVALUATED]


@pytest.fixture(scope="module")
def uninterrupted(pool, inputs, tmp_path_factory) -> Callable[..., list[dict[str, float]]]:
    """What a run with these flags says of its steps when nothing stops it, be it saved often or seldom."""

    @functools.cache
    def metrics(*flags: str) -> list[dict[str, float]]:
        save = tmp_path_factory.mktemp("uninterrupted") / "run"
        train(pool, 2 if flags else 1, inputs.argv(save, *flags))
        return metrics_of(save)

    return metrics


@pytest.mark.slow
def test_a_run_can_stop_after_any_step_of_a_window(pool, tmp_path, inputs):
    """Within the window, at its borders, in warm-up, and where an epoch ends."""
    whole = tmp_path / "whole"
    train(pool, 2, inputs.argv(whole, *PP2, *EVERY_STEP))
    for stop in range(1, 6):
        resumed = shutil.copytree(whole, tmp_path / f"after-{stop}")
        forget_steps_from(resumed, stop + 1)
        said = train(pool, 2, inputs.argv(resumed, *PP2))
        assert f"resumed from {step_folder(resumed, stop)}" in said
        assert metrics_of(resumed) == metrics_of(whole)


@pytest.mark.slow
@pytest.mark.both
def test_evaluation_leaves_no_trace_in_training(pool, tmp_path, inputs):
    train(pool, 2, inputs.argv(tmp_path / "plain", *OVERLAP))
    train(pool, 2, inputs.argv(tmp_path / "evaluated", *OVERLAP, *evaluated(inputs)))
    before, *lines = metrics_of(tmp_path / "evaluated")
    assert before.keys() == {"step", "valid_nll", "valid_entropy"}
    assert before["step"] == 0
    values = [(line.pop("valid_nll", None), line.pop("valid_entropy", None)) for line in lines]
    assert [None not in pair for pair in values] == [False, True] * 4
    assert lines == metrics_of(tmp_path / "plain")


def _draw_after_each_step(argv: list[str]) -> list[float]:
    """The command line, and a random number after each step that it makes."""
    from megatron_psft.train import loop

    original, drawn = loop.train_step, []

    def step_and_draw(*args, **kwargs):
        values = original(*args, **kwargs)
        drawn.append(float(torch.rand(())))
        return values

    loop.train_step = step_and_draw
    try:
        assert run_cli(argv).code == 0
    finally:
        loop.train_step = original
    return drawn


@pytest.mark.slow
def test_random_generators_go_on_where_they_were(pool, tmp_path, inputs):
    """On each rank its own; nothing that trains draws today, and what does tomorrow resumes."""
    argv = inputs.argv(tmp_path / "whole", *DIST_OPT, *EVERY_STEP)
    whole = pool.run(_draw_after_each_step, 2, argv)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    forget_steps_from(tmp_path / "resumed", 4)
    resumed = pool.run(_draw_after_each_step, 2, inputs.argv(tmp_path / "resumed", *DIST_OPT))
    assert resumed == [drawn[3:] for drawn in whole]
    assert len({number for drawn in whole for number in drawn}) >= 8


MOMENTS = {"in training": "train", "in the old policy's pass": "score_labels", "in evaluation": "__call__"}


def _run_with_signal(argv: list[str], rank: str, moment: str, signum: int) -> Exit:
    """The command line; `rank` gets the signal in the third training pass, the second scoring pass or the first
    evaluation after a step."""
    from megatron_psft.train.evaluate import Evaluation
    from megatron_psft.train.pipeline import Pipeline

    owner = Evaluation if moment == "__call__" else Pipeline
    original, calls = getattr(owner, moment), []

    def signalled(*args, **kwargs):
        calls.append(moment)
        if os.environ["RANK"] == rank and len(calls) == {"train": 3, "score_labels": 2, "__call__": 1}[moment]:
            os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    setattr(owner, moment, signalled)
    try:
        return run_cli(argv)
    finally:
        setattr(owner, moment, original)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "signum", "rank"), list(zip(MOMENTS, (SIGTERM, SIGINT, SIGTERM), "101", strict=True))
)
def test_a_signal_ends_the_run_in_good_order(pool, tmp_path, inputs, uninterrupted, moment, signum, rank):
    flags = (*DIST_OPT, *evaluated(inputs))
    argv = inputs.argv(tmp_path / "run", *flags)
    exits = pool.run(_run_with_signal, 2, argv, rank, MOMENTS[moment], signum)
    assert [exit.code for exit in exits] == [128 + signum] * 2, exits[0].err
    assert "the same command resumes" in exits[0].err
    # The old policy's pass is cut short: it comes before step 2, whose weights it does not touch.
    done = {"in training": 3, "in the old policy's pass": 1, "in evaluation": 2}[moment]
    assert step_folders(tmp_path / "run") == [step_folder(tmp_path / "run", done)]
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(done + 1))
    train(pool, 2, argv)
    assert metrics_of(tmp_path / "run") == uninterrupted(*flags)


def _run_out_of_time(argv: list[str], rank: str, step: int) -> Exit:
    """The command line; the clock of `rank` jumps an hour ahead in training step `step`."""
    from megatron_psft.distributed import signals
    from megatron_psft.train.pipeline import Pipeline

    original, calls = Pipeline.train, []

    def late(*args, **kwargs):
        calls.append("train")
        if os.environ["RANK"] == rank and len(calls) == step:
            patch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 3600))
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "train", late)
        return run_cli(argv)


@pytest.mark.slow
def test_a_run_whose_time_is_up_ends_well_and_goes_on_bit_for_bit(pool, tmp_path, inputs, uninterrupted):
    """In the middle of a window, by the clock of one rank; what is asked for at the end waits for the end."""
    run, exported = tmp_path / "run", tmp_path / "hf"
    argv = inputs.argv(run, *DIST_OPT, "--exit-duration-in-mins", "60", "--export-hf", str(exported))
    exits = pool.run(_run_out_of_time, 2, argv, "1", 3)
    assert [exit.code for exit in exits] == [0, 0], exits[0].err
    line = "ended after step 3 of 8, as exit_duration_in_mins (60) is over: the same command goes on from there"
    assert [(exit.out + exit.err).splitlines().count(line) for exit in exits] == [1, 0]
    assert step_folders(run) == [step_folder(run, 3)]
    assert not exported.exists()
    exits = pool.run(_run_out_of_time, 2, argv, "0", 5)  # in the last step: all that was asked for is done
    assert [exit.code for exit in exits] == [0, 0], exits[0].err
    assert not any("exit_duration" in exit.out + exit.err for exit in exits)
    assert metrics_of(run) == uninterrupted(*DIST_OPT)
    assert exported.exists()


@pytest.mark.slow
def test_a_start_that_takes_all_of_the_time_warns(pool, tmp_path, inputs):
    said = train(pool, 1, inputs.argv(tmp_path / "run", "--exit-duration-in-mins", "0.00001"))
    assert "WARNING: no step was completed: ended after step 0 of 8, as exit_duration_in_mins (1e-05) is over" in said
    assert not step_folders(tmp_path / "run")


ADAPTERS = (*DIST_OPT, "--lora-rank", "4", "--bf16")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [DIST_OPT, ADAPTERS], ids=["DP2-distopt", "adapters-bf16"])
def test_checkpoints_written_in_the_background_are_the_same(pool, tmp_path, inputs, uninterrupted, layout):
    run = tmp_path / "run"
    train(pool, 2, inputs.argv(run, *layout, *EVERY_STEP, "--async-save", "--keep-last", "5"))
    assert step_folders(run) == [step_folder(run, step) for step in range(4, 9)]
    assert metrics_of(run) == uninterrupted(*layout)
    resumed = shutil.copytree(run, tmp_path / "resumed")
    forget_steps_from(resumed, 7)  # what was saved is what the weights were then, and not what they became since
    train(pool, 2, inputs.argv(resumed, *layout, "--async-save"))
    assert metrics_of(resumed) == uninterrupted(*layout)


def _train_with_slow_copies(argv: list[str]):
    from megatron_psft.checkpoint.background import SharedMemory

    copies = SharedMemory.copies

    def slow_copies(memory: SharedMemory, tensors, staging=None):
        time.sleep(0.5)  # longer than a step takes
        return copies(memory, tensors, staging)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedMemory, "copies", slow_copies)
        return run_cli(argv)


@pytest.mark.slow
def test_no_weight_changes_before_it_is_copied(pool, tmp_path, inputs, uninterrupted):
    run = tmp_path / "run"
    (exit,) = pool.run(_train_with_slow_copies, 1, inputs.argv(run, *ONE, *EVERY_STEP, "--async-save"))
    assert exit.code == 0, exit.err
    resumed = shutil.copytree(run, tmp_path / "resumed")
    forget_steps_from(resumed, 6)
    train(pool, 1, inputs.argv(resumed, *ONE))
    assert metrics_of(resumed) == uninterrupted()


def _run_with_small_files(argv: list[str]) -> Exit:
    """The command line where from the second checkpoint on no file may grow beyond 64 KiB, as with a quota used up."""
    from megatron_psft.checkpoint.saver import Saver

    original, (soft, hard) = Saver.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        for process in {0, forkserver._forkserver._forkserver_pid or 0}:  # this one, and that which forks writers
            resource.prlimit(process, resource.RLIMIT_FSIZE, (size, hard))

    def limited(saver: Saver, step: int) -> None:
        if step > 2:
            limit(1 << 16)
        original(saver, step)

    Saver.save = limited
    try:
        return run_cli(argv)
    finally:
        limit(soft)
        Saver.save = original


@pytest.mark.parametrize("background", [pytest.param((), id="waiting"), slow(("--async-save",), id="background")])
@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_costs_no_other(pool, tmp_path, inputs, uninterrupted, background):
    run = tmp_path / "run"
    flags = (*DIST_OPT, "--save-interval", "2", "--keep-last", "1")
    exits = pool.run(_run_with_small_files, 2, inputs.argv(run, *flags, *background))
    assert {exit.code for exit in exits} == {4}, [exit.err for exit in exits]
    errors = [line for exit in exits for line in exit.err.splitlines() if line.startswith("error: ")]
    assert "could not be written" in errors[0], errors
    assert "Traceback" not in exits[0].err + exits[1].err
    assert [path.name for path in run.glob("step_*") if path.suffix != ".partial"] == ["step_0000002"]
    train(pool, 2, inputs.argv(run, *flags))
    assert metrics_of(run) == uninterrupted(*DIST_OPT)


def _run_with_a_full_disk_on_rank_0(argv: list[str]) -> Exit:
    """What is small and first, rank 0 writes alone: the others learn of its failure only as it leaves."""
    from megatron_psft.checkpoint.saver import dist_checkpointing

    original = dist_checkpointing.save

    def fail(*args, **kwargs):
        if os.environ["RANK"] == "0":
            raise RuntimeError("basic_ios::clear: iostream error")  # torch.save's words
        return original(*args, **kwargs)

    dist_checkpointing.save = fail
    try:
        return run_cli(argv)
    finally:
        dist_checkpointing.save = original


def test_a_rank_that_fails_alone_does_not_leave_the_others_waiting(pool, tmp_path, inputs):
    first, second = pool.run(_run_with_a_full_disk_on_rank_0, 2, inputs.argv(tmp_path / "run", *DIST_OPT, *EVERY_STEP))
    assert (first.code, second.code) == (4, 4)
    assert "error: rank 0: save: a checkpoint could not be written (basic_ios::clear: iostream error)" in first.err
    assert f"rank 1: checkpoint {step_folder(tmp_path / 'run', 1)}: " in second.err
    assert "another rank hangs or is gone" in second.err


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a disk; the test above covers what a quota does")
@pytest.mark.slow
def test_a_full_disk_is_noticed_before_anything_is_written(pool, tmp_path, inputs, uninterrupted):
    with small_disk(tmp_path / "disk", "12m") as disk:
        run = disk / "run"
        line = refuse(pool, inputs.argv(run, *EVERY_STEP), code=4)
        assert f"save ({run}) must have room for a checkpoint, about 0.00" in line
        assert "the checkpoints before it are intact; make room and start again" in line
        before = step_folders(run)
        assert sorted(run.iterdir()) == sorted(
            [*before, run / "config.yaml", run / "metrics.jsonl", run / "starts.jsonl"]
        )
        shutil.rmtree(before[0])
        said = train(pool, 1, inputs.argv(run, *EVERY_STEP, "--keep-last", "1"))
        assert f"resumed from {before[-1]}" in said
        assert metrics_of(run) == uninterrupted()


def _run_with_a_peer_that(fate: str, argv: list[str]) -> Exit:
    """The command line; rank 1 hangs, or is killed, in its third training pass."""
    from megatron_psft.train.pipeline import Pipeline

    original, calls = Pipeline.train, []

    def last(*args, **kwargs):
        calls.append(fate)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            if fate == "dies":
                os.kill(os.getpid(), SIGKILL)
            time.sleep(40)
        return original(*args, **kwargs)

    Pipeline.train = last
    try:
        return run_cli(argv)
    finally:
        Pipeline.train = original


@pytest.mark.slow
def test_a_rank_that_hangs_is_reported_with_collective_and_step(pool, tmp_path, inputs):
    argv = inputs.argv(tmp_path / "run", *TP2_SP, "--distributed-timeout-minutes", "0.2")
    hung = pool.run(_run_with_a_peer_that, 2, "hangs", argv)
    assert [exit.code for exit in hung] == [4, 4]
    (line,) = [line for line in hung[0].err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 0: step 3: ")
    assert "failed, as another rank hangs or is gone" in line
    assert any(name in line for name in ("all_reduce", "all_gather", "reduce_scatter"))
    assert "Traceback" not in hung[0].err


def strike(pool, argv: list[str], run: Path, signum: int, rng: random.Random) -> str:
    """Starts the command on two ranks and sends all or one of them the signal at some moment; returns what was said."""
    victims = rng.choice([[0, 1], [0], [1]])
    lines, delay_seconds = rng.randrange(8), rng.random() * rng.choice([0.4, 4])
    metrics = run / "metrics.jsonl"
    with ThreadPoolExecutor(1) as executor:
        outcome = executor.submit(pool.run, run_cli, 2, argv)
        while not outcome.done() and not (
            len(pool._workers) >= 2 and metrics.is_file() and metrics.read_text().count("\n") >= lines
        ):
            time.sleep(0.005)
        time.sleep(delay_seconds)
        for victim in victims if not outcome.done() else []:
            os.kill(pool._workers[victim].process.pid, signum)
        try:
            return "".join(exit.err for exit in outcome.result())
        except WorkerError as error:  # killed before they could say anything
            return str(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "times", "background"),
    [(SIGKILL, 4, ()), (SIGTERM, 2, ()), (SIGKILL, 2, ("--async-save",)), (SIGTERM, 2, ("--async-save",))],
    ids=["SIGKILL", "SIGTERM", "SIGKILL-background", "SIGTERM-background"],
)
def test_a_run_survives_a_signal_at_any_moment(pool, tmp_path, inputs, uninterrupted, signum, times, background):
    """All ranks or one, in start-up, in a step, while files are written, in the export."""
    rng = random.Random(signum)
    flags = (*DIST_OPT, "--save-interval", "2", *background)
    expected = uninterrupted(*DIST_OPT)
    assert [line["step"] for line in expected] == list(range(1, 9))
    for moment in range(times // 2):
        run = tmp_path / f"run-{moment}"
        argv = inputs.argv(run, *flags)
        first = strike(pool, argv, run, signum, rng)
        second = strike(pool, argv, run, signum, rng)
        train(pool, 2, argv)
        assert metrics_of(run) == expected, (first, second)
        assert not any(folder.suffix == ".damaged" for folder in run.iterdir())
