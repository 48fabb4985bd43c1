"""The two passes over a block of logits in plain PyTorch: the path on a CPU, and the reference for the Triton kernels.

Both passes work on one rank's columns of the vocabulary and know of no other rank; `vocab_parallel` joins them.
Dimension letters: n rows (label tokens), v columns of the true vocabulary on this rank.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# What a CPU works on at a time: with its scratch copy it fits into a last-level cache of 32 MiB, so that the six sweeps
# of `shard_sums_` read main memory once. Half or twice of it is as good, a single row half as fast.
_CPU_BLOCK_BYTES = 8 * 2**20


class ShardSums(NamedTuple):
    """What one rank's columns say of each row: fp32 `[n]`, exponentials relative to the rank's own `maximum`."""

    maximum: Tensor
    """Largest logit; the lowest finite number where the rank has no columns."""
    others: Tensor
    """Sum of exp(logit - maximum) over all columns but the label's."""
    label_weight: Tensor
    """exp(logit - maximum) of the label, 0 where another rank has it."""
    weighted: Tensor
    """Sum of (logit - maximum) * exp(logit - maximum)."""
    label_logit: Tensor
    """The label's logit, 0 where another rank has it."""


class GradientFactors(NamedTuple):
    """What makes the gradient of a row's logits; `[n]`, fp32 but for the last."""

    maximum: Tensor
    """This rank's, as `shard_sums_` returned it. (Needed where there are still logits: in Triton.)"""
    scale: Tensor
    """The gradient of an unlabelled column is `scale * exp(logit - maximum)`."""
    label_gradient: Tensor
    """The gradient of the label's column."""
    label_index: Tensor
    """As for `shard_sums_`."""


def shard_sums_(logits: Tensor, label_index: Tensor) -> ShardSums:
    """Sums each row, and leaves exp(logit - maximum) in the place of the logits for `shard_gradient_`.

    Args:
        logits: `[n, v]` fp32, finite.
        label_index: `[n]` int64, the label's column on this rank; any number outside of 0 to v - 1 where another rank
            has it.
    """
    num_rows, num_columns = logits.shape
    sums = ShardSums(*logits.new_zeros(5, num_rows))
    if num_columns == 0:
        sums.maximum.fill_(torch.finfo(torch.float32).min)
        return sums
    owned, index = _owned(label_index, num_columns)
    sums.label_logit.copy_(torch.where(owned, logits.gather(1, index).squeeze(1), 0.0))
    scratch = torch.empty_like(logits[: _block_rows(logits)])
    for part in _blocks(logits):
        block = logits[part]
        shifted = scratch[: len(block)]
        maximum = block.amax(dim=1, keepdim=True)
        torch.sub(block, maximum, out=shifted)
        torch.exp(shifted, out=block)
        sums.maximum[part] = maximum.squeeze(1)
        sums.weighted[part] = shifted.mul_(block).sum(dim=1)
        # The label's weight stays out of the sum of the others: 1 - p and log p of a confident token are made of the
        # rest.
        weight = block.gather(1, index[part]).squeeze(1)
        block.scatter_(1, index[part], torch.where(owned[part], 0.0, weight).unsqueeze(1))
        sums.others[part] = block.sum(dim=1)
        sums.label_weight[part] = torch.where(owned[part], weight, 0.0)
        block.scatter_(1, index[part], weight.unsqueeze(1))
    return sums


def shard_gradient_(values: Tensor, factors: GradientFactors) -> Tensor:
    """Turns what `shard_sums_` has left of the logits, `[n, v]`, into their gradient, in place; returns it."""
    if values.shape[1] == 0:
        return values
    owned, index = _owned(factors.label_index, values.shape[1])
    for part in _blocks(values):
        values[part].mul_(factors.scale[part].unsqueeze(1))
    of_label = factors.label_gradient.unsqueeze(1)
    values.scatter_(1, index, torch.where(owned.unsqueeze(1), of_label, values.gather(1, index)))
    return values


def shard_squares(logits: Tensor) -> Tensor:
    """Sum of exp(2 * (logit - maximum)) of each row, `[n, v]` of any float dtype to fp32 `[n]`, with the maximum of
    `ShardSums`; 0 where the rank has no columns."""
    squares = logits.new_zeros(len(logits), dtype=torch.float32)
    if logits.shape[1]:
        for part in _blocks(logits):
            block = logits[part].float()
            squares[part] = (2 * (block - block.amax(dim=1, keepdim=True))).exp_().sum(dim=1)
    return squares


class ShardTop(NamedTuple):
    """Columns of each row."""

    values: Tensor
    """Their logits, fp32 `[n, count]`."""
    columns: Tensor
    """Which they are, int64 `[n, count]`."""


def shard_top(logits: Tensor, count: int) -> ShardTop:
    """The `count` largest logits of each row of `[n, v]`, of any float dtype; -inf stands in for columns that the rank
    lacks."""
    values = logits.new_full((len(logits), count), -torch.inf, dtype=torch.float32)
    columns = torch.zeros_like(values, dtype=torch.int64)
    width = min(count, logits.shape[1])
    for part in _blocks(logits) if width else ():
        top = logits[part].topk(width, dim=1)
        values[part, :width], columns[part, :width] = top.values.float(), top.indices
    return ShardTop(values, columns)


def _owned(label_index: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Whether this rank has the label `[n]`, and a column that is safe to read `[n, 1]`."""
    owned = (label_index >= 0) & (label_index < num_columns)
    return owned, label_index.clamp(0, num_columns - 1).unsqueeze(1)


def _block_rows(values: Tensor) -> int:
    if values.device.type != "cpu":
        return max(len(values), 1)
    return max(1, _CPU_BLOCK_BYTES // (4 * values.shape[1]))


def _blocks(values: Tensor) -> Iterator[slice]:
    size = _block_rows(values)
    return (slice(start, start + size) for start in range(0, len(values), size))
