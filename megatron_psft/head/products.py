"""Matrix products of the fused head, where sums are kept in fp32 whatever the factors are."""

import torch
from torch import Tensor

# Columns of the weight's gradient that are summed at a time on a CPU, where products of bf16 come in bf16 and sums are
# kept in fp32: what lies between is small beside a chunk.
SUMMED_COLUMNS = 16384


def logits_dtype(hidden: Tensor) -> torch.dtype:
    """A GPU's matrix units sum in fp32 and can hand on what they have summed. Rounded to bf16 a logit of 16 is wrong by
    up to 0.06, and so is its label's log-probability. A CPU's products come in the dtype of their factors."""
    return torch.float32 if hidden.is_cuda else hidden.dtype


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`left @ right` in `out`, which may be fp32 on a GPU whatever the factors are."""
    if out.dtype == left.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, where `total` may be fp32 and the factors bf16."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        add_in_pieces_(total, left, right)


def add_in_pieces_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """The same where products come in the dtype of their factors."""
    for start in range(0, len(total), SUMMED_COLUMNS):
        part = slice(start, start + SUMMED_COLUMNS)
        total[part] += left[part] @ right
