"""The two passes over a block of logits that softmax and its gradient take, in PyTorch and in Triton."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_psft.head.kernels import portable
from megatron_psft.head.kernels.portable import ShardSums


class ShardPasses(NamedTuple):
    """An implementation; both functions may write to the memory of their first argument."""

    sums: Callable[[Tensor, Tensor], tuple[Tensor, ShardSums]]
    """`logits` `[n, v]` and `label_index` `[n]` to what `gradient` needs in place of the logits, and the sums of
    `portable.shard_sums_`."""
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    """The former and the other arguments of `portable.shard_gradient_` to the gradient of the logits."""


def shard_passes(device: torch.device) -> ShardPasses:
    """The Triton kernels on CUDA, plain PyTorch elsewhere."""
    if device.type == "cuda":
        from megatron_psft.head.kernels.fused import shard_gradient_, shard_sums  # Triton is there where CUDA is

        return ShardPasses(shard_sums, shard_gradient_)
    return ShardPasses(_portable_sums, portable.shard_gradient_)


def _portable_sums(logits: Tensor, label_index: Tensor) -> tuple[Tensor, ShardSums]:
    values = logits.float()  # the logits themselves where they are fp32
    return values, portable.shard_sums_(values, label_index)
