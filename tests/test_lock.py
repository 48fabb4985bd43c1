"""One writer at a time: of racing starters one wins, a killed one holds nothing, another host's is respected."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_psft import lock
from megatron_psft.errors import InfrastructureError, UserError
from megatron_psft.lock import lock_beside, lock_within, sole_writer
from tests.support.cli import REPOSITORY, run_cli
from tests.support.converting import convert
from tests.support.marks import slow
from tests.support.runs import inputs, train

__all__ = ["convert", "inputs"]  # the fixtures

_STARTER = """
import errno, fcntl, sys, time
from pathlib import Path
from megatron_psft import lock
from megatron_psft.errors import UserError
if sys.argv[1] == "without-flock":
    def flock(*args):
        raise OSError(errno.ENOLCK, "no locks available")
    fcntl.flock = flock
for line in sys.stdin:  # the folder, and the time to start at
    folder, start = line.split()
    time.sleep(max(0.0, float(start) - time.time()))
    try:
        with lock.sole_writer("save", Path(folder), lock.lock_within(Path(folder))):
            (Path(folder) / "metrics.jsonl").open("x").close()  # fails where another writes
            print("won", flush=True)
            sys.stdin.readline()
    except UserError as error:
        print(error, flush=True)
        sys.stdin.readline()
    print("over", flush=True)
"""


@contextmanager
def starter(kind: str = "flock") -> Iterator[subprocess.Popen[str]]:
    """A process that takes locks as it is told to."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", _STARTER, kind], stdin=pipe, stdout=pipe, text=True, bufsize=1
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[str], text: str) -> None:
    process.stdin.write(text + "\n")


@pytest.mark.parametrize(("kind", "rounds"), [("flock", 20), ("without-flock", 2), slow("without-flock", 20)])
def test_of_two_starters_one_wins(tmp_path, kind, rounds):
    with starter(kind) as first, starter(kind) as second:
        for number in range(rounds):
            folder = tmp_path / str(number)
            start = time.time() + (0.4 if number == 0 else 0.02)
            for process in (first, second):
                tell(process, f"{folder} {start}")
            said = {process.pid: process.stdout.readline().strip() for process in (first, second)}
            (winner,) = [pid for pid, text in said.items() if text == "won"]
            (refusal,) = [text for text in said.values() if text != "won"]
            assert f"save ({folder}) is in use: process {winner} on {os.uname().nodename} has been writing" in refusal
            for process in (first, second):
                tell(process, "end")
                assert process.stdout.readline() == "over\n"
            assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


_TURNS = """
import sys
from pathlib import Path
from megatron_psft.errors import InfrastructureError, UserError
from megatron_psft.lock import lock_within, sole_writer
folder, turns = Path(sys.argv[1]), 0
while turns < 40:
    try:
        with sole_writer("save", folder, lock_within(folder)):
            (folder / "busy").open("x").close()  # fails where another has it, too
            (folder / "busy").unlink()
            turns += 1
    except UserError:
        pass
"""


