"""The two passes over a block of logits that softmax and its gradient take, in PyTorch and in Triton."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_psft.head.kernels import portable
from megatron_psft.head.kernels.portable import GradientFactors, ShardSums

_MOVED_ROWS = 32  # at a time: what lies between is small beside a chunk


class ShardPasses(NamedTuple):
    """An implementation; both functions may write to the memory of their first argument."""

    sums: Callable[[Tensor, Tensor], tuple[Tensor, ShardSums]]
    """`logits` `[n, v]` and `label_index` `[n]` to what `gradient` needs in place of the logits, and the sums of
    `portable.shard_sums_`."""
    gradient: Callable[[Tensor, Tensor | None, GradientFactors, Tensor], Tensor]
    """The former; the row that comes to each place of the result, `[a]` int64, or None for all where they are; factors
    of these rows, `[a]`; and memory whose dtype the result has, `[a, v]`, the gradient of their logits, and in which it
    may be. That memory may be the first argument's, if a row then moves only into the place of one that comes to none;
    else rows keep their order."""


def shard_passes(device: torch.device) -> ShardPasses:
    """The Triton kernels on CUDA, plain PyTorch elsewhere."""
    if device.type == "cuda":
        from megatron_psft.head.kernels.fused import shard_gradient, shard_sums  # Triton is there where CUDA is

        return ShardPasses(shard_sums, shard_gradient)
    return ShardPasses(_portable_sums, _portable_gradient)


def _portable_sums(logits: Tensor, label_index: Tensor) -> tuple[Tensor, ShardSums]:
    values = logits.float()  # the logits themselves where they are fp32
    return values, portable.shard_sums_(values, label_index)


def _portable_gradient(values: Tensor, order: Tensor | None, factors: GradientFactors, out: Tensor) -> Tensor:
    if order is not None:
        moved = (order != torch.arange(len(order), device=order.device)).nonzero().squeeze(1)
        for places in moved.split(_MOVED_ROWS):
            values[places] = values[order[places]]
        values = values[: len(order)]
    # Without gaps between bf16 rows: a CPU's product may read what is there and add zero times that, which is not zero
    # where it is no number.
    return portable.shard_gradient_(values, factors).to(out.dtype)
