"""The table of all tensors in a checkpoint's files (`.metadata`): who has written which part of what, and where."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from megatron.core.dist_checkpointing.strategies import state_dict_saver
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint import Metadata, SavePlan
from torch.distributed.checkpoint.api import _is_wrapped_exception
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.utils import _DistWrapper


class Table:
    """Of a run's checkpoints, one at a time. Megatron-Core has rank 0 make it while all ranks wait: of their plans
    before anything is written, and on the disk in the end."""

    def __init__(self) -> None:
        self._write: Callable[[], None] | None = None

    @contextmanager
    def planned(self, *, is_first: bool) -> Iterator[None]:
        """Has each rank plan by itself in this context, and keep its plan until it tells what it has written.

        Args:
            is_first: of this process. Then rank 0 hears of all plans before, too, and compares each part of a tensor
                with every other: for Qwen3-30B-A3B, of whose experts there are thousands, that takes more than a
                minute. Later checkpoints repeat what was found whole.
        """
        with _replaced(state_dict_saver, "_DistWrapper", partial(_Words, is_first=is_first)):
            yield

    @contextmanager
    def left_to_be_written(self) -> Iterator[None]:
        """Has Megatron-Core leave the table to `write`, as it completes a checkpoint in this context."""
        finish = FileSystemWriterAsync.finish

        def keep(writer: FileSystemWriterAsync, _: Metadata, told: list[bytes]) -> None:
            self._write = partial(_write, partial(finish, writer), told)

        with _replaced(FileSystemWriterAsync, "finish", keep):
            yield

    def write(self) -> None:
        """Writes the table of the checkpoint that was completed last; on rank 0.

        Raises:
            OSError: it could not be written.
        """
        assert self._write is not None
        write, self._write = self._write, None
        write()


class _Words(_DistWrapper):
    """What ranks tell rank 0 of one checkpoint: their plans along with what they have written. Rank 0 looks at it when
    nobody waits for it, as neither any rank's plan nor its writing hangs on the others'."""

    def __init__(self, *arguments: Any, is_first: bool) -> None:
        super().__init__(*arguments)
        self._is_first = is_first
        self._plan: SavePlan | None = None

    def gather_object(self, object: Any) -> list[Any] | None:
        if isinstance(object, SavePlan):
            self._plan = object
            return super().gather_object(object) if self._is_first else []
        is_error = _is_wrapped_exception(object)
        return super().gather_object(object if is_error else pickle.dumps((self._plan, object)))


def _write(finish: Callable[[Metadata, list[Any]], None], told: list[bytes]) -> None:
    plans, results = map(list, zip(*map(pickle.loads, told), strict=True))
    _, metadata = create_default_global_save_plan(plans)
    vars(metadata)["all_local_plans"] = plans  # as Megatron-Core has it
    finish(metadata, results)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
