"""Rows of a parameter as parts of a checkpoint's tensors, cut wherever they are to be."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor


def tensors_of(
    template: ShardedTensor | ShardedTensorFactory, *, key: str | None = None, dtype: torch.dtype | None = None
) -> list[ShardedTensor]:
    """A parameter in the checkpoint, without data: one tensor, or several, as of a gated MLP, whose rows follow one
    another in the parameter.

    Args:
        template: the parameter, as Megatron-Core describes it.
        key: to call it by; its own if None.
        dtype: to store it in; its own if None.
    """
    key, dtype = key or template.key, dtype or template.data.dtype
    if isinstance(template, ShardedTensor):
        return [replace(template, key=key, data=None, dtype=dtype)]
    shape = torch.empty(template.data.shape, dtype=dtype, device="meta")
    built = template.build_fn(key, shape, template.replica_id, None)
    tensors = list(nested_values(built if isinstance(built, dict) else dict(enumerate(built))))
    assert sum(tensor.local_shape[0] for tensor in tensors) == len(shape), f"{key} is not cut along its rows"
    return [tensor.without_data() for tensor in tensors]


def cut(
    tensors: Sequence[ShardedTensor], first: int, end: int, data: Tensor | None, *, replica: int = 0
) -> Iterator[ShardedTensor]:
    """Rows [first, end) of a parameter.

    Args:
        tensors: of `tensors_of`.
        first: of the parameter's rows, which are those of its first dimension.
        end: the row after the last one.
        data: these rows, contiguous; None to be loaded.
        replica: among the data-parallel ranks; 0 writes them.
    """
    row = 0
    for tensor in tensors:
        count, *rest = tensor.local_shape
        start, stop = max(first, row), min(end, row + count)
        if start < stop:
            rows = None if data is None else data[start - first : stop - first]
            yield _piece(tensor, start - row, (stop - start, *rest), rows, replica)
        row += count


def _piece(
    tensor: ShardedTensor, first: int, shape: tuple[int, ...], data: Tensor | None, replica: int
) -> ShardedTensor:
    offset = list(tensor.global_offset)
    offset[tensor.prepend_axis_num] += first
    shape = (*(1,) * tensor.prepend_axis_num, *shape)  # Megatron-Core takes uneven cuts with all their axes only
    pipeline, tensor_rank, _ = tensor.replica_id
    return replace(
        tensor,
        data=None if data is None else data.view(shape),
        local_shape=shape,
        global_offset=tuple(offset),
        axis_fragmentations=None,
        prepend_axis_num=0,
        replica_id=(pipeline, tensor_rank, replica),
    )
