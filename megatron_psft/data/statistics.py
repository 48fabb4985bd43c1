"""What a run trains on, in figures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class DatasetStatistics:
    """Counts over the records of one epoch; lengths and counts in tokens. `str()` is the table to log."""

    name: str
    weight: float | None
    """Passes over the source per epoch; None for several sources together."""
    records: int
    tokens: int
    label_tokens: int
    length_p50: int
    length_p90: int
    length_p99: int
    length_max: int
    truncated: int
    dropped: Mapping[str, int]
    """Records of the source that are left out, by reason."""
    sources: tuple["DatasetStatistics", ...] = ()
    """The same for each source, where there are several."""

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("", "passes", "records", "tokens", "labels", "median", "p90", "p99", "longest")]
        rows += [_cells(part) for part in (*self.sources, self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        for part in self.sources or (self,):
            dropped = ", ".join(f"{count:,} {reason}" for reason, count in part.dropped.items()) or "none"
            lines.append(f"{part.name}: truncated: {part.truncated:,}; dropped: {dropped}")
        return "\n".join(lines)


def _cells(part: DatasetStatistics) -> tuple[str, ...]:
    counts = (part.records, part.tokens, part.label_tokens)
    lengths = (part.length_p50, part.length_p90, part.length_p99, part.length_max)
    passes = "" if part.weight is None else f"{part.weight:g}"
    return (part.name, passes, *(f"{count:,}" for count in (*counts, *lengths)))


def count_records(
    name: str,
    *,
    weight: float | None,
    lengths: NDArray[np.int64],
    label_tokens: int,
    truncated: int,
    dropped: Mapping[str, int],
    sources: Sequence[DatasetStatistics] = (),
) -> DatasetStatistics:
    """Statistics of records of these `lengths` (int64 [records], one at least)."""
    # An actual record's length each, no interpolation.
    p50, p90, p99, longest = np.quantile(lengths, [0.5, 0.9, 0.99, 1.0], method="inverted_cdf")
    return DatasetStatistics(
        name=name,
        weight=weight,
        records=len(lengths),
        tokens=int(lengths.sum()),
        label_tokens=label_tokens,
        length_p50=int(p50),
        length_p90=int(p90),
        length_p99=int(p99),
        length_max=int(longest),
        truncated=truncated,
        dropped=dropped,
        sources=tuple(sources),
    )


def add_up(parts: Sequence[DatasetStatistics], lengths: NDArray[np.int64]) -> DatasetStatistics:
    """The statistics of all `parts` together, whose records have these `lengths`."""
    if len(parts) == 1:
        return parts[0]
    return count_records(
        "all",
        weight=None,
        lengths=lengths,
        label_tokens=sum(part.label_tokens for part in parts),
        truncated=sum(part.truncated for part in parts),
        dropped=sum((Counter(part.dropped) for part in parts), Counter()),
        sources=parts,
    )
