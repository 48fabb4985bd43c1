"""No run starts from a checkpoint that is not as it was written, whatever became of it."""

import shutil
from pathlib import Path

import pytest

from megatron_psft.checkpoint.folders import step_folder, step_folders
from megatron_psft.sealed import MARKER
from tests.support.cli import Exit, run_cli
from tests.support.runs import DIST_OPT, inputs, metrics_of, refuse, train

__all__ = ["inputs"]  # the fixture

EVERY_STEP = ("--save-interval", "1")


def damage_newest(run: Path, harm: str) -> Path:
    """Does the harm to the largest file of the newest checkpoint and returns it."""
    path = max(step_folders(run)[-1].iterdir(), key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    path.write_bytes(data[:-1] if harm == "truncated" else data[:9] + bytes([data[9] ^ 1]) + data[10:])
    return path


@pytest.fixture(scope="module")
def finished(pool, inputs, tmp_path_factory) -> Path:
    """A run of two ranks with checkpoints of its steps 5 to 8."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(pool, 2, inputs.argv(run, *DIST_OPT, *EVERY_STEP, "--keep-last", "4"))
    return run


@pytest.mark.slow
def test_every_file_of_a_checkpoint_is_watched(pool, tmp_path, inputs, finished):
    """Whatever is done to whichever file, no run starts from it; one does from the untouched copy."""
    argv = inputs.argv(tmp_path / "new", *DIST_OPT)
    for path in sorted(step_folder(finished, 8).iterdir()):
        for harm in ("removed", "truncated", "flipped"):
            bad = shutil.copytree(step_folder(finished, 8), tmp_path / "bad" / "step_0000008")
            data = path.read_bytes()
            flipped = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :]
            (bad / path.name).unlink()
            if harm != "removed":
                (bad / path.name).write_bytes(data[:-1] if harm == "truncated" else flipped)
            exits = pool.run(_read_only, 2, [*argv, "--load", str(bad)])
            assert [exit.code for exit in exits] == [2, 2], (path.name, harm)
            assert f"error: load ({bad}) must be an intact checkpoint: {bad / path.name} " in exits[0].err
            shutil.rmtree(tmp_path / "bad")
    assert [exit.code for exit in pool.run(_read_only, 2, [*argv, "--load", str(finished)])] == [0, 0]


def _read_only(argv: list[str]) -> Exit:
    """The command line up to the moment when a model would be built: the checks, at the price of the checks."""
    from megatron_psft.train import assemble

    def stop(*args, **kwargs):
        raise SystemExit(0)

    original, assemble.build_model = assemble.build_model, stop
    try:
        return run_cli(argv)
    finally:
        assemble.build_model = original


def test_a_damaged_checkpoint_is_refused_with_the_newest_intact_one(pool, tmp_path, inputs, finished):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(step_folder(run, 7))
    path = damage_newest(run, "flipped")
    for load in (run, step_folder(run, 8)):
        line = refuse(pool, inputs.argv(tmp_path / "new", *DIST_OPT, "--load", str(load)))
        assert f"load ({load}) must be an intact checkpoint: {path} is not as it was written" in line
        assert f"--load {step_folder(run, 6)}" in line
    for step in (5, 6):
        shutil.rmtree(step_folder(run, step))
    assert "none beside it is intact" in refuse(pool, inputs.argv(tmp_path / "new", *DIST_OPT, "--load", str(run)))


@pytest.mark.parametrize("harm", ["truncated", "flipped"])
def test_a_run_falls_back_to_the_newest_intact_checkpoint_and_says_so(pool, tmp_path, inputs, finished, harm):
    run = shutil.copytree(finished, tmp_path / "run")
    path = damage_newest(run, harm)
    said = train(pool, 2, inputs.argv(run, *DIST_OPT))
    assert f"WARNING: {path}" in said
    assert "step_0000008.damaged" in said
    assert f"resumed from {step_folder(run, 7)}, step 7 of 8" in said
    assert metrics_of(run) == metrics_of(finished)
    assert (run / "step_0000008.damaged" / MARKER).is_file()
    assert step_folders(run)[-1] == step_folder(run, 8)


def test_run_without_an_intact_checkpoint_is_not_started_anew(pool, tmp_path, inputs, finished):
    run = shutil.copytree(finished, tmp_path / "run")
    for folder in step_folders(run):
        (folder / MARKER).unlink()
    line = refuse(pool, inputs.argv(run, *DIST_OPT))
    assert f"save ({run}) holds no intact checkpoint any more; name another save folder" in line
