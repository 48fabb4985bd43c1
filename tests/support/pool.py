"""Persistent worker processes for tests of collectives.

Importing torch, Megatron-Core and transformers takes seconds. A fork server does it once and forks up to eight workers
off; these run one test after the other, so that a test on four ranks costs what its collectives cost.
"""

import contextlib
import faulthandler
import gc
import logging
import multiprocessing
import os
import pickle
import secrets
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

MAX_WORKERS = 8
GRACE_SECONDS = 30.0
"""How long the other ranks may go on after one has failed: they usually fail too, as its sockets close."""

_PORTS = range(10_000, 32_000)
_PRELOAD = ["tests.support.preload"]


class WorkerError(AssertionError):
    """One or more ranks raised, died or did not finish; `failures` tells of each by rank, the first one first."""

    def __init__(self, failures: dict[int, str]) -> None:
        self.failures = failures
        ranks = ", ".join(map(str, failures))
        super().__init__(
            "\n\n".join([f"failed on rank {ranks}"] + [f"rank {r}: {text}" for r, text in failures.items()])
        )


@dataclass(frozen=True)
class _Outcome:
    """What a rank's function returned, or the traceback of what it raised."""

    value: Any = None
    error: str | None = None


@dataclass(frozen=True)
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    stack_file: Path

    def kill(self) -> None:
        """Ends the worker, where it still lives, and the helpers it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


class Pool:
    """Workers that are started when first needed, and replaced after one of them failed."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        self._folder = tempfile.TemporaryDirectory(prefix="pool-")
        self._workers: list[_Worker] = []

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 900) -> list[Any]:
        """Calls `function(*args)` on ranks 0 to world_size - 1 in torchrun's environment; returns the results by rank.

        Function, arguments and results are pickled: `function` is defined at the top of a module. No process group is
        set up; one that the function sets up is taken down after it, with what Megatron-Core holds.

        Raises:
            WorkerError: a rank raised or died, or `timeout` seconds were not enough.
        """
        assert 1 <= world_size <= MAX_WORKERS, f"world_size {world_size} is not within 1 and {MAX_WORKERS}"
        workers = self._first_workers(world_size)
        call, port = pickle.dumps((function, args)), _free_port()
        for rank, worker in enumerate(workers):
            worker.connection.send((call, _torchrun_environment(rank, world_size, port)))
        outcomes, lost = _collect(workers, timeout)
        failures = {rank: outcome.error for rank, outcome in outcomes.items() if outcome.error is not None} | lost
        if failures:
            # Even those that live: torch counts process groups, and a rank that failed to join one counts otherwise.
            self._kill()
            raise WorkerError(failures)
        for worker in workers:
            worker.connection.send("every rank is done")
        return [outcomes[rank].value for rank in range(world_size)]

    def close(self) -> None:
        """Ends all workers, gently where they are idle."""
        for worker in self._workers:
            worker.connection.close()
        deadline = time.monotonic() + 5
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
        self._kill()
        self._folder.cleanup()

    def _first_workers(self, count: int) -> list[_Worker]:
        if not all(worker.process.is_alive() for worker in self._workers):
            self._kill()
        started = [self._start_worker() for _ in range(count - len(self._workers))]
        self._workers += started
        for rank in range(count - len(started), count):
            try:
                self._workers[rank].connection.recv()  # it is ready: no call's time is spent on importing
            except EOFError:
                self._kill()
                raise WorkerError({rank: "died before it was ready"}) from None
        return self._workers[:count]

    def _start_worker(self) -> _Worker:
        connection, theirs = self._context.Pipe()
        stack_file = Path(self._folder.name) / f"stack-{time.monotonic_ns()}"
        # Not a daemon: those may not start processes, which saving a checkpoint does.
        process = self._context.Process(target=_serve, args=(theirs, stack_file), daemon=False)
        process.start()
        theirs.close()
        return _Worker(process, connection, stack_file)

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()


