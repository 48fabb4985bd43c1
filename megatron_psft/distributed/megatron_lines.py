"""Where the supported lines of Megatron-Core, 0.16 and 0.19, differ. No other file knows."""

import inspect
import multiprocessing
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.managers import SyncManager
from queue import Queue
from typing import Any

from megatron_psft.distributed.orphans import without_main_script


def save_options() -> dict[str, str]:
    """What Megatron-Core's `dist_checkpointing.save` has to be told: from 0.18 on it would hand the writing to another
    package of NVIDIA's."""
    from megatron.core import dist_checkpointing

    knows_strategies = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if knows_strategies else {}


def start_results_server(initializer: Callable[[], None]) -> None:
    """Starts the process through which Megatron-Core's writers of checkpoints answer, with `initializer` called in it:
    the one that Megatron-Core would start goes on for ever when this process is killed."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        with without_main_script():
            manager.start(initializer)
        filesystem_async._results_queue = _PickledQueue(manager.Queue())


class _PickledQueue:
    """What Megatron-Core uses of a queue in a server that looks into nothing: it would import torch to do so, while
    the first save of a run waits for seconds."""

    def __init__(self, queue: Queue[bytes]) -> None:
        self._queue = queue

    def put(self, item: Any) -> None:
        self._queue.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        return pickle.loads(self._queue.get_nowait())


def do_without_engine() -> None:
    """Answers what Megatron-Core asks for in vain where Transformer Engine is absent (0.16)."""
    import megatron.core.optimizer.optimizer_config as optimizer_config
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    optimizer_config.is_te_min_version = lambda version, check_equality=True: False


@contextmanager
def read_with(reader: Callable[[str], Any]) -> Iterator[None]:
    """Has Megatron-Core, and who takes it from there, read checkpoints with `reader` of a folder, in place of torch's
    `FileSystemReader`, as long as this context lasts."""
    from megatron.core.dist_checkpointing.strategies import torch as strategy

    name = "_get_filesystem_reader"
    previous = getattr(strategy, name)
    modules = [module for module in list(sys.modules.values()) if vars(module).get(name) is previous]
    for module in modules:
        setattr(module, name, lambda folder, *_, **__: reader(folder))
    try:
        yield
    finally:
        for module in modules:
            setattr(module, name, previous)
