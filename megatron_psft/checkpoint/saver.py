"""Saves and resumes a run through Megatron-Core's distributed checkpoints, in the same or another parallel layout."""

import gc
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint import CheckpointException
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_psft import sealed
from megatron_psft.checkpoint import folders
from megatron_psft.checkpoint.background import BackgroundCalls
from megatron_psft.checkpoint.host_memory import check_room_for_saving, state_bytes
from megatron_psft.checkpoint.identity import BEGAN_WITH_BASE, VERSION, Identity
from megatron_psft.checkpoint.replicas import share_out
from megatron_psft.checkpoint.staging import with_own_storage
from megatron_psft.checkpoint.state import (
    _METADATA,
    TrainState,
    _layout,
    _sharded_rng,
    _sharded_state,
)
from megatron_psft.checkpoint.table import Table
from megatron_psft.checkpoint.window import sharded_window
from megatron_psft.config.resume import Settings
from megatron_psft.data.loader import BatchLoader
from megatron_psft.distributed.collective import naming_lost_peers, on_rank_zero
from megatron_psft.distributed.cpu_shims import plain_operations
from megatron_psft.distributed.grid import Parallel
from megatron_psft.distributed.megatron_lines import save_options, start_results_server
from megatron_psft.distributed.orphans import end_with_parent, forks_end_with_parent
from megatron_psft.distributed.signals import helpers_outlive_signals
from megatron_psft.errors import InfrastructureError, RankError, storage_error

log = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of a run, one at a time; as a context it finishes the last one. All collective."""

    def __init__(
        self,
        folder: Path,
        state: TrainState,
        identity: Identity,
        settings: Settings,
        loader: BatchLoader,
        parallel: Parallel,
        *,
        keep_last: int | None,
        in_background: bool,
        began_with_base: bool = False,
    ) -> None:
        """Describes the checkpoints.

        Args:
            folder: of the run, shared by all nodes.
            state: what is saved.
            identity: what a run that resumes must have in common with this one.
            settings: of this run, with which one that resumes compares its own.
            loader: of the training batches.
            parallel: this rank's place.
            keep_last: newest checkpoints to keep; all where None.
            in_background: whether `save` returns at once; `wait_for_copy` has to come before the state changes.
            began_with_base: as in `StartPoint`.

        Raises:
            UserError: a node has no room in host memory for what its ranks copy there.
        """
        self._folder, self._state = folder, state
        self._identity, self._settings = identity, settings
        self._loader, self._parallel, self._keep_last = loader, parallel, keep_last
        self._began_with_base = began_with_base
        check_room_for_saving(state, parallel, in_background=in_background)
        self._needed_bytes = self._state_bytes()
        with helpers_outlive_signals():
            self._queue = BackgroundCalls(parallel.device) if in_background else None
        self._sealer = ThreadPoolExecutor(max_workers=1)  # of rank 0
        self._sealing: Future[None] | None = None
        self._table = Table()
        self._target = folder
        self._has_to_validate = True

    def save(self, step: int) -> None:
        """Writes the checkpoint of `step` completed steps, and removes what `keep_last` makes superfluous.

        Raises:
            InfrastructureError: it could not be written, as on a full disk; the checkpoints before it are as they were.
            UserError: the folder or the rights to it are wrong.
        """
        self._finalize(blocking=True)
        target = folders.step_folder(self._folder, step)
        staging = on_rank_zero(lambda: self._begin(target))
        self._target = target
        with self._writing(), naming_lost_peers(f"checkpoint {target}"), helpers_outlive_signals():
            start_results_server(end_with_parent)
            is_first, self._has_to_validate = self._has_to_validate, False
            with plain_operations(), _quick_collections(), self._table.planned(is_first=is_first):
                request = _plan(self._sharded_content(step), staging, is_first=is_first)
            if request.async_fn is not None:  # there may be nothing to write on this rank
                write = partial(_write, request.async_fn, staging, self._parallel.rank)
                request = request._replace(async_fn=write)
            request.add_finalize_fn(partial(self._seal, target, step))
            if self._queue is None:
                with self._table.left_to_be_written():
                    request.execute_sync()
            else:
                self._queue.schedule_async_request(request)
        if self._queue is None:
            self.finish()

    def wait_for_copy(self) -> None:
        """Returns when the state that `save` was called for is copied, and may change."""
        if self._queue is not None:
            with self._writing():
                self._queue.wait_for_copy()

    def poll(self) -> None:
        """Has the checkpoint that is written in the background sealed, once all ranks are done with it."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Waits until the checkpoint that is written in the background, if one is, is sealed."""
        self._finalize(blocking=True)
        on_rank_zero(self._wait_for_seal)

    def _finalize(self, *, blocking: bool) -> None:
        if self._queue is not None:
            with self._writing(), naming_lost_peers(f"checkpoint {self._target}"), self._table.left_to_be_written():
                self._queue.maybe_finalize_async_calls(blocking=blocking)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error ranks may disagree, and a collective would hang.
        if error is None:
            self.finish()
        self._sealer.shutdown()

    def _sharded_content(self, step: int) -> dict[str, Any]:
        state, parallel = self._state, self._parallel
        content = _sharded_state(state, is_loading=False)
        share_out(content, parallel)
        scores = state.window.state(step)
        content["old_log_probs"] = {}
        if parallel.is_last_stage:
            content["old_log_probs"] = sharded_window(scores, self._loader, parallel, scores=scores)
        content["rng"] = _sharded_rng(parallel)
        content |= {"scheduler": state.scheduler.state_dict(), "window_steps": sorted(scores)}
        content["window_start"] = state.window.start
        if state.clipped_tokens is not None:
            content["clipped_tokens"] = state.clipped_tokens.state()
        return content

    def _state_bytes(self) -> int:
        """About what a checkpoint takes, over all ranks."""
        total = torch.tensor(
            state_bytes(self._state, self._parallel), dtype=torch.float64, device=self._parallel.device
        )
        dist.all_reduce(total)
        return int(total)

    def _seal(self, target: Path, step: int) -> None:
        content = {
            "version": VERSION,
            "step": step,
            "identity": dict(self._identity),
            "settings": dict(self._settings),
            "layout": _layout(self._parallel),
            **({BEGAN_WITH_BASE: True} if self._began_with_base else {}),
        }

        def seal() -> None:
            try:
                self._table.write()
                sealed.seal(target, content)
                folders.remove_older(self._folder, self._keep_last)
            except OSError as error:
                sealed.discard(target)
                raise storage_error(error, _write_failed(str(error), target)) from error

        if self._parallel.is_main:  # in a thread: the disk's confirmation and the removal of files take their time
            self._sealing = self._sealer.submit(seal)

    def _begin(self, target: Path) -> Path:
        """Makes the folder to write in, where there is room for what is to come, once the one before is sealed."""
        self._wait_for_seal()
        staging = sealed.begin(target)
        free_bytes = shutil.disk_usage(staging).free
        if free_bytes < self._needed_bytes:
            sealed.discard(target)
            raise InfrastructureError(
                f"save ({target.parent}) must have room for a checkpoint, about {self._needed_bytes / 2**30:.2g} GiB, "
                f"and has {free_bytes / 2**30:.2g} GiB; the checkpoints before it are intact; make room and start again"
            )
        return staging

    def _wait_for_seal(self) -> None:
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            sealing.result()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Says what a checkpoint failed of, and removes its remains."""
        try:
            yield
        except CheckpointException as error:  # raised by all ranks, with the causes on rank 0
            causes = [cause for cause, _ in error.failures.values()]
            on_rank_zero(lambda: self._give_up(causes))
        except (EOFError, ConnectionError) as error:
            raise RankError(
                f"rank {self._parallel.rank}: save: the process that writes {self._target} is gone ({error!r}); the "
                "checkpoints before it are intact; start again"
            ) from error
        except (OSError, RuntimeError) as error:  # torch.save answers a full disk with the latter
            raise RankError(f"rank {self._parallel.rank}: {_write_failed(str(error), self._target)}") from error

    def _give_up(self, causes: Sequence[BaseException]) -> NoReturn:
        sealed.discard(self._target)
        cause = causes[0]
        text = _write_failed(str(cause), self._target)
        raise storage_error(cause, text) if isinstance(cause, OSError) else InfrastructureError(text)


def _write_failed(cause: str, target: Path) -> str:
    return (
        f"save: a checkpoint could not be written ({cause}); those before it are intact; fix the folder, or make room "
        f"in it, and start again: {target}"
    )


def _plan(content: dict[str, Any], staging: Path, *, is_first: bool) -> AsyncRequest:
    """What each rank is to write into which of its files: the tensors themselves, which must not change until they are
    copied or written.

    Whether all ranks' parts make whole tensors is asked before a process's first checkpoint, which the others repeat:
    for it every rank hears of every other's tensors, and rank 0 compares them.
    """
    _own_storages(content)
    return dist_checkpointing.save(
        content,
        str(staging),
        content_metadata=dict(_METADATA),
        async_sharded_save=True,
        validate_access_integrity=is_first,
        **save_options(),
    )


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Python's garbage collector looks at nothing but what comes in this context. Megatron-Core calls it while it
    describes an optimizer's state, and it would walk all objects of the process, some tenths of a second."""
    if _is_frozen():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@cache
def _is_frozen() -> bool:
    """Whether objects were frozen by somebody else, who wants them so. Asked once, as Python counts them one by one."""
    return gc.get_freeze_count() > 0


def _own_storages(content: dict[str, Any]) -> None:
    """Makes what is part of a tensor on the CPU one of its own, over the same memory: Megatron-Core would copy it while
    training waits."""
    for value in nested_values(content):
        data = value.data if isinstance(value, ShardedTensor) else None
        if data is not None and data.device.type == "cpu":
            value.data = with_own_storage(data.detach())


def _write(write: Callable[..., None], staging: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """Megatron-Core's writing of this rank's files, and their checksums; in the background both."""
    with _without_crc32(), forks_end_with_parent():
        write(*args, **kwargs)
    sealed.leave_sums(staging, rank)


@contextmanager
def _without_crc32() -> Iterator[None]:
    """`torch.save` takes half its time for a CRC-32 that nothing reads; the marker has the SHA-256 of every file."""
    takes_crc32 = get_crc32_options()
    set_crc32_options(compute_crc32=False)
    try:
        yield
    finally:
        set_crc32_options(takes_crc32)
