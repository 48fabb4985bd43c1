"""A rank that fails by itself tells the others, which end within seconds, whatever they wait for.

Under gloo its end fails their collectives. Under NCCL they go on waiting, in C++, where no signal's handler of Python's
is run: until the watchdog's timeout, or until torchrun kills them.
"""

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType

import torch.distributed as dist

from megatron_psft.distributed.exit_code import EXIT_BUG, exit_code_of, leave
from megatron_psft.distributed.orphans import end_at_once
from megatron_psft.distributed.rendezvous import Meeting
from megatron_psft.errors import ExplainedError, InfrastructureError, RankError, UserError, first_line

log = logging.getLogger(__name__)

_KEY = "failed"
_INTERVAL_SECONDS = 1.0
_GRACE_SECONDS = 4.0
"""How long a rank may take to find out by itself: then it says in which step, and in which collective."""
_LINGER_SECONDS = 3.0
"""How long the rank that holds the store lets the others read what it says there."""
_PATIENCE_SECONDS = 3.0
"""How long the rank that holds the store, which may be gone, is waited for."""


class FailureWatch:
    """Within this context, a thread looks whether another rank has failed, and then ends this process."""

    def __init__(self, meeting: Meeting, end: Callable[[int], None]) -> None:
        """Watches nothing yet.

        Args:
            meeting: of all ranks.
            end: ends this process; called with the rank that has failed, in the thread.
        """
        self._rank, self._store = meeting.rank, meeting.store
        self._end = end
        self._is_over = threading.Event()
        self._seen: int | None = None
        """The rank that has failed, once the thread knows."""
        self._has_heard = threading.Event()
        # Without torchrun, whose store outlives its ranks.
        self._holds_store = meeting.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._has_peers = meeting.world_size > 1

    def announce(self) -> int:
        """Has the other ranks end, as this one is about to. Returns the first rank that has failed: this one where none
        has before it."""
        first: list[bytes] = []

        def tell() -> None:
            with suppress(dist.DistError):
                first.append(_another_client(self._store).compare_set(_KEY, "", str(self._rank)))

        self._is_over.set()
        thread = threading.Thread(target=tell, daemon=True, name="announce")
        thread.start()
        thread.join(_PATIENCE_SECONDS)
        if self._has_peers and self._holds_store:
            time.sleep(_LINGER_SECONDS)
        if first:
            return int(first[0])
        return self._rank if self._seen is None else self._seen

    def listen(self) -> None:
        """Waits for another rank to say that it has failed, as long as one that is about to may take."""
        self._has_heard.wait(_GRACE_SECONDS)

    def __enter__(self) -> "FailureWatch":
        if self._has_peers:
            threading.Thread(target=self._watch, daemon=True, name="failure").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()

    def _watch(self) -> None:
        with suppress(dist.DistError):  # the rank that holds the store has left
            store = _another_client(self._store)
            while not self._is_over.wait(_INTERVAL_SECONDS):
                if store.check([_KEY]):
                    self._seen = int(store.get(_KEY))
                    self._has_heard.set()
                    if not self._is_over.wait(_GRACE_SECONDS):
                        self._end(self._seen)
                    return


def end_after(rank: int, first: int) -> None:
    """Ends this process, of `rank`, which waits for one that has failed."""
    log.error("rank %d: ended, as rank %d has failed", rank, first)
    sys.stdout.flush()
    leave(InfrastructureError.exit_code)
    end_at_once(InfrastructureError.exit_code)


def report(error: BaseException, rank: int, first: int, text: str | None) -> None:
    """Prints what only this rank may know of: as an `error:` line, where rank `first` has not failed before it, and of
    a bug the traceback, too.

    Args:
        error: what ends the process.
        rank: of this process.
        first: the rank that has failed first, this one or another.
        text: what the error means, in one line; its type and words if None.
    """
    is_interrupted = isinstance(error, KeyboardInterrupt)
    if exit_code_of(error) == EXIT_BUG or isinstance(error, OSError):
        traceback.print_exception(error)
    line = text or f"rank {rank}: {type(error).__name__}: {first_line(error)}"
    if first == rank:
        print(line if is_interrupted else f"error: {line}", file=sys.stderr, flush=True)  # noqa: T201
    elif not is_interrupted:
        print(f"{line}; rank {first} has failed first", file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def ending_together(meeting: Meeting) -> Iterator[None]:
    """Within this context, around a loop of others' that takes the process groups down itself, a rank that raises ends
    the whole run, as one of `psft train` does: it says so in one line, leaves its exit code, and all processes end.

    Raised is what all ranks raise together, a mistake or the loop's own exit, and without peers everything.
    """
    if meeting.world_size == 1:
        yield
        return
    rank = meeting.rank
    with FailureWatch(meeting, partial(end_after, rank)) as watch:
        try:
            yield
        except (SystemExit, UserError):
            raise
        except BaseException as error:  # whatever it is, the others may not know of it
            if isinstance(error, RankError):
                watch.listen()  # its groups fail before the rank that has taken them down says why
            leave(exit_code_of(error))
            first = watch.announce()
            report(error, rank, first, str(error) if isinstance(error, ExplainedError) else None)
            sys.stdout.flush()
            end_at_once(exit_code_of(error))


def _another_client(store: dist.Store) -> dist.Store:
    """One may be busy for as long as it waits."""
    return store.clone()  # type: ignore[attr-defined,no-any-return] # torch's stubs lack it
