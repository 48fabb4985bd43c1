"""A rank that fails by itself tells the others, which end within seconds, whatever they wait for.

Under gloo its end fails their collectives. Under NCCL they go on waiting, in C++, where no signal's handler of Python's
is run: until the watchdog's timeout, or until torchrun kills them.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

import torch.distributed as dist

from megatron_psft.distributed.orphans import end_at_once
from megatron_psft.distributed.rendezvous import Meeting
from megatron_psft.errors import InfrastructureError

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
                    if not self._is_over.wait(_GRACE_SECONDS):
                        self._end(self._seen)
                    return


def end_after(rank: int, first: int) -> None:
    """Ends this process, of `rank`, which waits for one that has failed."""
    log.error("rank %d: ended, as rank %d has failed", rank, first)
    sys.stdout.flush()
    end_at_once(InfrastructureError.exit_code)


def _another_client(store: dist.Store) -> dist.Store:
    """One may be busy for as long as it waits."""
    return store.clone()  # type: ignore[attr-defined,no-any-return] # torch's stubs lack it
