"""Files -> one flat array of token ids with label masks, in memory."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_psft.data.chat import ChatRenderer, Example, LossOn, Rendering
from megatron_psft.data.records import BadRecord, Record, RecordError, iter_records, raise_or_report
from megatron_psft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["drop", "truncate", "error"]

_RECORDS_AT_ONCE = 256  # enough to keep the tokenizer's threads busy, little enough to hold
_NAMED_RECORDS = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DatasetStatistics:
    """What a run trains on; lengths and counts in tokens. `str()` is the line to log."""

    records: int
    tokens: int
    label_tokens: int
    length_p50: int
    length_p90: int
    length_max: int
    truncated: int
    dropped: Mapping[str, int]
    """Records left out, by reason."""

    def __str__(self) -> str:
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "none"
        return (
            f"{self.records} records, {self.tokens} tokens, {self.label_tokens} of them labels; lengths: "
            f"median {self.length_p50}, 90th percentile {self.length_p90}, longest {self.length_max}; "
            f"truncated: {self.truncated}; dropped: {dropped}"
        )


@dataclass(frozen=True, kw_only=True)
class TokenizedDataset:
    """Records as token ids. Record i is [offsets[i], offsets[i + 1]) of `tokens` (int32 [total]) and `label_mask`
    (bool [total], true where a token is to be predicted; never at a record's first). `offsets`: int64 [records + 1]."""

    tokens: NDArray[np.int32]
    label_mask: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    truncated: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        record = slice(self.offsets[index], self.offsets[index + 1])
        return Example(tokens=self.tokens[record], label_mask=self.label_mask[record])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each record, int64 [records]."""
        return np.diff(self.offsets)

    def statistics(self) -> DatasetStatistics:
        """Counts for the log."""
        # An actual record's length each, no interpolation.
        p50, p90, longest = np.quantile(self.lengths, [0.5, 0.9, 1.0], method="inverted_cdf")
        return DatasetStatistics(
            records=len(self),
            tokens=len(self.tokens),
            label_tokens=int(self.label_mask.sum()),
            length_p50=int(p50),
            length_p90=int(p90),
            length_max=int(longest),
            truncated=self.truncated,
            dropped=self.dropped,
        )

    def fingerprint(self) -> str:
        """A hash over every token and label: a run resumes only on the data that it was started with."""
        digest = hashlib.sha256()
        for array in (self.offsets, self.tokens, self.label_mask):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def build_dataset(
    paths: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seq_length: int,
    overlong: Overlong,
    prompt_key: str,
    completion_key: str,
    loss_on: LossOn,
    skip_bad_records: bool,
    show_progress: bool,
) -> TokenizedDataset:
    """Reads, renders and tokenizes the records of `paths`, in order. Bad records that are skipped are logged.

    A record of more than `seq_length` tokens is over-long: "drop" leaves it out, "truncate" cuts it on the right and
    leaves it out where no label remains, "error" refuses the data.

    Raises UserError: unreadable data, unfit tokenizer, bad records unless skipped, over-long records with "error", no
    usable record.
    """
    renderer = ChatRenderer(tokenizer, loss_on)
    items = iter_records(paths, prompt_key=prompt_key, completion_key=completion_key)
    progress = tqdm(items, desc="tokenizing", unit=" records", disable=not show_progress)
    sources: list[str] = []
    examples: list[Example] = []
    bad: list[BadRecord] = []
    for record, result in _tokenize(progress, renderer):
        if isinstance(result, BadRecord):
            bad.append(result)
        else:
            sources.append(record.source)
            examples.append(result)
    if not bad and not examples:
        raise UserError(f"data ({', '.join(paths)}) holds no record; name files that hold at least one")
    if report := raise_or_report(bad, len(bad) + len(examples), skip_bad_records):
        logger.warning(report)
    dropped = Counter(f"bad: {record.reason}" for record in bad)
    return _fit(sources, examples, dropped, seq_length=seq_length, overlong=overlong)


def _tokenize(
    items: Iterable[Record | BadRecord], renderer: ChatRenderer
) -> Iterator[tuple[Record | BadRecord, Example | BadRecord]]:
    """Each item with its example, or with why there is none; in order, many at once for the tokenizer's threads."""
    items = iter(items)
    while chunk := list(islice(items, _RECORDS_AT_ONCE)):
        results = [_render(item, renderer) for item in chunk]
        examples = iter(renderer.tokenize([result for result in results if isinstance(result, Rendering)]))
        for item, result in zip(chunk, results, strict=True):
            yield item, result if isinstance(result, BadRecord) else next(examples)


def _render(item: Record | BadRecord, renderer: ChatRenderer) -> Rendering | BadRecord:
    if isinstance(item, BadRecord):
        return item
    try:
        return renderer.render(item)
    except RecordError as error:
        return BadRecord(source=item.source, reason=error.reason, detail=error.detail)


def _fit(
    sources: Sequence[str], examples: Sequence[Example], dropped: Counter[str], *, seq_length: int, overlong: Overlong
) -> TokenizedDataset:
    """The examples that fit, one after the other; the others are truncated, added to `dropped`, or refused."""
    if overlong == "error":
        _refuse_overlong(sources, examples, seq_length)
    kept: list[Example] = []
    truncated = 0
    for example in examples:
        is_long = len(example.tokens) > seq_length
        cut = Example(tokens=example.tokens[:seq_length], label_mask=example.label_mask[:seq_length])
        if is_long and overlong == "drop":
            dropped["over-long"] += 1
        elif not cut.label_mask.any():
            dropped["without a label in seq_length"] += 1
        else:
            kept.append(cut)
            truncated += is_long
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UserError(f"data holds no usable record: {reasons}; seq_length ({seq_length}) may be too small")
    return TokenizedDataset(
        tokens=np.concatenate([example.tokens for example in kept]),
        label_mask=np.concatenate([example.label_mask for example in kept]),
        offsets=np.cumsum([0, *(len(example.tokens) for example in kept)], dtype=np.int64),
        truncated=truncated,
        dropped=dropped,
    )


def _refuse_overlong(sources: Sequence[str], examples: Sequence[Example], seq_length: int) -> None:
    lengths = [len(example.tokens) for example in examples]
    named = [f"{source} ({n} tokens)" for source, n in zip(sources, lengths, strict=True) if n > seq_length]
    if named:
        raise UserError(
            f"data must hold no record of more than seq_length ({seq_length}) tokens with --overlong error, found "
            f"{len(named)} in {len(examples)}: {', '.join(named[:_NAMED_RECORDS])}; raise --seq-length, or choose "
            "--overlong drop or truncate"
        )
