"""A rank that fails by itself ends the run: in seconds, with one `error:` line, and with its own exit code left."""

import errno
import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_psft.distributed import failure
from megatron_psft.distributed.exit_code import FILE_VARIABLE
from megatron_psft.distributed.failure import FailureWatch
from megatron_psft.distributed.rendezvous import Meeting
from tests.support import tiny
from tests.support.pool import WorkerError

LIMIT_SECONDS = 60.0
"""Far below any timeout of torch's or torchrun's; 10 s on an idle machine."""
CUDA_OOM = (
    "CUDA out of memory. Tried to allocate 2.32 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.09 GiB is free."
)
FAULTS = {
    "between collectives": (1, "KeyError: 'missing'"),
    "in a forward pass": (1, "out of host memory, asked for 2.32 GiB; this process had "),
    "on a full disk": (4, "[Errno 28] No space left on device; what it has saved is intact"),
    "in the thread that copies a checkpoint": (1, "ValueError: no copy"),
    "while another waits for nothing": (1, "KeyError: 'missing'"),
}
"""The exit code, and what the error line says."""


@pytest.fixture(scope="module")
def argv(tmp_path_factory) -> list[str]:
    inputs = tiny.run_flags(tmp_path_factory.mktemp("inputs"))
    return [*inputs, "--train-iters", "3", "--tensor-model-parallel-size", "2"]


def _run_for_real(argv: list[str], folder: Path, fault: str, failing: int) -> int:
    """`psft train` as this process's whole life, with a fault in the second step of rank `failing`."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_psft.checkpoint import background
    from megatron_psft.cli.train import main
    from megatron_psft.train import loop

    rank, calls = int(os.environ["RANK"]), []
    os.environ[FILE_VARIABLE] = str(folder / "code")
    os.dup2(os.open(folder / f"err-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    train_step, forward = loop.train_step, TransformerLayer.forward

    def raise_(error: BaseException) -> None:
        (folder / "raised").write_text(str(time.time()))
        raise error

    def step(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2 and rank == failing and fault in ("between collectives", "while another waits for nothing"):
            raise_(KeyError("missing"))
        if len(calls) == 2 and rank == failing and fault == "on a full disk":
            raise_(OSError(errno.ENOSPC, "No space left on device"))
        if len(calls) == 2 and rank != failing and fault == "while another waits for nothing":
            time.sleep(600)
        return train_step(*args, **kwargs)

    def layer(*args, **kwargs):
        if len(calls) == 2 and fault == "in a forward pass":
            raise_(torch.OutOfMemoryError(CUDA_OOM))
        return forward(*args, **kwargs)

    loop.train_step = step
    if rank == failing:
        TransformerLayer.forward = layer
        if fault == "in the thread that copies a checkpoint":
            background._Caller._start = lambda *_: raise_(ValueError("no copy"))
    return main([*argv, "--async-save", "--save-interval", "1"])


def check_end(pool, argv: list[str], folder: Path, fault: str, failing: int) -> float:
    """Runs, checks what is left of the run, and returns how many seconds it went on after the fault."""
    code, said = FAULTS[fault]
    with pytest.raises(WorkerError) as caught:
        pool.run(_run_for_real, 2, [*argv, "--save", str(folder / "run")], folder, fault, failing)
    seconds = time.time() - float((folder / "raised").read_text())
    texts = {rank: (folder / f"err-{rank}").read_text() for rank in (0, 1)}
    died = {failing: f"died with exit code {code}", 1 - failing: "died with exit code 4"}
    assert caught.value.failures == died, texts
    (error,) = [line for text in texts.values() for line in text.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: rank {failing}: {said}"), texts
    assert (folder / "code").read_text() == f"{code}\n"
    assert f"rank {failing} has failed" in texts[1 - failing]
    assert "Traceback" not in texts[1 - failing]
    return seconds


@pytest.mark.slow
def test_a_rank_without_memory_for_a_forward_pass_ends_the_other_and_says_what_to_change(pool, argv, tmp_path):
    assert check_end(pool, argv, tmp_path, "in a forward pass", 1) < LIMIT_SECONDS
    text = (tmp_path / "err-1").read_text()
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "; planned were 0.0 GiB, in the " in error
    assert "lower it by --use-distributed-optimizer, " in error
    assert "psft plan says what fits" in error
    assert "step 2: all_reduce failed, as another rank hangs or is gone" in (tmp_path / "err-0").read_text()
    assert "hangs or is gone" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "failing"), [*((fault, 1) for fault in FAULTS), ("between collectives", 0), ("on a full disk", 0)]
)
def test_a_run_ends_in_seconds_whichever_rank_fails_wherever(pool, argv, tmp_path, fault, failing):
    assert check_end(pool, argv, tmp_path, fault, failing) < LIMIT_SECONDS


@pytest.fixture
def often(monkeypatch) -> None:
    """Ranks look for a failure every 50 ms, and may take a second to find out by themselves."""
    monkeypatch.setattr(failure, "_INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(failure, "_GRACE_SECONDS", 1.0)


def test_a_rank_in_a_wait_that_does_not_fail_is_ended(often):
    """As one that waits for NCCL."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ended = {rank: threading.Event() for rank in range(3)}
    causes: list[int] = []

    def watch(rank: int) -> FailureWatch:
        meeting = Meeting(rank=rank, world_size=3, store=dist.PrefixStore("psft", server), timeout=timedelta(seconds=9))
        return FailureWatch(meeting, lambda first: (causes.append(first), ended[rank].set()))

    with watch(0), watch(2) as failing:
        assert failing.announce() == 2
        with watch(1) as later:
            assert later.announce() == 2, "the first one is named"
        assert ended[0].wait(LIMIT_SECONDS)
    assert causes == [2]
    assert not ended[1].is_set(), "a rank that has failed itself goes its own way"


def test_a_rank_that_has_lost_a_peer_hears_why(often, monkeypatch):
    """Where the peer takes its groups down before it says that it has failed."""
    monkeypatch.setattr(failure, "_GRACE_SECONDS", LIMIT_SECONDS)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store, ended = dist.PrefixStore("psft", server), []
    lost, failing = (Meeting(rank=rank, world_size=2, store=store, timeout=timedelta(seconds=9)) for rank in (0, 1))
    threading.Timer(0.5, FailureWatch(failing, ended.append).announce).start()
    started = time.monotonic()
    with FailureWatch(lost, ended.append) as watch:
        watch.listen()
        assert watch.announce() == 1
    assert time.monotonic() - started < LIMIT_SECONDS / 2
    assert ended == []


def test_a_rank_that_has_left_is_not_ended_by_what_comes_after(often):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store, ended = dist.PrefixStore("psft", server), []
    meetings = [Meeting(rank=rank, world_size=2, store=store, timeout=timedelta(seconds=9)) for rank in range(2)]
    with FailureWatch(meetings[0], ended.append):
        pass
    FailureWatch(meetings[1], ended.append).announce()
    time.sleep(1.5)
    assert ended == []
