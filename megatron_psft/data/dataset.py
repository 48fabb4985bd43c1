"""Tokenized sources -> the records of one epoch: what fits into `seq_length`, as often as each source's weight says."""

import hashlib
import logging
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_psft.config.inputs import DataConfig
from megatron_psft.data.cache import DataCache, TokenizedSource
from megatron_psft.data.chat import RenderSettings
from megatron_psft.data.example import Example, Notes
from megatron_psft.data.formats import DEFAULT_COMPLETION_KEY, RecordKeys
from megatron_psft.data.given import GivenPath, parse_weighted_path
from megatron_psft.data.records import TEXT_REFUSED, raise_or_report
from megatron_psft.data.sources import open_source
from megatron_psft.data.splits import SplitUse
from megatron_psft.data.statistics import DatasetStatistics, add_up, count_records
from megatron_psft.errors import UserError, counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED_RECORDS = 5
_LISTED_BAD_RECORDS = 20
_MAX_WORKERS = 32  # each holds some 260 MiB, nearly all of it libraries

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SourceRecords:
    """The records of one source in an epoch, with repeats. `records`, indices into the source, and `lengths`, in tokens
    after truncation: int64 [records]."""

    source: TokenizedSource
    records: NDArray[np.int64]
    lengths: NDArray[np.int64]
    statistics: DatasetStatistics


class TokenizedDataset:
    """The records of an epoch, source after source. Holds 16 bytes per record; tokens stay on disk."""

    def __init__(self, parts: Sequence[SourceRecords]) -> None:
        self._parts = tuple(parts)
        self._borders = np.cumsum([0, *(len(part.records) for part in parts)]).tolist()

    def __len__(self) -> int:
        return self._borders[-1]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = self.source_of(index)
        part, place = self._parts[number], index - self._borders[number]
        return part.source.example(int(part.records[place]), int(part.lengths[place]))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each record, int64 [records]."""
        return np.concatenate([part.lengths for part in self._parts])

    @property
    def sequence_lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence: int64 [records, 2] where records are pairs, else [records, 1]."""
        lengths = self.lengths
        first = np.concatenate([part.source.index["second_start"][part.records] for part in self._parts])
        if not first.any():
            return lengths[:, None]
        return np.stack([first.astype(np.int64), lengths - first], axis=1)

    @property
    def has_advantages(self) -> bool:
        """Whether any record's advantage is not 1."""
        return any(bool((part.source.index["advantage"][part.records] != 1).any()) for part in self._parts)

    @property
    def num_sources(self) -> int:
        """Paths that the records are of."""
        return len(self._parts)

    def source_of(self, index: int) -> int:
        """Which path a record is of, from 0."""
        return bisect_right(self._borders, index) - 1

    def location(self, index: int) -> str:
        """`path:N`, where a record comes from."""
        number = self.source_of(index)
        part = self._parts[number]
        return part.source.location(int(part.records[index - self._borders[number]]))

    def statistics(self) -> DatasetStatistics:
        """Counts for the log."""
        return add_up([part.statistics for part in self._parts], self.lengths)

    def fingerprint(self) -> str:
        """A hash over every token, label and advantage: a run resumes only on the data that it was started with."""
        digest = hashlib.sha256()
        for part in self._parts:
            digest.update(part.source.content.encode())
            digest.update(part.records.data)
            digest.update(part.lengths.data)
        return digest.hexdigest()


def beyond_positions(field: str, dataset: TokenizedDataset, max_positions: int | None) -> str | None:
    """What to say of records of `field` that have positions the model was not made for, if there are any. In a pack
    each record's positions start over."""
    positions = dataset.sequence_lengths.max(axis=1) - 1  # the last token is a label only
    longest = int(positions.argmax())
    if max_positions is None or positions[longest] <= max_positions:
        return None
    beyond = int((positions > max_positions).sum())
    return (
        f"WARNING: {field}: beyond max_position_embeddings ({max_positions}) of the model's config.json are {beyond:,} "
        f"of {counted(len(dataset), 'record')}, the longest is {dataset.location(longest)} ({positions[longest] + 1} "
        f"tokens): leave them out by --seq-length {max_positions + 1} --overlong drop, or raise "
        "max_position_embeddings there if the model is to learn such positions"
    )


