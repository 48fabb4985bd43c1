"""Exit codes: what a job script learns of a run's end, also behind torchrun, which has one code for every failure."""

import errno
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import SafetensorError

from megatron_psft.cli.convert import require_room
from megatron_psft.config.flags import run_command
from megatron_psft.config.schema import Config
from megatron_psft.distributed.exit_code import FILE_VARIABLE, exit_code_of, leave, left_behind
from megatron_psft.errors import (
    DivergenceError,
    InfrastructureError,
    RankError,
    UserError,
    storage_error,
)
from megatron_psft.hf import weights
from tests.support import tiny
from tests.support.cli import Exit, run_cli, run_torchrun

CODES = {
    "a mistake": (UserError("lr"), 2),
    "divergence": (DivergenceError("step 3"), 3),
    "a lost disk": (InfrastructureError("save"), 4),
    "a lost peer": (RankError("rank 1"), 4),
    "a full disk that nobody has explained": (OSError(errno.ENOSPC, "No space left on device"), 4),
    "an input/output error": (OSError(errno.EIO, "Input/output error"), 4),
    "a file that is not there": (FileNotFoundError(errno.ENOENT, "No such file"), 1),
    "a bug": (KeyError("missing"), 1),
    "Ctrl-C": (KeyboardInterrupt(), 130),
    "--help": (SystemExit(0), 0),
    "a library that exits": (SystemExit(17), 17),
    "a library that exits with words": (SystemExit("no"), 1),
}


@pytest.fixture
def code_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "code"))
    return tmp_path / "code"


@pytest.mark.parametrize("cause", CODES)
def test_what_ends_a_process_gives_its_code_and_leaves_it(cause, code_file):
    error, code = CODES[cause]
    assert exit_code_of(error) == code
    with pytest.raises(type(error)), left_behind():
        raise error
    assert (code_file.read_text() if code_file.exists() else "0\n") == f"{code}\n"


def test_the_first_cause_is_kept_and_success_leaves_nothing(code_file):
    leave(0)
    assert not code_file.exists()
    for code in (2, 4, 143):
        leave(code)
    assert code_file.read_text() == "2\n"


def test_a_file_that_cannot_be_written_is_said_and_no_error_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "gone" / "code"))
    leave(3)
    assert f"{FILE_VARIABLE} ({tmp_path}/gone/code) cannot be written: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, InfrastructureError),
        (errno.EDQUOT, InfrastructureError),
        (errno.ESTALE, InfrastructureError),
        (errno.EROFS, InfrastructureError),
        (errno.EACCES, UserError),
        (errno.ENOENT, UserError),
        (errno.ENOTDIR, UserError),
        (None, UserError),
    ],
)
def test_a_disk_that_fails_is_told_from_a_wrong_path(number, kind):
    error = OSError("no number") if number is None else OSError(number, os.strerror(number))
    found = storage_error(error, "save (x): reason")
    assert (type(found), str(found)) == (kind, "save (x): reason")


@dataclass(frozen=True)
class NoFlags:
    """A command's configuration."""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InfrastructureError("the disk is full"), 4, "error: the disk is full"),
        (KeyboardInterrupt(), 130, "ended by SIGINT"),
    ],
)
def test_other_commands_have_the_same_codes(capsys, error, code, line):
    def fail(_config: NoFlags) -> None:
        raise error

    assert run_command(NoFlags, fail, [], epilog="") == code
    assert capsys.readouterr().err == f"{line}\n"


@pytest.fixture(scope="module")
def argv(tmp_path_factory) -> list[str]:
    """Flags of a run of 3 steps, without --save."""
    return [*tiny.run_flags(tmp_path_factory.mktemp("inputs")), "--train-iters", "3"]


def _run_and_fail(argv: list[str], code_file: str, how: str, rank: int) -> Exit:
    """A run in whose second step `rank` fails."""
    from megatron_psft.train import loop

    os.environ[FILE_VARIABLE] = code_file
    original, steps = loop.train_step, []

    def train_step(*args, **kwargs):
        steps.append(None)
        if len(steps) == 2 and int(os.environ["RANK"]) == rank:
            if how == "bug":
                raise KeyError("missing")
            if how == "disk":
                raise OSError(errno.ENOSPC, "No space left on device")
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    loop.train_step = train_step
    try:
        return run_cli(argv)
    except RuntimeError as error:
        return Exit(1, "", repr(error.__cause__))
    finally:
        loop.train_step = original


def test_a_bug_keeps_its_traceback_and_is_code_1(pool, argv, tmp_path):
    file = tmp_path / "code"
    (exit,) = pool.run(_run_and_fail, 1, [*argv, "--save", str(tmp_path / "run")], str(file), "bug", 0)
    assert exit.err == "KeyError('missing')"
    assert file.read_text() == "1\n"


def test_a_full_disk_that_one_rank_meets_is_code_4(pool, argv, tmp_path):
    file = tmp_path / "code"
    (exit,) = pool.run(_run_and_fail, 1, [*argv, "--save", str(tmp_path / "run")], str(file), "disk", 0)
    assert exit.code == 4
    assert "error: rank 0: [Errno 28] No space left on device; " in exit.err
    assert file.read_text() == "4\n"


