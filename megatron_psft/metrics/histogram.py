"""Percentiles over the label tokens of all ranks, from counts in fixed bins that one all-reduce adds up.

A bin is a range of log-ratios that grows with their distance from 0: its middle is within 0.14 % + 2e-7 of each
log-ratio in it. A ratio in [0.5, 2] is so known to 0.1 %, and one near 1 much better. Counts do not depend on which
rank counts which token, and so percentiles do not depend on the layout.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_psft.objectives.ratio import MAX_LOG_RATIO

_FINEST = 1e-4  # log-ratios; nearer to 0 than this bins are of about one width, further out it grows in proportion
_STEP = 0.0028  # width of a bin, as a share of the distance of its log-ratios from 0
_FURTHEST = math.ceil(math.log1p(MAX_LOG_RATIO / _FINEST) / _STEP)
NUM_BINS = 2 * _FURTHEST + 1


def count_bins(log_ratios: Tensor) -> Tensor:
    """How many of the log-ratios `[n]` are in each bin: `[NUM_BINS]` fp64, which is exact up to 2^53. One that is not
    finite is in the first or last one."""
    scaled = (log_ratios.abs() / _FINEST).log1p() / _STEP
    places = scaled.nan_to_num(nan=_FURTHEST).clamp(max=_FURTHEST).round().copysign(log_ratios)
    return torch.bincount(places.long() + _FURTHEST, minlength=NUM_BINS).double()


def percentiles(counts: Tensor, percents: Sequence[int]) -> list[float]:
    """The log-ratio at each of these percentiles by nearest rank, as the middle of its bin; 0 where nothing was
    counted.

    Args:
        counts: `[NUM_BINS]`, added up over ranks.
        percents: above 0.
    """
    below = counts.cumsum(0)
    total = int(below[-1])
    if not total:
        return [0.0] * len(percents)
    ranks = [math.ceil(percent * total / 100) for percent in percents]
    places = torch.searchsorted(below, below.new_tensor(ranks)) - _FURTHEST
    return [math.copysign(_FINEST * math.expm1(abs(place) * _STEP), place) for place in places.tolist()]
