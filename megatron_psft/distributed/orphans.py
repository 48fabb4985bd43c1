"""No process outlives the one that it works for: ranks their launcher, helpers the rank that started them.

A process that is killed tells nobody. Linux can signal its children, where they have asked for it in time, and any
process can watch its parent; both are done here.
"""

import ctypes
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import psutil

ORDERLY_SECONDS = 8.0
"""How long a rank whose launcher is gone may take to end by itself, with a checkpoint."""

_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


def end_with_launcher() -> None:
    """Has this rank end within seconds of torchrun, whatever it does then: training, it stops as after SIGTERM, and
    anything else, or what takes too long, is ended where it is. No effect in a process that torchrun has not started:
    such a one may outlive the shell that it was started from."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    signal_with_parent(signal.SIGTERM)
    if os.getppid() != launcher or _has_been_adopted(launcher):
        os._exit(128 + signal.SIGTERM)
    threading.Thread(target=_end_after, args=(launcher,), daemon=True, name="launcher").start()


def end_with_parent() -> None:
    """Ends this helper process, and what it has started, when its parent has ended. Returns at once."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        end_at_once(1)

    threading.Thread(target=wait, daemon=True, name="parent").start()


@contextmanager
def forks_end_with_parent() -> Iterator[None]:
    """Within this context, what this process forks, as Megatron-Core does to write files, is killed when it ends.
    For its main thread: Linux counts the end of the thread that forks."""
    _Forks.parent = os.getpid()
    try:
        yield
    finally:
        _Forks.parent = None


class _Forks:
    """Whose forks are to end with it; what is registered for forks stays so for good."""

    parent: int | None = None


def _follow() -> None:
    if _Forks.parent is not None:
        signal_with_parent(signal.SIGKILL)
        if os.getppid() != _Forks.parent:  # ended in between
            os._exit(1)
        _Forks.parent = None


os.register_at_fork(after_in_child=_follow)


def signal_with_parent(signum: int) -> None:
    """Has Linux send the signal when the parent ends. Elsewhere the watch alone has to do."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signum)


def end_at_once(code: int) -> None:
    """Ends this process and all that it has started."""
    with suppress(psutil.Error):
        for descendant in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                descendant.kill()
    os._exit(code)


def _end_after(launcher: int) -> None:
    _wait_for_end(launcher)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORDERLY_SECONDS)
    end_at_once(128 + signal.SIGTERM)


def _wait_for_end(parent: int) -> None:
    """Returns when our parent has ended."""
    with suppress(OSError):  # of an older kernel, or gone
        descriptor = os.pidfd_open(parent)
        if os.getppid() == parent:
            select.select([descriptor], [], [])
        os.close(descriptor)
    while os.getppid() == parent:
        time.sleep(0.5)


def _has_been_adopted(parent: int) -> bool:
    """Whether the launcher was gone before we looked: then our parent is the first process, which in a container may be
    torchrun itself."""
    if parent != 1:
        return False
    with suppress(OSError):
        return b"torch" not in Path("/proc/1/cmdline").read_bytes()
    return False


@contextmanager
def without_main_script() -> Iterator[None]:
    """Helpers that `multiprocessing` starts in this context do not import the main script. They need nothing of it, and
    one without `if __name__ == "__main__"` would be run once more."""
    script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
