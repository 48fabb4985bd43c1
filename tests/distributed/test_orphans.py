"""Whatever is killed, the launcher or a rank, no process is left, on an idle machine after 15 seconds at most."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megatron_psft.distributed import orphans
from tests.support.cli import REPOSITORY
from tests.support.marks import slow
from tests.support.runs import DIST_OPT, inputs, metrics_of, train

__all__ = ["inputs"]  # the fixture

LIMIT_SECONDS = 90.0  # what ends in 3 to 12 s of an idle machine takes its time among other tests
MARK = "TEST_OF_ORPHANS"

_RANK = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from megatron_psft.distributed.orphans import end_with_launcher, end_with_parent, forks_end_with_parent

def help(folder):
    end_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    fork(folder)
    time.sleep(300)

def fork(folder):
    with forks_end_with_parent():
        if not os.fork():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (folder / f"fork-{os.getpid()}").touch()
            time.sleep(300)

if __name__ == "__main__":
    end_with_launcher()
    phase, folder = sys.argv[1], Path(sys.argv[2])
    received = []
    if phase == "training":
        signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    elif phase != "waiting":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if phase == "helpers":
        for kind in ("spawn", "forkserver"):
            multiprocessing.get_context(kind).Process(target=help, args=(folder,)).start()
        fork(folder)
    (folder / f"ready-{os.getpid()}").touch()
    deadline = time.monotonic() + 300
    while not received and time.monotonic() < deadline:
        time.sleep(0.05)
    (folder / f"saved-{os.getpid()}").touch()
"""

_LAUNCHER = """
import os, subprocess, sys
environment = {**os.environ, "TORCHELASTIC_RUN_ID": "test"}
ranks = [subprocess.Popen([sys.executable, *sys.argv[1:]], env=environment) for _ in range(2)]
print("started", flush=True)
for rank in ranks:
    rank.wait()
"""


