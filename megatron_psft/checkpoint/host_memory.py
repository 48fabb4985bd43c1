"""What a save takes of host memory, told before a run's first one."""

from collections.abc import Iterable

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_psft.checkpoint.state import TrainState
from megatron_psft.distributed.grid import Parallel
from megatron_psft.distributed.host_memory import require_host_memory
from megatron_psft.model.parameters import is_expert, named_parameters

_FP32 = 4


def saved_bytes(shares: Iterable[float], *, itemsize: int, is_distributed: bool) -> float:
    """What a rank writes of a checkpoint, and so what it copies to host memory.

    Args:
        shares: numbers of elements of the rank's parameters, each divided by the ranks that hold the same.
        itemsize: of a weight, bytes.
        is_distributed: whether the optimizer is, which keeps a copy of fp32 weights too.
    """
    states = 3 if is_distributed or itemsize < _FP32 else 2  # Adam's two averages, and the weights in fp32
    return sum(shares) * (itemsize + states * _FP32)


def state_bytes(state: TrainState, parallel: Parallel) -> float:
    """`saved_bytes` of this rank."""
    shares, itemsize = [], _FP32
    for name, parameter in named_parameters(state.chunks):
        if not parameter.requires_grad:
            continue  # of a model with adapters, which alone are saved
        replicas = parallel.expert_data_size if is_expert(name) else parallel.data_size * parallel.context_size
        shares.append(parameter.numel() / replicas)
        itemsize = parameter.itemsize
    is_distributed = isinstance(state.optimizer.chained_optimizers[0], DistributedOptimizer)
    return saved_bytes(shares, itemsize=itemsize, is_distributed=is_distributed)


def check_room_for_saving(state: TrainState, parallel: Parallel, *, in_background: bool) -> None:
    """Raises UserError, on every rank, where a node has less memory left than its ranks' copies take; collective.

    On a CPU nothing is copied unless it is written in the background.
    """
    is_on_gpu = parallel.device.type == "cuda"
    without = "" if is_on_gpu else ", or save without async_save"
    require_host_memory(
        state_bytes(state, parallel) if is_on_gpu or in_background else 0.0,
        purpose="save: a copy of what a node's ranks write of a checkpoint takes",
        remedy=f"use more nodes, or fewer ranks on each{without}",
        parallel=parallel,
    )