def test_a_lock_that_is_released_while_another_opens_it_is_not_held_twice(tmp_path):
    (tmp_path / "here").touch()
    processes = [subprocess.Popen([sys.executable, "-c", _TURNS, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("kind", ["flock", "without-flock"])
def test_a_killed_holder_holds_nothing(tmp_path, kind, monkeypatch):
    if kind != "flock":
        monkeypatch.setattr(fcntl, "flock", _no_flock)
    with starter(kind) as process:
        tell(process, f"{tmp_path} 0")
        assert process.stdout.readline() == "won\n"
        assert f"process {process.pid} on" in refusal_of(tmp_path)
        process.send_signal(signal.SIGSTOP)
        assert "wait for it, or end it" in refusal_of(tmp_path)
        process.kill()
        process.wait()
        with sole_writer("save", tmp_path, lock_within(tmp_path)):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock").exists()


def _no_flock(*args: object) -> None:
    raise OSError(errno.ENOLCK, "no locks available")


def refusal_of(folder: Path, *, steal: bool | None = False, kind: type[Exception] = UserError) -> str:
    with pytest.raises(kind) as error, sole_writer("save", folder, lock_within(folder), steal=steal):
        pass
    return str(error.value)


def test_processes_that_a_killed_holder_left_behind_are_waited_for(tmp_path, monkeypatch):
    """A writer that it has forked has its lock, and may write."""
    script = (
        "import os, sys, time; from pathlib import Path; from megatron_psft.lock import sole_writer, lock_within\n"
        "with sole_writer('save', Path(sys.argv[1]), lock_within(Path(sys.argv[1]))):\n"
        "    child = os.fork()\n"
        "    if not child: time.sleep(60)\n"
        "    print(child, flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        monkeypatch.setattr(lock, "LEFT_BEHIND_SECONDS", 0.3)
        assert f"process {process.pid} on" in (text := refusal_of(tmp_path))
        assert "and is gone, but processes that it has started are not; end them" in text
        monkeypatch.setattr(lock, "LEFT_BEHIND_SECONDS", 15)
        subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {child}"])
        with sole_writer("save", tmp_path, lock_within(tmp_path)):
            pass


def held_by(folder: Path, *, idle_seconds: float = 0, **changes: object) -> lock._Holder:
    """Leaves a lock as another process does, which differs from this one in `changes`."""
    holder = replace(lock._Holder.new(), token="0" * 16, **changes)
    path = lock_within(folder)
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - idle_seconds,) * 2)
    return holder


@pytest.mark.parametrize("twin", [False, True], ids=["other-name", "same-name"])
@pytest.mark.parametrize("kind", ["flock", "without-flock"])
def test_another_hosts_lock_is_respected_until_it_is_stale_or_stolen(tmp_path, monkeypatch, kind, twin):
    if kind != "flock":
        monkeypatch.setattr(fcntl, "flock", _no_flock)
    host = os.uname().nodename if twin else "node7"
    there = {"host": host, "kernel": "another boot", "pid": 4711}
    holder = held_by(tmp_path, idle_seconds=42, **there)
    text = refusal_of(tmp_path, kind=InfrastructureError)
    assert f"process 4711 on {host} has been writing to it since {holder.started}; its last sign of life is 4" in text
    assert "free 10 minutes after that sign, or at once with --steal-lock" in text
    assert "steal" not in refusal_of(tmp_path, steal=None, kind=InfrastructureError)
    with sole_writer("save", tmp_path, lock_within(tmp_path), steal=True):
        assert json.loads((tmp_path / ".lock").read_text())["host"] == os.uname().nodename
    held_by(tmp_path, idle_seconds=lock.STALE_SECONDS + 1, **there)
    with sole_writer("save", tmp_path, lock_within(tmp_path)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_nobody_steals_from_a_process_of_this_kernel(tmp_path):
    """In a container of its own it has another number here, and lives as long as its `flock`."""
    with starter() as process:
        tell(process, f"{tmp_path} 0")
        process.stdout.readline()
        assert "wait for it, or end it" in refusal_of(tmp_path, steal=True)
        held_by(tmp_path, pid=1, pids="pid:[1]", idle_seconds=lock.STALE_SECONDS + 1)
        assert "process 1 on" in refusal_of(tmp_path, steal=True)


def test_another_hosts_lock_that_its_server_keeps_is_stolen(tmp_path):
    """Where hosts share locks, a dead one's may stay."""
    with starter() as process:
        tell(process, f"{tmp_path} 0")
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)  # as good as dead
        held_by(tmp_path, host="node7", kernel="another boot")
        with sole_writer("save", tmp_path, lock_within(tmp_path), steal=True):
            assert json.loads((tmp_path / ".lock").read_text())["host"] == os.uname().nodename


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", _no_flock)
    held_by(tmp_path)
    refusal_of(tmp_path)
    held_by(tmp_path, ticks=lock._Holder.new().ticks - 1)
    with sole_writer("save", tmp_path, lock_within(tmp_path)):
        pass


def test_a_holder_ends_that_another_has_taken_the_lock_from(tmp_path):
    with starter() as process:
        tell(process, f"{tmp_path} 0")
        assert process.stdout.readline() == "won\n"
        held_by(tmp_path, host="node7", kernel="another boot")
        assert process.wait(timeout=120) == 2
    assert json.loads((tmp_path / ".lock").read_text())["host"] == "node7"


def test_a_holder_touches_its_lock(tmp_path):
    with sole_writer("save", tmp_path, lock_within(tmp_path)):
        os.utime(tmp_path / ".lock", (0, 0))
        deadline = time.monotonic() + 120
        while (tmp_path / ".lock").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_folders_that_were_made_for_a_lock_alone_go_with_it(tmp_path):
    (tmp_path / "there").mkdir()
    new = tmp_path / "there" / "above" / "new"
    for write in (False, True):
        with sole_writer("save", new, lock_within(new)):
            if write:
                (new / "file").touch()
        assert new.exists() == new.parent.exists() == write
    assert (tmp_path / "there").exists(), "it was empty, and not made for the lock"


def test_a_run_whose_folder_is_in_use_touches_nothing(pool, tmp_path, inputs):
    save, target = tmp_path / "run", tmp_path / "hf"
    flags = ("--save-interval", "1", "--train-iters", "3")
    train(pool, 1, inputs.argv(save, *flags))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in save.rglob("*") if path.is_file()}
    with sole_writer("save", save, lock_within(save)):
        exits = pool.run(run_cli, 2, inputs.argv(save, *flags, "--train-iters", "4", "--steal-lock"))
    assert [exit.code for exit in exits] == [2, 2]
    assert f"error: save ({save}) is in use: process {os.getpid()} on {os.uname().nodename}" in exits[0].err
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    with sole_writer("export_hf", target, lock_beside(target)):
        (exit,) = pool.run(run_cli, 1, inputs.argv(tmp_path / "new", *flags, "--export-hf", str(target)))
    assert f"error: export_hf ({target}) is in use: process {os.getpid()}" in exit.err
    assert not (tmp_path / "new").exists()


def test_a_conversion_whose_target_is_in_use_is_refused(convert, tmp_path, inputs):
    for flag, target in (("--to-megatron", tmp_path / "a" / "ckpt"), ("--to-hf", tmp_path / "hf")):
        with sole_writer("to", target, lock_beside(target)):
            exit = convert("--from-hf", inputs.model, flag, target, "--tokenizer", inputs.tokenizer)
        assert f"({target}) is in use: process {os.getpid()} on" in exit.err
        assert "steal" not in exit.err
        assert exit.code == 2
    assert list(tmp_path.iterdir()) == []
