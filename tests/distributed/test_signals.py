"""Signals: they are requests, a second Ctrl-C acts, and helper processes see none."""

import ast
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from megatron_psft.distributed.device import detect
from megatron_psft.distributed.grid import process_group
from megatron_psft.distributed.signals import StopRequested, StopSignals, helpers_outlive_signals

CPU = torch.device("cpu")


def _check_after_signal(to_rank: int, signum: int) -> list[int]:
    """The signals that three checks found: before it was sent, after, and once more."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    found = []
    with process_group(detect(rank), world_size), StopSignals(torch.device("cpu")) as stop:
        for moment in range(3):
            if moment == 1 and rank == to_rank:
                os.kill(os.getpid(), signum)
            try:
                stop.check()
                found.append(0)
            except StopRequested as request:
                found.append(request.signum)
        dist.barrier()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    return found


def _check_after_deadline(late_rank: int, signum: int | None) -> int | None:
    """What ended this rank, where the time of one rank is up and, if `signum` is set, another has a signal."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    left = -1 if rank == late_rank else 3600
    with process_group(detect(rank), world_size), StopSignals(CPU, deadline=time.monotonic() + left) as stop:
        if signum is not None and rank != late_rank:
            os.kill(os.getpid(), signum)
        with pytest.raises(StopRequested) as request:
            stop.check()
        dist.barrier()
    return request.value.signum


@pytest.mark.parametrize("late_rank", [0, 1])
@pytest.mark.parametrize("signum", [None, signal.SIGTERM])
def test_a_deadline_of_one_rank_stops_all_and_a_signal_comes_first(pool, late_rank, signum):
    assert pool.run(_check_after_deadline, 2, late_rank, signum) == [signum] * 2


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to_rank", [0, 1])
def test_a_signal_to_one_rank_stops_all(pool, to_rank, signum):
    assert pool.run(_check_after_signal, 2, to_rank, signum) == [[0, signum, signum]] * 2


def test_a_second_ctrl_c_acts_at_once():
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignals(torch.device("cpu")) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop._received == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_is_never_more_than_a_request(first):
    """Slurm may signal every process, and torchrun then signals its own once more."""
    with StopSignals(torch.device("cpu")) as stop:
        for signum in (first, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), signum)
            assert stop._received == signum


def test_helpers_outlive_what_the_trainer_receives():
    """The signal reaches this thread when the context ends, and the helper never."""
    with StopSignals(torch.device("cpu")) as stop:
        with helpers_outlive_signals():
            script = "import sys; print('up', flush=True); sys.stdin.read(); print('still here')"
            pipe = subprocess.PIPE
            helper = subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, text=True)
            # To this thread: one to the process might go to another thread, of pytest's, which does not block it.
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            assert stop._received == 0
        assert stop._received == signal.SIGTERM
    assert helper.stdout.readline() == "up\n"
    helper.send_signal(signal.SIGTERM)
    helper.send_signal(signal.SIGINT)
    out, _ = helper.communicate(timeout=120)
    assert (out, helper.returncode) == ("still here\n", 0)


_PRINT_BLOCKED = """
import multiprocessing, re, time
from multiprocessing import forkserver
from pathlib import Path
from megatron_psft.distributed.signals import helpers_outlive_signals

def blocked(pid):
    return int(re.search("SigBlk:\\s*(\\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)

if __name__ == "__main__":
    with helpers_outlive_signals():
        forkserver.ensure_running()
        contexts = [multiprocessing.get_context(kind) for kind in ("spawn", "forkserver")]
        processes = [context.Process(target=time.sleep, args=(60,)) for context in contexts]
        for process in processes:
            process.start()
        manager = contexts[0].Manager()
        pids = [forkserver._forkserver._forkserver_pid, *(each.pid for each in processes), manager._process.pid]
        print([blocked(pid) for pid in pids])
        for process in processes:
            process.kill()
        manager.shutdown()
"""


@pytest.mark.slow
def test_every_kind_of_helper_outlives_signals_in_a_fresh_process(tmp_path):
    """The first helper of a process has Python start its resource tracker, which leaves the signals unblocked."""
    script = tmp_path / "helpers.py"
    script.write_text(_PRINT_BLOCKED)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    masks = ast.literal_eval(done.stdout)
    wanted = sum(1 << (signum - 1) for signum in (signal.SIGTERM, signal.SIGINT))
    assert [mask & wanted for mask in masks] == [wanted] * 4