def _collect(workers: Sequence[_Worker], timeout: float) -> tuple[dict[int, _Outcome], dict[int, str]]:
    """Waits for the ranks: outcomes in the order of their arrival, and what became of the ranks without one."""
    waiting = dict(enumerate(workers))
    outcomes: dict[int, _Outcome] = {}
    lost: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while waiting:
        # The sentinel too: a helper that a dead worker has left behind may hold its end of the connection open.
        sources = [source for worker in waiting.values() for source in (worker.connection, worker.process.sentinel)]
        if not wait(sources, max(0.0, deadline - time.monotonic())):
            break
        for rank, worker in list(waiting.items()):
            if worker.connection.poll() or not worker.process.is_alive():
                del waiting[rank]
                outcome = _receive(worker)
                if outcome is None:
                    lost[rank] = f"died with exit code {worker.process.exitcode}"
                else:
                    outcomes[rank] = outcome
                if outcome is None or outcome.error is not None:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return outcomes, lost | _stacks(waiting)


def _receive(worker: _Worker) -> _Outcome | None:
    """The worker's outcome, or None where it died without one."""
    try:
        return pickle.loads(worker.connection.recv_bytes()) if worker.connection.poll() else None
    except (EOFError, ConnectionResetError):  # the latter where it died with a message unread
        worker.process.join()
        return None


def _stacks(workers: Mapping[int, _Worker]) -> dict[int, str]:
    """The Python stack of every thread of the workers, now; a process prints it even from within a collective."""
    for worker in workers.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.process.pid, signal.SIGUSR1)
    if workers:
        time.sleep(0.5)
    return {rank: f"did not finish\n{worker.stack_file.read_text()}" for rank, worker in workers.items()}


def _free_port() -> int:
    """Below those that the system hands out: gloo of another pool's ranks would take such a one before ours bind it."""
    while True:
        port = _PORTS.start + secrets.randbelow(len(_PORTS))  # hypothesis seeds `random`, alike in every process
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _torchrun_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _serve(connection: Connection, stack_file: Path) -> None:
    """A worker's life: one call after the other until the pool closes the connection."""
    import torch

    os.setpgrp()  # helpers that a call starts are killed with the worker; Ctrl-C is the pool's affair
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the ranks of the pool compute on the CPU, wherever they run
    gc.freeze()  # collecting after every call need not walk the libraries
    with open(stack_file, "w") as stacks, contextlib.suppress(EOFError):
        faulthandler.register(signal.SIGUSR1, file=stacks)
        connection.send("ready")
        while True:
            call, environment = connection.recv()
            torch.set_num_threads(1)
            with _restored_process():
                os.environ.update(environment)
                outcome = _call(call)
            connection.send_bytes(pickle.dumps(outcome))
            # A rank that succeeded keeps its sockets until all are done; one that failed lets go: that ends the others.
            if outcome.error is not None:
                _take_down()
            connection.recv()
            _take_down()


@contextlib.contextmanager
def _restored_process() -> Iterator[None]:
    """Puts back what a program may change for its process: environment, working directory, logging."""
    environment, folder, logger = dict(os.environ), os.getcwd(), logging.getLogger()
    level, handlers = logger.level, list(logger.handlers)
    yield
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    logger.setLevel(level)
    logger.handlers[:] = handlers


def _call(call: bytes) -> _Outcome:
    try:
        function, args = pickle.loads(call)
        outcome = _Outcome(value=function(*args))
        pickle.dumps(outcome)  # a result that cannot travel is the call's error
    except BaseException:  # SystemExit too: a worker outlives its calls
        return _Outcome(error=traceback.format_exc())
    return outcome


def _take_down() -> None:
    """Forgets everything that torch.distributed and Megatron-Core keep per process."""
    import torch.distributed as dist
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.tensor_parallel import random as megatron_random

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    megatron_random.initialize_rng_tracker(force_reset=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    for each in gc.get_objects():
        if type(each) is DistributedDataParallel:
            # Nodes of autograd, out of the collector's sight, have hooks that hold the wrapper: no model would ever be
            # freed, and every call would be slower than the one before.
            vars(each).clear()
    gc.collect()
    gc.freeze()  # what is left stays: the next collection need not walk it
