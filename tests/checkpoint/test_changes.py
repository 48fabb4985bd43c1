"""A run that is resumed asks what has changed: refuses what must be the same, names the rest, and keeps a record."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_psft import sealed
from megatron_psft.checkpoint.folders import step_folder
from megatron_psft.sealed import MARKER
from tests.support.runs import forget_steps_from, inputs, metrics_of, refuse, train

__all__ = ["inputs"]  # the fixture

SFT = ("--objective", "sft", "--old-policy-interval", "8", "--sft-warmup-iters", "0")
THREE_STEPS, EVERY_STEP = ("--train-iters", "3"), ("--save-interval", "1")


@pytest.fixture(scope="module")
def finished(pool, inputs, tmp_path_factory) -> Path:
    """A run of three steps, one of warm-up and two of a window, with a checkpoint of each."""
    save = tmp_path_factory.mktemp("finished") / "run"
    train(pool, 1, inputs.argv(save, *THREE_STEPS, *EVERY_STEP))
    return save


def resumable(finished: Path, copy: Path) -> Path:
    """A copy of the run that was killed after its second step."""
    shutil.copytree(finished, copy)
    forget_steps_from(copy, 3)
    return copy


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def starts_of(save: Path) -> list[dict]:
    return [json.loads(line) for line in (save / "starts.jsonl").read_text().splitlines()]


def as_of_an_earlier_release(checkpoint: Path) -> None:
    """Takes away what a checkpoint of release 0.2 does not have."""
    marker = json.loads((checkpoint / MARKER).read_text())
    del marker["content"]["settings"]
    (checkpoint / MARKER).write_text(sealed._marker_text(marker["content"], marker["files"]))


@pytest.mark.parametrize("steps", [2, 3], ids=["half-way", "done"])
def test_a_folder_does_not_become_a_run_of_another_objective(pool, tmp_path, inputs, finished, steps):
    run = shutil.copytree(finished, tmp_path / "run") if steps == 3 else resumable(finished, tmp_path / "run")
    before, checkpoint = contents(run), step_folder(run, steps)
    line = refuse(pool, inputs.argv(run, *THREE_STEPS, *SFT, "--lr", "5e-4"))
    assert line == (
        f"error: {checkpoint}: the run that wrote it had objective psft, this one has objective sft; use its settings, "
        f"or another save folder, where a new run can start from its weights: --init-from {checkpoint}"
    )
    assert contents(run) == before


def test_load_into_another_folder_asks_as_well(pool, tmp_path, inputs, finished):
    flags = ("--clip-ratio-high", "0.1", "--load", str(finished / "step_0000002"))
    line = refuse(pool, inputs.argv(tmp_path / "new", *THREE_STEPS, *flags))
    assert "had clip_ratio_high 0.28, this one has clip_ratio_high 0.1; use its settings" in line


def test_what_may_change_is_named_and_recorded_and_config_yaml_stays(pool, tmp_path, inputs, finished):
    run = resumable(finished, tmp_path / "run")
    config = (run / "config.yaml").read_bytes()
    flags = ("--train-iters", "4", "--lr", "5e-4", "--micro-batch-size", "2", "--log-interval", "1")
    said = train(pool, 1, inputs.argv(run, *flags))
    named = [line.partition(": ")[2] for line in said.splitlines() if line.startswith("changed since the checkpoint")]
    assert named == [
        "train_iters: 3 -> 4 (without lr_decay_iters the learning rate follows the schedule of the new length)",
        "micro_batch_size: 1 -> 2 (equal up to rounding)",
        "lr: 0.001 -> 0.0005 (counts from the next step on)",
    ]
    lrs = [line["lr"] for line in metrics_of(run)]
    assert f"learning rate of step 3: {lrs[2]:.4g}, and 0.001 by the earlier schedule" in said
    assert (run / "config.yaml").read_bytes() == config
    first, second = starts_of(run)
    assert (first["step"], first["train_iters"], first["checkpoint"], first["changed"]) == (0, 3, None, {})
    assert (second["step"], second["train_iters"]) == (2, 4)
    assert second["checkpoint"] == str(step_folder(run, 2))
    assert second["changed"] == {"train_iters": [3, 4], "micro_batch_size": [1, 2], "lr": [0.001, 0.0005]}
    assert second["settings"]["lr"] == 0.0005
    assert second["versions"]["torch"] == first["versions"]["torch"] is not None
    assert first["time"] <= second["time"]
    # The next start is compared with the start that wrote its checkpoint.
    assert "lr: 0.0005 -> 0.001" in train(pool, 1, inputs.argv(run, "--train-iters", "5", "--micro-batch-size", "2"))


def test_a_run_that_has_not_changed_says_nothing(pool, tmp_path, inputs, finished):
    run = resumable(finished, tmp_path / "run")
    said = train(pool, 1, inputs.argv(run, *THREE_STEPS))
    assert "resumed from" in said
    assert "changed since" not in said
    assert "learning rate of step" not in said
    assert [start["changed"] for start in starts_of(run)] == [{}, {}]


def test_a_start_that_finds_no_checkpoint_begins_the_run(pool, tmp_path, inputs, finished):
    """An earlier one ended before its first: what it left of its steps goes, and its settings are on record."""
    run = shutil.copytree(finished, tmp_path / "run")
    for checkpoint in run.glob("step_*"):
        shutil.rmtree(checkpoint)
    train(pool, 1, inputs.argv(run, *THREE_STEPS, *SFT))
    assert yaml.safe_load((run / "config.yaml").read_text())["objective"] == "sft"
    assert ["clip_fraction" in line for line in metrics_of(run)] == [False] * 3
    assert [(start["step"], start["settings"]["objective"]) for start in starts_of(run)] == [(0, "psft"), (0, "sft")]


def test_a_checkpoint_of_an_earlier_release_is_compared_with_config_yaml(pool, tmp_path, inputs, finished):
    run = resumable(finished, tmp_path / "run")
    as_of_an_earlier_release(step_folder(run, 2))
    line = refuse(pool, inputs.argv(run, *THREE_STEPS, "--old-policy-interval", "2"))
    assert "had old_policy_interval 4, this one has old_policy_interval 2" in line
    said = train(pool, 1, inputs.argv(run, *THREE_STEPS, "--lr", "5e-4"))
    assert f"names no settings; compared are those of {run / 'config.yaml'}" in said
    assert "lr: 0.001 -> 0.0005" in said


@pytest.mark.parametrize("left", ["nothing", "no settings"])
def test_what_cannot_be_compared_is_said(pool, tmp_path, inputs, finished, left):
    run = resumable(finished, tmp_path / "run")
    as_of_an_earlier_release(step_folder(run, 2))
    (run / "config.yaml").unlink()
    if left == "no settings":
        (run / "config.yaml").write_text("- a list\n")
    said = train(pool, 1, inputs.argv(run, *THREE_STEPS, "--lr", "5e-4"))
    assert said.count("names no settings; what has changed could not be compared") == 1
    assert "changed since" not in said
