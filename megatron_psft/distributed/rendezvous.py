"""Where ranks meet before their first collective: each says what it has, and all get the same answer."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_psft.errors import RankError, first_line

_ANSWER_DELAY = timedelta(seconds=30)
"""How much longer a rank waits for the answer than rank 0 waits for what all have to say."""
_LEAVING = timedelta(seconds=30)
"""How long a rank that gives up waits for the others to have read why."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """The store that all ranks reach, before there is a process group."""

    rank: int
    world_size: int
    store: dist.Store
    timeout: timedelta
    """How long to wait for a rank that is late."""

    def agree(self, own: str, decide: Callable[[Sequence[str]], str]) -> str:
        """Has rank 0 `decide` on what all ranks say, in their order, and returns its answer on every rank.

        Raises:
            RankError: some ranks have not come in time; rank 0 names them.
        """
        if self.world_size == 1:
            return decide([own])
        try:
            keys = self._keys("says")
            self.store.set(keys[self.rank], own)
            if self.rank == 0:
                self.store.set(keys[-1], decide(self._hear(keys[:-1])))
            self.store.wait([keys[-1]], self.timeout + _ANSWER_DELAY)
            return self.store.get(keys[-1]).decode()
        except dist.DistError as error:
            text = f"rank {self.rank}: rank 0 does not answer at the start: it hangs or is gone; see its output"
            raise RankError(f"{text}: {error}") from error

    def _hear(self, keys: list[str]) -> list[str]:
        try:
            self.store.wait(keys, self.timeout)
        except dist.DistError as error:
            missing = ", ".join(str(rank) for rank, key in enumerate(keys) if not self.store.check([key]))
            minutes = self.timeout.total_seconds() / 60
            text = f"rank 0: ranks {missing} have not come within distributed_timeout_minutes ({minutes:g})"
            raise RankError(f"{text}; see their output") from error
        return [said.decode() for said in self.store.multi_get(keys)]

    def leave(self) -> None:
        """Returns when all ranks are about to leave: torchrun ends the others once the first one has."""
        if self.world_size == 1:
            return
        with suppress(dist.DistError):  # the rank that holds the store has left
            keys = self._keys("leaves")
            self.store.set(keys[self.rank], "")
            self.store.wait(keys[:-1], _LEAVING)

    def _keys(self, what: str) -> list[str]:
        """A key for each rank and one for all, that no other round of this meeting has."""
        number = _round(self.store, what, self.world_size)
        return [f"{what} {number} {rank}" for rank in (*range(self.world_size), "all")]


def _round(store: dist.Store, what: str, world_size: int) -> int:
    """How often all ranks have done this before: none begins a round before all have begun the one before it."""
    return (store.add(what, 1) - 1) // world_size


def meet(rank: int, world_size: int, timeout_minutes: float = 30.0) -> Meeting:
    """Joins the other ranks of torchrun's environment; a lone process meets nobody. A meeting's store has nothing of
    earlier ones, which under torchrun have used the same one.

    Raises:
        RankError: rank 0 is not there in time, or other ranks are not.
    """
    timeout = timedelta(minutes=timeout_minutes)
    if world_size == 1:
        return Meeting(rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)
    try:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
        number = _round(store, "psft meets", world_size)
    except dist.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = first_line(error)
        raise RankError(f"rank {rank}: the ranks could not meet at {address}; see their output: {reason}") from error
    return Meeting(rank=rank, world_size=world_size, store=dist.PrefixStore(f"psft {number}", store), timeout=timeout)
