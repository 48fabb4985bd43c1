"""Which of the ranks that hold the same weights writes which of them, and which reads it for all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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

from megatron_psft.checkpoint.parts import cut, tensors_of
from megatron_psft.distributed.grid import Parallel
from megatron_psft.model.parameters import is_expert

_Replicated: TypeAlias = ShardedTensor | ShardedTensorFactory

_READ = "read for all replicas"


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """Rows [first, end) of a tensor's first dimension, which `rank` of those that hold it writes, or reads."""

    rank: int
    first: int
    end: int


def share_out(content: dict[str, Any], parallel: Parallel) -> None:
    """Has every data-parallel replica write a part of what all hold, instead of the first of them all.

    The ranks agree without a word: they hold the same tensors in the same order, and each writes an equal part of their
    bytes, to a row, wherever that begins. `content` is changed in place: a tensor becomes the parts that it is cut
    into, with names and places as before.
    """
    turns = iter(_turns(_replicated(content), parallel))
    dict_list_map_inplace(
        lambda value: _parts(value, next(turns), parallel) if _is_replicated(value) else value, content
    )


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
    values = _replicated(content)
    turns = _turns(values, parallel)
    replicated, rest = extract_matching_values(content, _is_replicated)
    pairs = zip(values, turns, strict=True)
    parts = {number: _parts(value, of_value, parallel) for number, (value, of_value) in enumerate(pairs)}
    own = extract_matching_values(parts, lambda part: part.replica_id[2] == 0)[0]
    loaded = load({**rest, **(others or {}), _READ: own})
    loaded.pop(_READ, None)
    _exchange(values, turns, parallel)
    dict_list_map_inplace(lambda value: value.data.detach(), replicated)
    return merge(loaded, replicated)


def _replicated(content: Mapping[str, Any]) -> list[_Replicated]:
    return [value for value in nested_values(dict(content)) if _is_replicated(value)]


def _turns(values: Sequence[_Replicated], parallel: Parallel) -> list[list[_Turn]]:
    """Of each tensor who writes or reads which rows, all ranks that hold it about the same number of bytes."""
    totals, written = {True: 0, False: 0}, {True: 0, False: 0}
    sizes = {each: dist.get_world_size(parallel.replica_group(for_experts=each)) for each in totals}
    for value in values:
        totals[is_expert(value.key)] += value.data.nbytes
    turns = []
    for value in values:
        for_experts = is_expert(value.key)
        turns.append(_cut(value, written[for_experts], totals[for_experts], sizes[for_experts]))
        written[for_experts] += value.data.nbytes
    return turns


def _cut(value: _Replicated, start: int, total: int, size: int) -> list[_Turn]:
    """Cuts a tensor that begins at byte `start` of `total`, of which each of `size` ranks has as much."""
    count, width = len(value.data), value.data[0].nbytes
    borders = [min(max(0, round((total * rank // size - start) / width)), count) for rank in range(size + 1)]
    return [
        _Turn(rank=rank, first=first, end=end) for rank, (first, end) in enumerate(pairwise(borders)) if first < end
    ]


def _parts(value: _Replicated, turns: Sequence[_Turn], parallel: Parallel) -> dict[int, ShardedTensor]:
    """The tensor in parts, of which this rank writes or reads those with replica 0."""
    tensors, data = tensors_of(value), value.data.detach()
    group = parallel.replica_group(for_experts=is_expert(value.key))
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    parts = (
        part
        for turn in turns
        for part in cut(tensors, turn.first, turn.end, data[turn.first : turn.end], replica=(rank - turn.rank) % size)
    )
    return dict(enumerate(parts))


@torch.no_grad()
def _exchange(values: Sequence[_Replicated], turns: Sequence[Sequence[_Turn]], parallel: Parallel) -> None:
    """Fills all tensors, of which this rank has read its own rows."""
    for value, of_value in zip(values, turns, strict=True):
        group = parallel.replica_group(for_experts=is_expert(value.key))
        for turn in of_value:
            rows = value.data[turn.first : turn.end]
            there = rows.to(parallel.device).contiguous()
            dist.broadcast(there, group=group, group_src=turn.rank)
            if there is not rows:
                rows.copy_(there)


def _is_replicated(value: Any) -> bool:
    """False of what each rank has rows of its own of; see `sharded_rows.py`."""
    if isinstance(value, ShardedTensor):
        return value.has_regular_grid
    return isinstance(value, ShardedTensorFactory)
