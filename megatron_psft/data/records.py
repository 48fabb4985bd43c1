"""Raw rows -> chat records; a row that is not one is kept with its place and reason, never dropped in silence.

Which rows are records: `formats.py`. Beside the keys of a format, `system` is the system message, `tools` holds the
schemas of functions, as a list or as its JSON text, and `advantage` is the record's weight in a policy gradient.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_psft.data.files import BadRecord, Row, open_rows
from megatron_psft.data.formats import RECORD_FORMATS, RecordKeys, messages_of
from megatron_psft.data.messages import (
    Message,
    RecordError,
    parse_message,
    parse_tools,
    refuse_unsupported,
    wrong_type,
)
from megatron_psft.errors import UserError

Parsed = TypeVar("Parsed")

_LARGEST_ADVANTAGE = 3.4028234663852886e38  # of fp32, in which it is kept

_UNSUPPORTED_KEYS = ("functions", "history", "images", "videos", "audios")
"""Keys that change what has to be learned: training as if they were not there would be silently wrong."""

_REPORTED_RECORDS = 20


@dataclass(frozen=True, kw_only=True)
class Record:
    """A conversation with at least one assistant turn. `source` is `path:N`, lines or rows counted from 1."""

    messages: tuple[Message, ...]
    source: str
    tools: tuple[dict[str, Any], ...] = ()
    """Schemas of the functions that the assistant may call."""
    advantage: float = 1.0
    prompt_length: int = 0
    """Leading messages of which nothing is learned, be they an assistant's: those of a prompt, the system message
    among them. 0 where the row does not say what is prompt."""
    unlearned: frozenset[int] = frozenset()
    """Indices of the `messages` that are marked as not to be learned (`weight` 0, `train` false and the like). No token
    of theirs is a label, whatever `loss_on` says."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the chat template: the row's `chat_template_kwargs` and `enable_thinking`. They win over the
    run's."""


def parse_row(row: Row | BadRecord, keys: RecordKeys) -> Record | BadRecord:
    """The record that a row is, or why it is not one."""
    return parse_with(lambda value, source: _parse_value(value, source, keys), row)


def parse_with(parse: Callable[[object, str], Parsed], row: Row | BadRecord) -> Parsed | BadRecord:
    """What `parse` makes of a row's value and source, or why it makes nothing: the `RecordError` that it raises."""
    if isinstance(row, BadRecord):
        return row
    try:
        return parse(row.value, row.source)
    except RecordError as error:
        return BadRecord(source=row.source, reason=error.reason, detail=error.detail)


def iter_records(paths: Sequence[str], keys: RecordKeys) -> Iterator[Record | BadRecord]:
    """Streams the records of `paths` (see `files.open_source`) in order. All paths are checked before the first record.

    Raises UserError where a path, or a whole JSON or Parquet file, cannot be read.
    """
    for rows in [open_rows(path) for path in paths]:
        for row in rows:
            yield parse_row(row, keys)


def read_records(paths: Sequence[str], keys: RecordKeys | None = None) -> tuple[list[Record], list[BadRecord]]:
    """All of `iter_records` in memory: (records, bad records), each in file order."""
    records: list[Record] = []
    bad: list[BadRecord] = []
    for item in iter_records(paths, keys or RecordKeys()):
        if isinstance(item, Record):
            records.append(item)
        else:
            bad.append(item)
    return records, bad


def raise_or_report(
    bad: Sequence[BadRecord], counts: Mapping[str, int], total: int, skip_bad_records: bool, lists: Sequence[str] = ()
) -> str:
    """The first 20 bad records by where, then counts by reason; an empty text without bad records.

    `bad` are the first ones at least, `counts` all of them by reason, `lists` the files that name each; `total` counts
    good and bad records. Raises UserError with that text unless `skip_bad_records`, and in any case if no good one is
    left.
    """
    number = sum(counts.values())
    lines = [f"{number} of {total} records are bad", *(f"  {record}" for record in bad[:_REPORTED_RECORDS])]
    if number > _REPORTED_RECORDS:
        lines.append(f"  ... and {number - _REPORTED_RECORDS} more{', all in ' if lists else ''}{', '.join(lists)}")
    lines += [f"  {count} x {reason}" for reason, count in Counter(counts).most_common()]
    report = "\n".join(lines)
    if number == total:
        raise UserError(f"data holds no usable record; check the files and the keys of their records: {report}")
    if number and not skip_bad_records:
        raise UserError(f"data must hold no bad record; fix them or pass --skip-bad-records: {report}")
    return report if number else ""


def read_object(row: object) -> dict[str, Any]:
    """The row without the keys that are null. Raises RecordError for another value, and for keys that are not
    supported."""
    if not isinstance(row, dict):
        raise RecordError("not an object", f"found {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None}
    refuse_unsupported(row, _UNSUPPORTED_KEYS)
    return row


def _parse_value(row: object, source: str, keys: RecordKeys) -> Record:
    row = read_object(row)
    messages = with_system_prompt(row, messages_of(row, RECORD_FORMATS, keys, reason="no known keys"), keys)
    if all(message["role"] != "assistant" for message in messages):
        raise RecordError("no assistant turn")
    return Record(
        messages=messages,
        source=source,
        tools=parse_tools(row.get("tools")),
        advantage=_parse_advantage(row.get("advantage", 1.0)),
    )


def with_system_prompt(
    row: Mapping[str, object], messages: tuple[Message, ...], keys: RecordKeys
) -> tuple[Message, ...]:
    """`messages` with the system message first, if there is one. Raises RecordError if both the row and the messages
    have one."""
    if keys.system_prompt is not None:
        others = (message for message in messages if message["role"] != "system")
        return ({"role": "system", "content": keys.system_prompt}, *others)
    system = row.get("system", "")
    if not isinstance(system, str):
        raise wrong_type("system", system)
    if not system:
        return messages
    if any(message["role"] == "system" for message in messages):
        raise RecordError("two system messages", "one under system and one among the messages")
    return (parse_message({"role": "system", "content": system}, "system"), *messages)


def _parse_advantage(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError("wrong type", f"advantage is {type(value).__name__}, not a number")
    if not abs(value) <= _LARGEST_ADVANTAGE:  # nor is NaN
        raise RecordError("advantage is not finite in fp32", f"found {value!r:.40}")
    return float(value)
