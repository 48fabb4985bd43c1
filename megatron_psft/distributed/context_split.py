"""Which positions of a row each context-parallel rank has. Pure NumPy."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def aligned_length(length: int, context_size: int) -> int:
    """A record's length with the padding that lets `context_size` ranks split it."""
    multiple = 2 * context_size if context_size > 1 else 1
    return -(-length // multiple) * multiple


def context_positions(segments: Sequence[int], rank: int, size: int) -> NDArray[np.int64]:
    """Positions of a packed row that context-parallel rank `rank` of `size` holds, int64 [row / size].

    Each segment is cut into `2 * size` chunks, of which a rank has the `rank`-th from the left and from the right: the
    late chunk, whose tokens see much, goes with an early one. It is the split that Megatron-Core's rotary embedding and
    Transformer Engine's attention expect (`thd_get_partitioned_indices`).
    """
    pieces, start = [], 0
    for length in segments:
        chunk, rest = divmod(length, 2 * size)
        assert size == 1 or rest == 0, f"a segment of {length} is not cut evenly by {size} ranks"
        if size == 1:
            pieces.append(np.arange(start, start + length))
        else:
            pieces += [np.arange(start + i * chunk, start + (i + 1) * chunk) for i in (rank, 2 * size - 1 - rank)]
        start += length
    return np.concatenate(pieces)
