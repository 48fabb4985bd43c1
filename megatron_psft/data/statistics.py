"""What a run trains on, in figures."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_psft.config.schema import Config
from megatron_psft.data.example import NO_NOTES, Notes
from megatron_psft.data.packing import PackPlan
from megatron_psft.errors import counted


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
    selection: str = ""
    """Which files of the source are read, and which are left out and why; empty for a file."""
    notes: Notes = NO_NOTES
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
        lines += [part.selection for part in self.sources or (self,) if part.selection]
        for part in self.sources or (self,):
            dropped = ", ".join(f"{count:,} {reason}" for reason, count in part.dropped.items()) or "none"
            lines.append(f"{part.name}: truncated: {part.truncated:,}; dropped: {dropped}")
            lines += [f"{part.name}: {note}" for note in _describe(part.notes)]
        return "\n".join(lines)


def describe_packing(plan: PackPlan, config: Config) -> str:
    """How records share rows: a line to log."""
    if not config.packs_each_step:
        return f"packing: {plan}"
    size, room = config.batch.global_batch_size, config.batch.micro_batch_size * plan.capacity
    return (
        f"packing: the {counted(size, 'record')} of a step among themselves, "
        f"{counted(size * plan.lengths.mean(), 'token', ',.0f')} on average, into rows of at most {room:,}"
    )


def describe_passes(
    packs: int, unit: Literal["pack", "record"], *, global_batch_size: int, train_iters: int | None, epochs: int | None
) -> str:
    """How often a run takes each record: lines to log.

    Args:
        packs: of an epoch.
        unit: what one is called.
        global_batch_size: packs of a step.
        train_iters: steps of the run; None where it is not known.
        epochs: passes that were asked for; None where steps were.
    """
    lines = []
    if train_iters is not None:
        taken = train_iters * global_batch_size
        times, rest = divmod(taken, packs)
        more = f", those of {counted(rest, unit)} once more" if rest else ""
        lines.append(
            f"{counted(train_iters, 'step')} of {counted(global_batch_size, unit)} "
            f"{'makes' if train_iters == 1 else 'make'} {counted(taken / packs, 'pass', '.4g')} over "
            f"the {counted(packs, unit)} of an epoch: each record {counted(times, 'time')}{more}"
        )
        if epochs is not None and taken > epochs * packs:
            lines.append(
                f"the last global batch begins another pass: {counted(taken - epochs * packs, unit)} more than "
                f"{epochs} x {packs:,} fill it"
            )
    if packs < global_batch_size:
        lines.append(
            f"an epoch is less than a global batch, {packs:,} of {counted(global_batch_size, unit)}: each step takes "
            f"each record {counted(global_batch_size / packs, 'time', '.4g')}; lower --global-batch-size"
        )
    return "\n".join(lines)


def _cells(part: DatasetStatistics) -> tuple[str, ...]:
    counts = (part.records, part.tokens, part.label_tokens)
    lengths = (part.length_p50, part.length_p90, part.length_p99, part.length_max)
    passes = "" if part.weight is None else f"{part.weight:g}"
    return (part.name, passes, *(f"{count:,}" for count in (*counts, *lengths)))


def _describe(notes: Notes) -> list[str]:
    """A line for each count that is not 0."""
    texts = {
        "without_reasoning": "assistant turns that are no labels, as the chat template drops their reasoning "
        "(--keep-reasoning trains on them)",
        "special_tokens": "records with special tokens in their text, which become control tokens "
        "(--split-special-tokens keeps them text)",
        "cut_blanks": "answers whose first blanks would join the prompt's last token, and are kept apart",
        "joined_blanks": "answers whose first blanks are no labels, in one token with the prompt's end",
        "extra_sequences": "sequences beyond one for each record, of turns that need their own to keep their reasoning",
    }
    return [f"{texts[name]}: {count:,}" for name, count in notes._asdict().items() if count]


def count_records(
    name: str,
    *,
    weight: float | None,
    lengths: NDArray[np.int64],
    label_tokens: int,
    truncated: int,
    dropped: Mapping[str, int],
    notes: Notes = NO_NOTES,
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
        notes=notes,
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
        notes=functools.reduce(Notes.plus, (part.notes for part in parts)),
        sources=parts,
    )