def build_dataset(
    paths: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
    *,
    field: str,
    seed: int,
    show_progress: bool,
    are_pairs: bool = False,
    use: SplitUse = "training",
) -> TokenizedDataset:
    """The records of `paths` (see `parse_weighted_path`), source after source, tokenized or taken from the cache. Bad
    records that are skipped are logged. Errors name `field`, the setting that `paths` are of.

    A record of more than `config.seq_length` tokens is over-long: "drop" leaves it out, "truncate" cuts it on the right
    and leaves it out where no label remains, "error" refuses the data. A weight's fraction is a random part of the
    source, drawn from `seed` once, so that all epochs have the same records. `are_pairs`: records are preference pairs
    (see `pairs.py`), of which the longer sequence counts. `use` says which split of a folder or dataset is meant.

    Raises UserError: unreadable data, unfit tokenizer, bad records unless skipped, over-long records with "error", a
    source without a usable record, a cache that cannot be written.
    """
    if are_pairs:
        _refuse_for_pairs(config)
    weighted = [parse_weighted_path(path, field=field) for path in paths]
    # All of them before the first is tokenized.
    opened = [open_source(item.given.path, field=field, use=use) for item in weighted]
    keys = RecordKeys(
        prompt=config.prompt_key,
        completion=config.completion_key,
        system_prompt=config.system_prompt,
        are_pairs=are_pairs,
        takes_text=config.loss_on == "all",
        ignored=config.ignore_keys,
    )
    cache = DataCache(
        config.data_cache_dir,
        tokenizer,
        keys=keys,
        loss_on=config.loss_on,
        num_workers=config.data_workers or _usable_cores(),
        settings=RenderSettings.of_data(config),
    )
    sources = [cache.open(source, show_progress=show_progress) for source in opened]
    _check_bad_records(sources, GivenPath(field, ", ".join(paths)), config.skip_bad_records)
    if config.overlong == "error":
        _refuse_overlong(sources, config.seq_length, field=field, are_pairs=are_pairs)
    parts = []
    for number, (source, item, read) in enumerate(zip(sources, weighted, opened, strict=True)):
        usable = _select_usable(source, read.given, seq_length=config.seq_length, overlong=config.overlong)
        part = _repeat_by_weight(source, read.given, usable, weight=item.weight, seed=[seed, number])
        parts.append(replace(part, statistics=replace(part.statistics, selection=read.selection)))
    return TokenizedDataset(parts)


def _refuse_for_pairs(config: DataConfig) -> None:
    if config.completion_key != DEFAULT_COMPLETION_KEY:
        raise UserError(f"completion_key ({config.completion_key}) is not supported for preference pairs; unset it")
    if config.overlong == "truncate":
        raise UserError(
            "overlong (truncate) is not supported for preference pairs, whose sequences are compared whole; choose "
            "drop or error"
        )
    if config.loss_on == "all":
        raise UserError(
            "loss_on (all) is not supported for preference pairs, whose prompts are the same; choose assistant or last"
        )


