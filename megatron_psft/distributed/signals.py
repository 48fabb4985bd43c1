"""Ends a run in good order: at SIGTERM, as schedulers send before they kill, at Ctrl-C, or when its time is up."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequested(Exception):  # noqa: N818 (no error, as StopIteration is none)
    """Raised on every rank alike once a signal has come to any of them, or the time of any is up."""

    def __init__(self, signum: int | None) -> None:
        """`signum` is the signal's number; None where the time is up."""
        super().__init__("the time is up" if signum is None else signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """Within this context SIGTERM and the first SIGINT are requests that `check` honours, as is the end of a time.

    A SIGINT after any of them acts at once, as it would outside. SIGTERM may come again, as when a scheduler signals
    all processes and torchrun its own once more.
    """

    def __init__(self, device: torch.device, *, deadline: float = math.inf) -> None:
        """Receives nothing yet.

        Args:
            device: what this rank computes on, over which ranks tell each other.
            deadline: when the time of this rank is up, by `time.monotonic()`, in seconds.
        """
        self._device, self._deadline, self._received = device, deadline, 0

    def check(self) -> None:
        """Raises `StopRequested` where any rank has received a signal, or its time is up; collective."""
        is_over = time.monotonic() >= self._deadline
        highest = torch.tensor([self._received, int(is_over)], device=self._device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        signum, any_is_over = highest.tolist()
        if signum or any_is_over:
            raise StopRequested(signum or None)

    def __enter__(self) -> "StopSignals":
        self._previous = {signum: signal.signal(signum, self._receive) for signum in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        self._received = signum
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)


@contextmanager
def helpers_outlive_signals() -> Iterator[None]:
    """Processes that are started in this context never see SIGTERM or SIGINT.

    torchrun sends its signal to the whole process group. The helpers by which Megatron-Core writes checkpoints would
    die of it while the trainer is about to save. What arrives for this process meanwhile is noted at the end, or at
    once where another thread runs that does not block it.
    """
    # Before the signals are blocked: Python starts this tracker with the first helper, and unblocks them as it does.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
