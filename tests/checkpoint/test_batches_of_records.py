"""Runs whose global batch counts records: resumed inside a window on other ranks, and refused in a line."""

import shutil
from dataclasses import replace

import pytest

from megatron_psft.checkpoint.folders import step_folder
from megatron_psft.config.inputs import DataConfig, WeightsConfig
from megatron_psft.config.resume import changes_since, settings_of
from megatron_psft.config.schema import Config
from tests.support.runs import DIST_OPT, forget_steps_from, inputs, metrics_of, refuse, train

__all__ = ["inputs"]  # the fixture

RECORDS = ("--packing", "--global-batch-unit", "records", "--micro-batch-size", "1")


@pytest.mark.slow
def test_a_window_goes_on_in_another_layout(pool, tmp_path, inputs):
    """Three records on two replicas, and on one: other rows, other ranks, other shares of the checkpoint."""
    flags = [*RECORDS, *DIST_OPT, "--global-batch-size", "3", "--save-interval", "3", "--train-iters", "6"]
    train(pool, 2, inputs.argv(tmp_path / "two", *flags))
    for world_size in (2, 1):
        resumed = shutil.copytree(tmp_path / "two", tmp_path / f"on-{world_size}")
        forget_steps_from(resumed, 4)
        said = train(pool, world_size, inputs.argv(resumed, *flags))
        assert f"resumed from {step_folder(resumed, 3)}" in said
    wanted, on_two, on_one = (metrics_of(tmp_path / name) for name in ("two", "on-2", "on-1"))
    assert on_two == wanted
    assert any(line["clip_fraction"] > 0 for line in wanted[3:5]), "the scores must matter"
    for line, due in zip(on_one, wanted, strict=True):
        assert line == pytest.approx(due, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--global-batch-size", "11"),
            "global_batch_size (11) must be at most the 10 records of data with global_batch_unit records; lower it",
        ),
        (("--seq-length", "20"), "data must hold no record of more than seq_length (20) tokens"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(pool, tmp_path, inputs, flags, message):
    save = tmp_path / "run"
    assert message in refuse(pool, inputs.argv(save, *RECORDS, *flags))
    assert not [path for path in save.rglob("*") if path.is_file()]


def test_a_run_that_was_begun_before_counts_packs():
    """Its recorded settings have no such field: it goes on as it was, and not with records."""
    config = Config(weights=WeightsConfig(load_hf="unread", save="unwritten"), data=DataConfig(data=("unread",)))
    before = {name: value for name, value in settings_of(config).items() if name != "global_batch_unit"}
    assert changes_since(before, settings_of(config)) == []
    records = replace(config, batch=replace(config.batch, global_batch_unit="records"))
    (change,) = changes_since(before, settings_of(records))
    assert (change.name, change.before, change.now) == ("global_batch_unit", "packs", "records")
    assert change.is_refused
