"""Who computes which pack of a global batch: data-parallel ranks, and the micro-batches of each. Pure NumPy.

A pack of the global batch is known by its number in it. What is dealt out is a list for each rank, of a list of numbers
for each of its micro-batches: as many on every rank, the last ones empty where there is nothing left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_psft.data.packing import best_fit
from megatron_psft.distributed.grid import Parallel

Dealt = list[list[list[int]]]
"""Numbers of packs, by rank and micro-batch."""

EqualRows = Literal["of a step", "of a micro-batch", "none"]
"""Which rows must have the same length, the longest one's: all of a step, as in a pipeline, or those that all ranks
compute at a time, as where they exchange tokens with each other's experts."""


@dataclass(frozen=True, kw_only=True)
class ByTokens:
    """What a layout asks of rows that are dealt out by tokens."""

    equal_rows: EqualRows = "none"
    multiple_of: int = 1
    """What the number of a rank's micro-batches is a multiple of."""

    @classmethod
    def of(cls, parallel: Parallel) -> "ByTokens":
        """What goes through a pipeline has one shape; ranks that share experts wait for each other's rows anyway."""
        equal_rows: EqualRows = "of a micro-batch" if parallel.expert_size * parallel.expert_tensor_size > 1 else "none"
        return cls(
            equal_rows="of a step" if parallel.pipeline_size > 1 else equal_rows,
            multiple_of=parallel.pipeline_size if parallel.virtual_size > 1 else 1,
        )


_EVEN_ENOUGH = 1e-3
"""How far the fullest part may be above the mean before exchanges are looked for."""
_MAX_EXCHANGES = 64


def in_order(count: int, *, ranks: int, per_rank: int, size: int) -> Dealt:
    """Rank d has the d-th `per_rank` packs, in micro-batches of `size` consecutive ones; the last ranks have fewer, or
    none, where there are only `count`."""
    return [
        [list(range(first, min(first + size, count))) for first in range(start, start + per_rank, size)]
        for start in range(0, ranks * per_rank, per_rank)
    ]


def by_tokens(lengths: NDArray[np.int64], *, ranks: int, room: int, multiple_of: int = 1) -> Dealt:
    """Ranks get about the same number of tokens each, and rows as full and as few as will do.

    Args:
        lengths: tokens of each pack, int64 [packs], none above `room`. Which packs a rank gets depends on nothing but
            these and `ranks`.
        ranks: data-parallel ranks.
        room: tokens that a micro-batch's row holds.
        multiple_of: what the number of a rank's micro-batches is a multiple of.
    """
    assert len(lengths) == 0 or lengths.max() <= room
    own = evened_out(lengths, ranks)
    fewest = max([1, *(-(-int(lengths[numbers].sum()) // room) for numbers in own)])
    count = -(-fewest // multiple_of) * multiple_of
    while True:
        rows = [_rows(lengths, numbers, count, room) for numbers in own]
        dealt = [row for row in rows if row is not None]
        if len(dealt) == ranks:
            return dealt
        count += multiple_of


def _rows(lengths: NDArray[np.int64], numbers: Sequence[int], count: int, room: int) -> list[list[int]] | None:
    """A rank's packs in `count` rows of `room` tokens, the longest row first; None if they are not found to fit."""
    own = np.array(numbers, dtype=np.int64)
    rows = [own[part] for part in evened_out(lengths[own], count)]
    if any(lengths[row].sum() > room for row in rows):
        plan = best_fit(lengths[own], room)
        if len(plan) > count:
            return None
        rows = [own[plan.records[first:stop]] for first, stop in zip(plan.offsets, plan.offsets[1:], strict=False)]
    rows.sort(key=lambda row: -int(lengths[row].sum()))
    return [sorted(row.tolist()) for row in rows] + [[] for _ in range(count - len(rows))]


def evened_out(lengths: NDArray[np.int64], parts: int) -> list[list[int]]:
    """Deals numbers out so that the greatest sum of their `lengths` is small: the longest first, each to the part with
    least, then exchanges with the fullest part as long as one makes it smaller.

    To find the smallest is NP-hard. On lengths as of real records this is within 1 % of what no deal can beat where a
    part has four or more (benchmarks/packing.py).
    """
    part_of = np.zeros(len(lengths), dtype=np.int64)
    sums = np.zeros(parts, dtype=np.int64)
    for number in np.argsort(-lengths, kind="stable").tolist():
        part_of[number] = sums.argmin()
        sums[part_of[number]] += lengths[number]
    for _ in range(_MAX_EXCHANGES):
        if not _exchange(lengths, part_of, sums):
            break
    return [np.flatnonzero(part_of == part).tolist() for part in range(parts)]


def _exchange(lengths: NDArray[np.int64], part_of: NDArray[np.int64], sums: NDArray[np.int64]) -> bool:
    """Makes the one exchange between the fullest part and another, or move out of it, that leaves least in the fuller
    of the two; False where none helps."""
    top = int(sums.argmax())
    if sums[top] <= sums.mean() * (1 + _EVEN_ENOUGH):
        return False
    inside, outside = np.flatnonzero(part_of == top), np.flatnonzero(part_of != top)
    others = np.flatnonzero(np.arange(len(sums)) != top)
    # What comes back: a number of another part or, with a length of 0, none.
    back = np.concatenate([lengths[outside], np.zeros(len(others), dtype=np.int64)])
    target = np.concatenate([part_of[outside], others])
    moved = lengths[inside][:, None] - back[None, :]
    fuller = np.maximum(sums[top] - moved, sums[target][None, :] + moved)
    best = int(fuller.argmin())
    given, taken = divmod(best, len(back))
    if fuller[given, taken] >= sums[top]:
        return False
    part_of[inside[given]] = target[taken]
    if taken < len(outside):
        part_of[outside[taken]] = top
    sums[target[taken]] += moved[given, taken]
    sums[top] -= moved[given, taken]
    return True
