"""How records lie in the rows of a micro-batch, and which positions of them a context-parallel rank has. Pure NumPy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_psft.distributed.context_split import aligned_length, context_positions


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """Where the records of a micro-batch stand in its rows, `[rows, seq_length]` before any split."""

    rows: int
    seq_length: int
    starts: Sequence[int]
    """Of each record, counted through the rows one after the other."""
    segments: tuple[int, ...] | None
    """Lengths of the parts of the one row that must not see each other: a record with its padding each, and what pads
    the row last. None where records have rows of their own."""
    held: NDArray[np.int64]
    """Positions of a row that this context-parallel rank has, in its order."""

    def fill(self, arrays: Sequence[NDArray], *, padding: float | bool, of_token: tuple[int, ...] = ()) -> NDArray:
        """Lays one array per record, e.g. its labels, into the rows; returns this rank's part, `[rows, len(held)]`, and
        behind these the shape of what there is `of_token`."""
        dtype = arrays[0].dtype if arrays else np.asarray(padding).dtype
        flat = np.full((self.rows * self.seq_length, *of_token), padding, dtype=dtype)
        for start, values in zip(self.starts, arrays, strict=True):
            flat[start : start + len(values)] = values
        return flat.reshape(self.rows, self.seq_length, *of_token)[:, self.held]

    def positions(self) -> NDArray[np.int64]:
        """Position of each token within its segment or row, of this rank's part."""
        lengths = self.segments or [self.seq_length] * self.rows
        positions = np.concatenate([np.arange(length) for length in lengths])
        return positions.reshape(self.rows, self.seq_length)[:, self.held]


def separate_rows(count: int, *, rows: int, seq_length: int) -> RowLayout:
    """A row for each of `count` records, padded on the right; further rows are all padding."""
    return RowLayout(
        rows=rows,
        seq_length=seq_length,
        starts=range(0, count * seq_length, seq_length),
        segments=None,
        held=np.arange(seq_length),
    )


def packed_row(lengths: Sequence[int], *, seq_length: int, context_rank: int = 0, context_size: int = 1) -> RowLayout:
    """All records in one row, each padded to what context-parallel ranks split evenly.

    The padding behind a record belongs to its segment: causality alone keeps it out of every real token's sight.
    Attention kernels could be told apart the two by a second set of bounds, but under context parallelism Transformer
    Engine's then miss keys at the seams (TransformerEngine#3331). The row's own padding is a segment by itself: it
    lengthens no record, and none of its positions is left uncomputed, as whatever memory holds would reach the weights'
    gradients.
    """
    aligned = [aligned_length(length, context_size) for length in lengths]
    padding = seq_length - sum(aligned)
    assert padding >= 0
    segments = (*aligned, padding) if padding else tuple(aligned)
    starts = np.cumsum([0, *aligned])[:-1].tolist()
    held = context_positions(segments, context_rank, context_size)
    return RowLayout(rows=1, seq_length=seq_length, starts=starts, segments=segments, held=held)