@contextmanager
def started(*command: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process, and the mark that all it starts inherit. What is left of them is killed at the end."""
    mark = secrets.token_hex(8)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", MARK: mark}
    null = subprocess.DEVNULL
    process = subprocess.Popen(
        list(map(str, command)), env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=null, text=True
    )
    try:
        yield process, mark
    finally:
        for left in of(mark):
            left.kill()
        process.wait()
        process.stdout.close()


def of(mark: str) -> list[psutil.Process]:
    """The processes that carry a mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def seconds_until_gone(mark: str) -> float:
    begin = time.monotonic()
    while left := of(mark):
        assert time.monotonic() < begin + LIMIT_SECONDS, [(each.pid, each.ppid(), each.status()) for each in left]
        time.sleep(0.1)
    return time.monotonic() - begin


def wait_for(folder: Path, pattern: str, count: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, list(folder.glob("*"))
        time.sleep(0.02)


@contextmanager
def launched(folder: Path, phase: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Two ranks of a launcher such as torchrun, without its seconds of imports."""
    script = folder / "rank.py"
    script.write_text(_RANK)
    with started(sys.executable, "-c", _LAUNCHER, script, phase, folder) as (launcher, mark):
        yield launcher, mark


@pytest.mark.parametrize("phase", ["training", "waiting", slow("stuck"), slow("helpers")])
def test_ranks_and_helpers_end_when_their_launcher_is_killed(tmp_path, phase):
    with launched(tmp_path, phase) as (launcher, mark):
        wait_for(tmp_path, "ready-*", 2)
        wait_for(tmp_path, "fork-*", 2 * 3 if phase == "helpers" else 0)
        launcher.kill()
        took = seconds_until_gone(mark)
    if phase in ("stuck", "helpers"):
        assert took > 0.8 * orphans.ORDERLY_SECONDS, "time to end in good order comes first"
    assert len(list(tmp_path.glob("saved-*"))) == (2 if phase == "training" else 0)


def test_helpers_end_when_their_rank_is_killed(tmp_path):
    with launched(tmp_path, "helpers") as (_, mark):
        wait_for(tmp_path, "ready-*", 2)
        wait_for(tmp_path, "fork-*", 2 * 3)
        for path in tmp_path.glob("ready-*"):
            os.kill(int(path.name.removeprefix("ready-")), signal.SIGKILL)
        seconds_until_gone(mark)


@pytest.mark.parametrize("delay", [0, 0.02, 0.05, 0.1, 0.2])
def test_ranks_end_whose_launcher_is_killed_while_they_start(tmp_path, delay):
    with launched(tmp_path, "waiting") as (launcher, mark):
        assert launcher.stdout.readline() == "started\n"
        time.sleep(delay)
        launcher.kill()
        seconds_until_gone(mark)
    assert not list(tmp_path.glob("saved-*"))


_UNGUARDED = """
import multiprocessing, sys
from megatron_psft.distributed.orphans import without_main_script

print("imported", flush=True)
with without_main_script():
    helper = multiprocessing.get_context(sys.argv[1]).Process(target=print, args=("helped",))
    helper.start()
helper.join()
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_helper_does_not_run_a_script_without_a_guard_once_more(tmp_path, method):
    script = tmp_path / "script.py"
    script.write_text(_UNGUARDED)
    done = subprocess.run(
        [sys.executable, script, method],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.stdout.split() == ["imported", "helped"]


def test_a_lone_process_outlives_its_shell(tmp_path):
    """As with `nohup psft train &`."""
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    shell = f"{sys.executable} {script} training {tmp_path} & wait"
    with started("sh", "-c", shell) as (process, mark):
        wait_for(tmp_path, "ready-*", 1)
        process.kill()
        process.wait()
        time.sleep(1.5)
        (left,) = of(mark)
        left.terminate()
        seconds_until_gone(mark)
    assert len(list(tmp_path.glob("saved-*"))) == 1


_GROUP_RANK = """
import os, sys, time
from pathlib import Path
from megatron_psft.distributed.orphans import end_with_launcher
end_with_launcher()
import torch
import torch.distributed as dist
from megatron_psft.distributed.signals import StopSignals

phase, folder, rank = sys.argv[1], Path(sys.argv[2]), os.environ["RANK"]
ready = folder / f"ready-{os.getpid()}"
if phase == "rendezvous":
    ready.touch()
    time.sleep(300 if rank == "1" else 0)
dist.init_process_group("gloo")
if phase == "collective":
    ready.touch()
    time.sleep(300 if rank == "1" else 0)
    dist.barrier()
with StopSignals(torch.device("cpu")) as stop:
    ready.touch()
    while True:
        stop.check()
        time.sleep(0.01)
"""


def torchrun(*args: str | Path) -> Sequence[str | Path]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return [*launcher, "--nproc-per-node", "2", *args]


def victim_of(launcher: subprocess.Popen[str], victim: str) -> int:
    """The process to kill: the launcher, or one of its ranks."""
    if victim == "launcher":
        return launcher.pid
    ranks = [child for child in psutil.Process(launcher.pid).children() if "RANK" in child.environ()]
    (rank,) = [child for child in ranks if child.environ()["RANK"] == victim]
    return rank.pid


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "victim"),
    [
        ("rendezvous", "launcher"),
        ("rendezvous", "0"),
        ("collective", "launcher"),
        ("collective", "1"),
        ("training", "0"),
    ],
)
def test_a_group_of_torchrun_ends_whoever_is_killed_whenever(tmp_path, phase, victim):
    (tmp_path / "rank.py").write_text(_GROUP_RANK)
    with started(*torchrun(tmp_path / "rank.py", phase, tmp_path)) as (launcher, mark):
        wait_for(tmp_path, "ready-*", 2)
        os.kill(victim_of(launcher, victim), signal.SIGKILL)
        seconds_until_gone(mark)


STEPS = 12
IN_BACKGROUND = (
    *DIST_OPT,
    *("--save-interval", "2", "--async-save", "--train-iters", str(STEPS), "--lr-decay-style", "constant"),
)


@pytest.mark.slow
def test_a_run_whose_launcher_is_killed_resumes_to_the_bit(pool, tmp_path, inputs):
    """While checkpoints are written in the background. Of a rank that is killed tell the tests of resuming."""
    argv = inputs.argv(tmp_path / "run", *IN_BACKGROUND)
    with started(*torchrun("-m", "megatron_psft", *argv)) as (launcher, mark):
        # The writers have the lowest priority: among other tests they may get next to nothing of a CPU for minutes.
        wait_for(tmp_path / "run", "step_*[0-9]", 2, seconds=600)
        launcher.kill()
        seconds_until_gone(mark)
    assert len(metrics_of(tmp_path / "run")) < STEPS
    assert "resumed from" in train(pool, 2, argv)
    train(pool, 2, inputs.argv(tmp_path / "undisturbed", *IN_BACKGROUND))
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "undisturbed")
