"""The two passes over a block of logits as Triton kernels: each reads the logits once.

In PyTorch the first pass alone sweeps them six times. `portable` has the same functions, and is what these are tested
against, under Triton's interpreter where there is no GPU.
"""

# mypy: disallow-untyped-defs=False
import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_psft.head.kernels.portable import GradientFactors, ShardSums

# Columns that a program takes at a time, and its warps. Not measured so far.
SUMS_SHAPE = GRADIENT_SHAPE = (4096, 8)

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def shard_sums(logits: Tensor, label_index: Tensor) -> tuple[Tensor, ShardSums]:
    """`portable.shard_sums_` for logits of any float dtype, which it returns as they are.

    Args:
        logits: `[n, v]`, contiguous along v.
        label_index: `[n]` int64.
    """
    num_rows, num_columns = logits.shape
    sums = ShardSums(*torch.empty(5, num_rows, dtype=torch.float32, device=logits.device))
    if num_rows:
        block, warps = SUMS_SHAPE
        _sums_kernel[(num_rows,)](
            logits, label_index, *sums, logits.stride(0), num_columns, block=block, num_warps=warps
        )
    return logits, sums


def shard_gradient(logits: Tensor, order: Tensor | None, factors: GradientFactors, out: Tensor) -> Tensor:
    """What `ShardPasses.gradient` says, from the logits as `shard_sums` leaves them; returns `out`."""
    num_rows, num_columns = out.shape
    if num_rows and num_columns:
        block, warps = GRADIENT_SHAPE
        rows = torch.arange(num_rows, device=out.device) if order is None else order
        _gradient_kernel[num_rows, triton.cdiv(num_columns, block)](
            logits, out, rows, *factors, logits.stride(0), out.stride(0), num_columns, block=block, num_warps=warps
        )
    return out


@triton.jit
def _sums_kernel(
    logits,
    label_index,
    maximum_out,
    others_out,
    label_weight_out,
    weighted_out,
    label_logit_out,
    row_stride,
    num_columns,
    block: tl.constexpr,
):
    """One row in one sweep: sums relative to the maximum so far, rebased when it grows."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_index + row)
    maximum = tl.full((), _LOWEST, tl.float32)
    others = tl.zeros((), tl.float32)
    total = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    for first in range(0, num_columns, block):
        columns = first + tl.arange(0, block)
        inside = columns < num_columns
        values = tl.load(logits + row * row_stride + columns, mask=inside, other=_LOWEST).to(tl.float32)
        higher = tl.maximum(maximum, tl.max(values, axis=0))
        shift = maximum - higher
        rebase = tl.exp(shift)
        shifted = tl.where(inside, values - higher, 0.0)
        weights = tl.where(inside, tl.exp(shifted), 0.0)
        # Nothing so far, or nothing that counts: the shift may be infinite, and its product with zero no number.
        weighted = tl.where(rebase > 0, (weighted + shift * total) * rebase, 0.0) + tl.sum(shifted * weights, axis=0)
        total = total * rebase + tl.sum(weights, axis=0)
        # 1 - p and log p of a confident token are made of the rest, in which the label's weight would drown it.
        others = others * rebase + tl.sum(tl.where(columns == label, 0.0, weights), axis=0)
        maximum = higher
    owned = (label >= 0) & (label < num_columns)
    label_logit = tl.load(logits + row * row_stride + label, mask=owned, other=0.0).to(tl.float32)
    tl.store(maximum_out + row, maximum)
    tl.store(others_out + row, others)
    tl.store(label_weight_out + row, tl.where(owned, tl.exp(label_logit - maximum), 0.0))
    tl.store(weighted_out + row, weighted)
    tl.store(label_logit_out + row, label_logit)


@triton.jit
def _gradient_kernel(  # noqa: PLR0913
    logits,
    out,
    order,
    maximum,
    scale,
    label_gradient,
    label_index,
    row_stride,
    out_stride,
    num_columns,
    block: tl.constexpr,
):
    """A block of one row. Where `out` is the logits' own memory, no other program reads what this one writes: a row
    either stays where it is, or moves into the place of one that is not read."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < num_columns
    source = tl.load(order + row)
    values = tl.load(logits + source * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.exp(values - tl.load(maximum + row)) * tl.load(scale + row)
    gradient = tl.where(columns == tl.load(label_index + row), tl.load(label_gradient + row), gradient)
    tl.store(out + row * out_stride + columns, gradient.to(out.dtype.element_ty), mask=inside)
