"""Megatron-Core's background writing of checkpoints by a process that shares nothing with training but a copy.

Megatron-Core forks the trainer. A fork shares all memory until either side writes to it and then copies it page by
page, which slows the steps that follow by more than a plain copy costs. Here what is to be written is copied once, into
memory that both processes map, and the writer is forked from a small server that has done nothing but its imports.
"""

import mmap
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from time import time
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest, TemporalAsyncCaller
from torch import Tensor

from megatron_psft.checkpoint.staging import Staging
from megatron_psft.distributed.orphans import end_with_parent, without_main_script

_ALIGNMENT_BYTES = 64


class BackgroundCalls(AsyncCallsQueue):
    """Megatron-Core's queue of writers, which are started from the server. Once started, the server sees no signal that
    its starter blocks."""

    def __init__(self, device: torch.device) -> None:
        """Starts what can be started before a first save.

        Args:
            device: that training computes on.
        """
        super().__init__()
        self._tensors, self._plan = SharedMemory(), SharedMemory()
        self._staging = Staging(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(int)  # started now: where ranks outnumber cores, a save waits long until a new one runs
        # What takes seconds to import is imported once, while training begins.
        multiprocessing.set_forkserver_preload([f"megatron_psft.checkpoint.{name}" for name in ("server", "saver")])
        with _environment_of_server():
            forkserver.ensure_running()

    def wait_for_copy(self) -> None:
        """Returns when all is copied, and what was scheduled may change."""
        for call in self.async_calls:
            call.async_caller.wait_for_copy()

    def _get_async_caller(self) -> "_Caller":
        return _Caller(self._tensors, self._plan, self._staging, self._thread)


class SharedMemory:
    """Room for copies of tensors, shared with the processes that it is passed to. It has no name, and so leaves nothing
    behind, however its processes end."""

    def __init__(self) -> None:
        self._file, self.nbytes = _owned(os.memfd_create("checkpoint")), 0
        self._map: mmap.mmap | None = None

    def copies(self, tensors: Iterable[Tensor], staging: Staging | None = None) -> list["SharedTensor"]:
        """Copies tensors, those of a GPU by `staging`; what was copied before is lost."""
        tensors, shared, size = list(tensors), [], 0
        for tensor in tensors:
            shared.append(SharedTensor(offset=size, shape=tensor.shape, dtype=tensor.dtype))
            size += -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if size > self.nbytes:
            self._file.truncate(size)
            self._map, self.nbytes = None, size
        pairs = [(tensor, self.open(copy)) for copy, tensor in zip(shared, tensors, strict=True)]
        if staging is not None:
            staging.copy(pair for pair in pairs if pair[0].is_cuda)
        # In one thread: more would be done sooner, but take time from the pass that goes on meanwhile.
        for tensor, copy in pairs:
            if staging is None or not tensor.is_cuda:
                copy.copy_(tensor.detach())
        return shared

    def open(self, shared: "SharedTensor") -> Tensor:
        """The copy, with a storage of its own."""
        if not shared.shape.numel():
            return torch.empty(shared.shape, dtype=shared.dtype, device="cpu")
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), self.nbytes)
        count = shared.shape.numel()
        return torch.frombuffer(self._map, dtype=shared.dtype, count=count, offset=shared.offset).view(shared.shape)

    def __getstate__(self) -> tuple[Any, int]:
        return DupFd(self._file.fileno()), self.nbytes

    def __setstate__(self, state: tuple[Any, int]) -> None:
        file, self.nbytes = state
        self._file, self._map = _owned(file.detach()), None


_ENVIRONMENT = {
    # Megatron-Core's import gives some, which the trainer has filtered.
    "PYTHONWARNINGS": "ignore",
    # Nor does an import, as Transformer Engine's, open a context on the first GPU, where rank 0 needs the memory.
    "CUDA_VISIBLE_DEVICES": "",
}


@contextmanager
def _environment_of_server() -> Iterator[None]:
    """Processes that are started in this context, and those that they start, print no warnings and see no GPU."""
    previous = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _owned(descriptor: int) -> BinaryIO:
    """A file that is closed, and so gives its memory back, when nobody holds it any more."""
    return open(descriptor, "r+b", buffering=0)


@dataclass(frozen=True, kw_only=True)
class SharedTensor:
    """Where a copy lies: bytes from the start of the memory, and what they are."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


class _Caller(TemporalAsyncCaller):
    """One writer. What it writes is copied in a thread, next to the forward and backward pass, which change none of
    it."""

    def __init__(
        self, tensors: SharedMemory, plan: SharedMemory, staging: Staging | None, thread: ThreadPoolExecutor
    ) -> None:
        super().__init__()
        self._tensors, self._plan, self._staging, self._thread = tensors, plan, staging, thread
        self._starting: Future[None] | None = None

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        if async_req.async_fn is None:  # this rank has nothing to write
            return
        self.start_time = time()
        if self._staging is not None:
            self._staging.follow()
        self._starting = self._thread.submit(self._start, async_req)

    def _start(self, request: AsyncRequest) -> None:
        rank, buckets, results = request.async_fn_args
        tensors = (tensor for *_, (_, pairs) in buckets for _, tensor in pairs)
        copies = iter(self._tensors.copies(tensors, self._staging))
        buckets = _with_tensors(buckets, lambda _: next(copies))
        # Not as an argument: more than a pipe holds would have us wait until the process reads it.
        pickled = torch.frombuffer(bytearray(pickle.dumps(buckets)), dtype=torch.uint8)
        plan = _Plan(memory=self._plan, pickled=self._plan.copies([pickled])[0])
        self.process = multiprocessing.get_context("forkserver").Process(
            target=_write, args=(request.async_fn, self._tensors, plan, rank, results)
        )
        with without_main_script():
            self.process.start()

    def wait_for_copy(self) -> None:
        if self._starting is not None:
            self._starting.result()

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        self.wait_for_copy()
        return super().is_current_async_call_done(blocking, no_dist)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Megatron-Core's buckets of what goes into which file, with a `SharedTensor` for every tensor."""

    memory: SharedMemory
    pickled: SharedTensor

    def buckets(self) -> list[Any]:
        return pickle.loads(self.memory.open(self.pickled).numpy().tobytes())


def _write(write: Callable[..., None], tensors: SharedMemory, plan: _Plan, rank: int, results: Any) -> None:
    end_with_parent()
    # Takes what training leaves of a CPU. At the lowest `nice` its two processes still delay the trainer's.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    torch.set_num_threads(1)
    write(rank, _with_tensors(plan.buckets(), tensors.open), results)


def _with_tensors(buckets: Iterable[Any], change: Callable[[Any], Any]) -> list[Any]:
    """Megatron-Core's buckets with `change` of every tensor in its place."""
    return [
        (file, key, (texts, [(item, change(tensor)) for item, tensor in pairs]))
        for file, key, (texts, pairs) in buckets
    ]