def test_a_signal_is_128_and_its_number(pool, argv, tmp_path):
    file = tmp_path / "code"
    exits = pool.run(_run_and_fail, 2, [*argv, "--save", str(tmp_path / "run")], str(file), "signal", 1)
    assert [exit.code for exit in exits] == [143, 143]
    assert file.read_text() == "143\n"


def _run_with_file(argv: list[str], code_file: str) -> Exit:
    os.environ[FILE_VARIABLE] = code_file
    return run_cli(argv)


def _run_without_room_for_the_cache(argv: list[str], number: int) -> Exit:
    from megatron_psft.data.cache import DataCache

    def fail(self, *args, **kwargs):
        raise OSError(number, os.strerror(number))

    original, DataCache._make_folder = DataCache._make_folder, fail
    try:
        return run_cli(argv)
    finally:
        DataCache._make_folder = original


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 4), (errno.EACCES, 2)])
def test_what_one_rank_meets_while_it_tokenizes_ends_all(pool, argv, tmp_path, number, code):
    flags = ["--save", str(tmp_path / "run"), "--data-cache-dir", str(tmp_path / "cache")]
    exits = pool.run(_run_without_room_for_the_cache, 2, [*argv, *flags], number)
    assert [exit.code for exit in exits] == [code, code]
    assert f"error: data_cache_dir ({tmp_path}/cache) cannot be written" in exits[0].err
    assert exits[1].err == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_command_that_meets_a_full_or_failing_disk_ends_with_4(capsys, number):
    def command(_):
        raise OSError(number, os.strerror(number), "/data/out.jsonl")

    assert run_command(Config, command, ["--load-hf", "m", "--data", "d", "--save", "s"], epilog="") == 4
    assert capsys.readouterr().err == f"error: [Errno {number}] {os.strerror(number)}: '/data/out.jsonl'\n"


def test_a_command_that_raises_what_nobody_explains_keeps_its_traceback():
    def command(_):
        raise FileNotFoundError(errno.ENOENT, "No such file")

    with pytest.raises(FileNotFoundError):
        run_command(Config, command, ["--load-hf", "m", "--data", "d", "--save", "s"], epilog="")


def test_a_conversion_without_room_ends_with_4(monkeypatch, tmp_path):
    with pytest.raises(InfrastructureError, match="must have room for"):
        require_room("to_hf", tmp_path / "out", 1 << 60)

    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("shutil.disk_usage", fail)
    with pytest.raises(InfrastructureError, match="Input/output error"):
        require_room("to_hf", tmp_path / "out", 1)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ("Error while serializing: I/O error: Input/output error (os error 5)", errno.EIO),
        ("Error while deserializing header: invalid JSON", None),
    ],
)
def test_an_export_says_by_its_type_that_the_disk_failed(monkeypatch, tmp_path, text, number):
    def fail(*_, **__):
        raise SafetensorError(text)

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(SafetensorError if number is None else OSError) as caught:
        weights.save_tensors({}, tmp_path / "model.safetensors")
    assert getattr(caught.value, "errno", None) == number


def _refuse_tracker(argv: list[str]) -> Exit:
    from megatron_psft.train import loop

    def refuse(*_, **__):
        raise UserError("wandb_project (psft): planted")

    original, loop.Trackers = loop.Trackers, refuse
    try:
        return run_cli(argv)
    finally:
        loop.Trackers = original


def test_a_login_that_only_rank_zero_lacks_ends_all_with_2(pool, argv, tmp_path):
    exits = pool.run(_refuse_tracker, 2, [*argv, "--save", str(tmp_path / "run")])
    assert [exit.code for exit in exits] == [2, 2]
    assert "error: wandb_project (psft): planted" in exits[0].err


ENDS = {
    "flag": (["--clip-ratio-hig", "0.3"], 2),
    "data": (["--data", "no/such.jsonl"], 2),
    "divergence": (["--lr", "1e30", "--clip-grad", "1e30"], 3),
}


@pytest.mark.parametrize("end", ENDS)
def test_all_ranks_end_with_the_code_that_is_left(pool, argv, tmp_path, end):
    flags, code = ENDS[end]
    file = tmp_path / "code"
    exits = pool.run(_run_with_file, 2, [*argv, "--save", str(tmp_path / "run"), *flags], str(file))
    assert [exit.code for exit in exits] == [code, code], exits[0].err
    assert file.read_text() == f"{code}\n"


def test_a_run_that_ends_well_leaves_no_code(pool, argv, tmp_path):
    (exit,) = pool.run(_run_with_file, 1, [*argv, "--save", str(tmp_path / "run")], str(tmp_path / "code"))
    assert exit.code == 0
    assert not (tmp_path / "code").exists()


def test_a_file_in_no_folder_is_refused_at_the_start(pool, argv, tmp_path):
    (exit,) = pool.run(_run_with_file, 1, [*argv, "--save", str(tmp_path / "run")], str(tmp_path / "no" / "code"))
    assert exit.code == 2
    assert f"error: {FILE_VARIABLE} ({tmp_path}/no/code) must be a file in an existing folder" in exit.err


@pytest.mark.slow
def test_torchrun_of_the_module_leaves_the_code_too(argv, tmp_path, code_file):
    done = run_torchrun(["-m", "megatron_psft", *argv, "--save", str(tmp_path / "run"), "--global-batch-size", "3"], 2)
    assert done.returncode == 1
    assert code_file.read_text() == "2\n"
