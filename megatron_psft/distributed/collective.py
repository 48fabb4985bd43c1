"""What ranks do together so that a failure of one is everybody's, or at least says whom it waited for."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from megatron_psft import sealed
from megatron_psft.distributed.grid import Parallel
from megatron_psft.errors import InfrastructureError, RankError, UserError, first_line, storage_error

Result = TypeVar("Result")

_PATIENCE = timedelta(days=7)


def on_every_rank(action: Callable[[], Result]) -> Result:
    """Runs `action` on every rank and makes its failure everybody's.

    A `UserError` or `InfrastructureError` on any rank, say a file missing on one node, raises on all ranks with the
    text of the lowest failing rank, so that none waits in a collective for the others.
    """
    result, failure = None, None
    try:
        result = action()
    except (UserError, InfrastructureError) as error:
        failure = _shared(error)
    failures: list[_Failure | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for found in failures:
        if found is not None:
            _raise(found)
    return result  # type: ignore[return-value]


def on_rank_zero(action: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Runs `action` on rank 0 and returns its result on every rank; its `UserError` or `InfrastructureError` is
    everybody's, and an `OSError` is one of these (`storage_error`). Collective over `group`, or all ranks, which wait
    as long as its timeout says."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except (UserError, InfrastructureError) as error:
            box[1] = _shared(error)
        except OSError as error:
            box[1] = _shared(storage_error(error, str(error)))
    dist.broadcast_object_list(box, group=group)
    result, failure = box
    if failure is not None:
        _raise(failure)
    return result


_Failure = tuple[type[UserError] | type[InfrastructureError], str]
"""An error as it travels to the other ranks."""


def _shared(error: UserError | InfrastructureError) -> _Failure:
    return (UserError if isinstance(error, UserError) else InfrastructureError), str(error)


def _raise(failure: _Failure) -> NoReturn:
    kind, text = failure
    raise kind(text)


@contextmanager
def patient_group() -> Iterator[dist.ProcessGroup]:
    """All ranks, on the CPU, for waiting for what may take hours; collective at both ends."""
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    yield group
    dist.destroy_process_group(group)


def sum_over_context(values: torch.Tensor, parallel: Parallel) -> torch.Tensor:
    """Adds up what each context-parallel rank has, on the rank's device and in the place of `values` where they are
    there; collective over these ranks."""
    return _sum(values, parallel, parallel.context_size, parallel.context_group)


def sum_over_replicas(values: torch.Tensor, parallel: Parallel) -> torch.Tensor:
    """As `sum_over_context`, over all ranks that hold the same weights: data-parallel and context-parallel ones."""
    size = parallel.data_size * parallel.context_size
    return _sum(values, parallel, size, parallel.replica_group(for_experts=False))


def _sum(values: torch.Tensor, parallel: Parallel, size: int, group: dist.ProcessGroup) -> torch.Tensor:
    if size == 1:
        return values
    values = values.to(parallel.device)
    dist.all_reduce(values, group=group)
    return values


@contextmanager
def naming_lost_peers(doing: str) -> Iterator[None]:
    """Raises `RankError` where a collective fails, since a peer hangs or is gone: says which one, while doing what.
    A rank that is out of memory has lost nobody, also where a collective asked for it."""
    try:
        yield
    except RuntimeError as error:
        collective = _collective_in(error.__traceback__)
        if collective is None or is_out_of_memory(error):
            raise
        reason = first_line(error)
        raise RankError(
            f"rank {_own_rank()}: {doing}: {collective} failed, as another rank hangs or is gone; see its output; "
            f"distributed_timeout_minutes says how long to wait: {reason}"
        ) from error


_OUT_OF_MEMORY = (
    "CUDA error: out of memory",  # the first allocation of all, or a library's
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",  # NCCL's, for the buffers of a communicator
    "DefaultCPUAllocator: can't allocate memory",
)
"""The words of errors that have no type of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, has less memory than was asked for."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def _own_rank() -> str:
    """Also where the group has been taken down since."""
    return str(dist.get_rank()) if dist.is_initialized() else os.environ.get("RANK", "0")


_COLLECTIVES = "torch/distributed/distributed_c10d.py"


_PIPELINE = "megatron/core/pipeline_parallel/p2p_communication.py"


def _collective_in(trace: TracebackType | None) -> str | None:
    """The innermost collective that a traceback went through, as `torch.distributed` names it."""
    found = None
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename.endswith((_COLLECTIVES, _PIPELINE)):
            found = code.co_name
        trace = trace.tb_next
    return found


def damage_on_any_rank(folder: Path) -> str | None:
    """What is wrong with a sealed folder, if anything is; every rank reads its share of the files. Collective."""
    world_size = dist.get_world_size()
    found: list[str | None] = [None] * world_size
    dist.all_gather_object(found, sealed.first_damage(folder, part=dist.get_rank(), parts=world_size))
    return next((text for text in found if text is not None), None)
