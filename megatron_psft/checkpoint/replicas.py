"""Which of the ranks that hold the same weights writes which of them."""

from collections.abc import Mapping
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_psft.distributed.grid import Parallel
from megatron_psft.model.parameters import is_expert


def share_out(content: Mapping[str, Any], parallel: Parallel) -> None:
    """Has every data-parallel replica write a part of what all hold, instead of the first of them all.

    The ranks agree without a word: they hold the same tensors in the same order, and each goes to the one of them that
    has least to write so far. `content` is changed in place: tensors keep names and places, and get another
    `replica_id`, of which 0 writes.
    """
    bytes_of = {True: [0] * parallel.expert_data_size, False: [0] * (parallel.data_size * parallel.context_size)}
    for value in nested_values(dict(content)):
        if not isinstance(value, ShardedTensor | ShardedTensorFactory) or not _is_replicated(value):
            continue
        loads = bytes_of[is_expert(value.key)]
        pipeline, tensor, data = value.replica_id
        writer = loads.index(min(loads))
        loads[writer] += value.data.nbytes
        value.replica_id = (pipeline, tensor, (data - writer) % len(loads))


def _is_replicated(value: ShardedTensor | ShardedTensorFactory) -> bool:
    """False of what each rank has rows of its own of; see `sharded_rows.py`."""
    return isinstance(value, ShardedTensorFactory) or value.has_regular_grid
