"""Which of the ranks that hold the same weights writes which of them, and which reads it for all."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_psft.distributed.grid import Parallel
from megatron_psft.model.parameters import is_expert

_Replicated: TypeAlias = ShardedTensor | ShardedTensorFactory

_READ = "read for all replicas"


def share_out(content: Mapping[str, Any], parallel: Parallel) -> None:
    """Has every data-parallel replica write a part of what all hold, instead of the first of them all.

    The ranks agree without a word: they hold the same tensors in the same order, and each goes to the one of them that
    has least to write so far. `content` is changed in place: tensors keep names and places, and get another
    `replica_id`, of which 0 writes.
    """
    values = [value for value in nested_values(dict(content)) if _is_replicated(value)]
    for value, writer in zip(values, _turns(values, parallel), strict=True):
        pipeline, tensor, data = value.replica_id
        group = parallel.replica_group(for_experts=is_expert(value.key))
        value.replica_id = (pipeline, tensor, (data - writer) % dist.get_world_size(group))


def load_by_turns(
    content: dict[str, Any],
    parallel: Parallel,
    load: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    others: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`load` of `content` and `others`. Of what all data-parallel replicas hold of `content`, each reads a part and
    gets the rest from the others: together they read a checkpoint once, and not once each. Collective.

    Takes no memory besides the tensors of `content`, which are filled in place.
    """
    replicated, rest = extract_matching_values(content, _is_replicated)
    values: list[_Replicated] = list(nested_values(replicated))
    readers = _turns(values, parallel)
    share_out(content, parallel)
    read = {number: value for number, value in enumerate(values) if value.replica_id[2] == 0}
    loaded = load({**rest, **(others or {}), _READ: read})
    tensors = _exchange(values, readers, loaded.pop(_READ, {}), parallel)
    dict_list_map_inplace(lambda _: next(tensors), replicated)
    return merge(loaded, replicated)


def _turns(values: Sequence[_Replicated], parallel: Parallel) -> list[int]:
    """Of each tensor the rank, among those that hold it, that writes or reads it."""
    groups = {for_experts: parallel.replica_group(for_experts=for_experts) for for_experts in (False, True)}
    bytes_of = {for_experts: [0] * dist.get_world_size(group) for for_experts, group in groups.items()}
    turns = []
    for value in values:
        loads = bytes_of[is_expert(value.key)]
        turn = loads.index(min(loads))
        loads[turn] += value.data.nbytes
        turns.append(turn)
    return turns


@torch.no_grad()
def _exchange(
    values: Sequence[_Replicated], readers: Sequence[int], read: Mapping[int, Tensor], parallel: Parallel
) -> Iterator[Tensor]:
    """All tensors, of which this rank has `read` some."""
    for number, (value, reader) in enumerate(zip(values, readers, strict=True)):
        tensor = read.get(number, value.data).detach()
        there = tensor.to(parallel.device).contiguous()
        dist.broadcast(there, group=parallel.replica_group(for_experts=is_expert(value.key)), group_src=reader)
        yield tensor if there is tensor else tensor.copy_(there)


def _is_replicated(value: Any) -> bool:
    """False of what each rank has rows of its own of; see `sharded_rows.py`."""
    if isinstance(value, ShardedTensor):
        return value.has_regular_grid
    return isinstance(value, ShardedTensorFactory)