def _usable_cores() -> int:
    """Cores that this process may run on, where the system tells, up to the limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MAX_WORKERS)


def _check_bad_records(sources: Sequence[TokenizedSource], given: GivenPath, skip_bad_records: bool) -> None:
    counts = sum((Counter(source.bad_counts) for source in sources), Counter[str]())
    total = counts.total() + sum(source.num_rows for source in sources)
    if not total:
        raise UserError(f"{given} holds no record; name files that hold at least one")
    bad = list(islice((record for source in sources for record in source.bad_records()), _LISTED_BAD_RECORDS))
    if (texts := counts[TEXT_REFUSED]) and not skip_bad_records:
        first = next(record for source in sources for record in source.bad_records() if record.reason == TEXT_REFUSED)
        raise UserError(
            f"{given.field} must hold conversations only with loss_on assistant or last, found "
            f"{counted(texts, 'plain text')} in {counted(total, 'record')}, the first is {first.source}; "
            "train on every token of both with --loss-on all, or remove them"
        )
    lists = [f"{source.folder}/bad.jsonl" for source in sources if source.bad_counts]
    if report := raise_or_report(given.field, bad, counts, total, skip_bad_records=skip_bad_records, lists=lists):
        logger.warning(report)


@dataclass(frozen=True, kw_only=True)
class _UsableRecords:
    """The records of a source that are trained on: int64 [records] each. `labels` counts label tokens."""

    records: NDArray[np.int64]
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]
    is_truncated: NDArray[np.bool_]
    dropped: Mapping[str, int]


def _select_usable(source: TokenizedSource, given: GivenPath, *, seq_length: int, overlong: str) -> _UsableRecords:
    """The records that fit into `seq_length`; the others are cut, counted in `dropped`, or refused."""
    lengths = source.index["length"].astype(np.int64)
    is_long = _longest_sequences(source) > seq_length
    lengths = np.where(is_long, seq_length, lengths)
    is_dropped = is_long & (overlong == "drop")
    has_no_label = ~is_dropped & (source.index["first_label"] >= lengths)
    dropped = Counter[str]()
    for reason, count in source.bad_counts.items():  # whole in the report of bad records, with the way on
        dropped[f"bad: {re.split('[:;?]', reason)[0]}"] += count
    dropped["over-long"] = int(is_dropped.sum())
    dropped["without a label in seq_length"] = int(has_no_label.sum())
    dropped = Counter({reason: count for reason, count in dropped.items() if count})
    records = np.flatnonzero(~is_dropped & ~has_no_label)
    if not len(source.index) and not source.bad_counts:
        raise UserError(f"{given} holds no record; name files that hold at least one")
    if not len(records):
        reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items())
        raise UserError(f"{given} holds no usable record: {reasons}; seq_length ({seq_length}) may be too small")
    labels = source.index["labels"].astype(np.int64)[records]
    for place in np.flatnonzero(is_long[records]):  # few: only those that are cut
        labels[place] = np.count_nonzero(source.example(int(records[place]), seq_length).label_mask)
    return _UsableRecords(
        records=records,
        lengths=lengths[records],
        labels=labels,
        is_truncated=is_long[records],
        dropped=dropped,
    )


def _longest_sequences(source: TokenizedSource) -> NDArray[np.int64]:
    """Tokens of each record, of a pair's two sequences those of the longer one: int64 [records]."""
    lengths = source.index["length"].astype(np.int64)
    second_start = source.index["second_start"].astype(np.int64)
    return np.maximum(second_start, lengths - second_start)


def _refuse_overlong(sources: Sequence[TokenizedSource], seq_length: int, *, field: str, are_pairs: bool) -> None:
    """Raises UserError where a record does not fit; it names the first ones, and the longest."""
    lengths = [_longest_sequences(source) for source in sources]
    found = [
        (int(of_source[record]), number, int(record))
        for number, of_source in enumerate(lengths)
        for record in np.flatnonzero(of_source > seq_length)
    ]
    if not found:
        return
    longest = max(found, key=lambda each: each[0])
    first = ", ".join(_with_length(sources, each) for each in found[:_NAMED_RECORDS])
    last = "" if longest in found[:_NAMED_RECORDS] else f"; the longest is {_with_length(sources, longest)}"
    raise UserError(
        f"{field} must hold no record of more than seq_length ({seq_length}) tokens with --overlong error, found "
        f"{len(found):,} in {sum(map(len, lengths)):,}: {first}{last}; raise --seq-length to {longest[0]}, or choose "
        f"--overlong drop{'' if are_pairs else ' or truncate'}"
    )


def _with_length(sources: Sequence[TokenizedSource], record: tuple[int, int, int]) -> str:
    length, source, index = record
    return f"{sources[source].location(index)} ({length} tokens)"


def _repeat_by_weight(
    source: TokenizedSource, given: GivenPath, usable: _UsableRecords, *, weight: float, seed: Sequence[int]
) -> SourceRecords:
    """As many passes over the records as `weight` says, in order, and a random part of them for its fraction."""
    count = len(usable.records)
    passes, share = int(weight), weight - int(weight)
    drawn = np.sort(np.random.default_rng(seed).permutation(count)[: round(share * count)])
    taken = np.concatenate([np.tile(np.arange(count), passes), drawn])
    if not len(taken):
        records = counted(count, "record")
        raise UserError(f"{given} takes none of {records} with weight {weight:g}; raise it")
    lengths = usable.lengths[taken]
    return SourceRecords(
        source=source,
        records=usable.records[taken],
        lengths=lengths,
        statistics=count_records(
            source.name,
            weight=weight,
            lengths=lengths,
            label_tokens=int(usable.labels[taken].sum()),
            truncated=int(usable.is_truncated[taken].sum()),
            dropped=usable.dropped,
            notes=Notes(*source.index["notes"][usable.records[taken]].sum(axis=0, dtype=np.int64).tolist()),
        ),
    )
