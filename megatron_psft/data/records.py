"""Raw rows -> chat records; a row that is none is kept with its place and reason, never dropped in silence."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, cast, get_args

from megatron_psft.data.files import BadRecord, Row, open_rows
from megatron_psft.errors import UserError, nearest_name_hint

Role = Literal["system", "user", "assistant", "tool"]

DEFAULT_PROMPT_KEY = "prompt"
DEFAULT_COMPLETION_KEY = "completion"
_REFERENCE_COMPLETION_KEYS = ("demonstration", "demostration")
"""Columns of the paper's Parquet files; its script writes the first spelling and its trainer reads the second."""

_UNSUPPORTED_RECORD_KEYS = ("advantage", "tools")
_UNSUPPORTED_MESSAGE_KEYS = ("tool_calls", "function_call", "reasoning_content")
"""Keys that change what has to be learned: training as if they were absent would be silently wrong."""

_REPORTED_RECORDS = 20
_REPORTED_KEYS = 10


class Message(TypedDict):
    """One turn, in the form that chat templates take."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """A conversation with at least one assistant turn. `source` is `path:N`, lines or rows counted from 1."""

    messages: tuple[Message, ...]
    source: str


class RecordError(ValueError):
    """One record cannot be used. `reason` is a fixed text, to be counted over records; `detail` is about this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


def iter_records(
    paths: Sequence[str], *, prompt_key: str = DEFAULT_PROMPT_KEY, completion_key: str = DEFAULT_COMPLETION_KEY
) -> Iterator[Record | BadRecord]:
    """Streams the records of `paths` (see `files.open_rows`) in order. All paths are checked before the first record.

    A row is `{"messages": [{"role", "content"}, ...]}`, or `{prompt_key, completion_key}` with strings or message
    lists, or the paper's `prompt` and `demonstration`. Where a row has both forms, `messages` is taken, unless
    other keys than the defaults were asked for.

    Raises UserError where a path, or a whole JSON or Parquet file, cannot be read.
    """
    for rows in [open_rows(path) for path in paths]:
        for row in rows:
            yield row if isinstance(row, BadRecord) else _parse_row(row, prompt_key, completion_key)


def read_records(
    paths: Sequence[str], *, prompt_key: str = DEFAULT_PROMPT_KEY, completion_key: str = DEFAULT_COMPLETION_KEY
) -> tuple[list[Record], list[BadRecord]]:
    """All of `iter_records` in memory: (records, bad records), each in file order."""
    records: list[Record] = []
    bad: list[BadRecord] = []
    for item in iter_records(paths, prompt_key=prompt_key, completion_key=completion_key):
        if isinstance(item, Record):
            records.append(item)
        else:
            bad.append(item)
    return records, bad


def raise_or_report(bad: Sequence[BadRecord], total: int, skip_bad_records: bool) -> str:
    """The first 20 bad records by place, then counts by reason; an empty text without bad records.

    `total` counts good and bad records. Raises UserError with that text unless `skip_bad_records`, and in any case
    where no good one is left.
    """
    lines = [f"{len(bad)} of {total} records are bad", *(f"  {record}" for record in bad[:_REPORTED_RECORDS])]
    if len(bad) > _REPORTED_RECORDS:
        lines.append(f"  ... and {len(bad) - _REPORTED_RECORDS} more")
    lines += [f"  {count} x {reason}" for reason, count in Counter(record.reason for record in bad).most_common()]
    report = "\n".join(lines)
    if len(bad) == total:
        raise UserError(f"data holds no usable record; check the files and the keys of their records: {report}")
    if bad and not skip_bad_records:
        raise UserError(f"data must hold no bad record; mend them or pass --skip-bad-records: {report}")
    return report if bad else ""


def _parse_row(row: Row, prompt_key: str, completion_key: str) -> Record | BadRecord:
    try:
        messages = _parse_messages(row.value, prompt_key, completion_key)
    except RecordError as error:
        return BadRecord(source=row.source, reason=error.reason, detail=error.detail)
    return Record(messages=messages, source=row.source)


def _parse_messages(row: object, prompt_key: str, completion_key: str) -> tuple[Message, ...]:
    if not isinstance(row, dict):
        raise RecordError("not an object", f"found {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None}  # columnar files spell absent as null
    _refuse_unsupported(row, _UNSUPPORTED_RECORD_KEYS)
    named_by_user = (prompt_key, completion_key) != (DEFAULT_PROMPT_KEY, DEFAULT_COMPLETION_KEY)
    if completion_key == DEFAULT_COMPLETION_KEY and completion_key not in row:
        completion_key = next((key for key in _REFERENCE_COMPLETION_KEYS if key in row), completion_key)
    has_pair = prompt_key in row and completion_key in row
    if has_pair and (named_by_user or "messages" not in row):
        messages = (
            *_message_list(row[prompt_key], prompt_key, "user"),
            *_message_list(row[completion_key], completion_key, "assistant"),
        )
    elif "messages" in row:
        messages = _message_list(row["messages"], "messages", None)
    else:
        raise RecordError("no known keys", _describe_keys(row, prompt_key, completion_key))
    if all(message["role"] != "assistant" for message in messages):
        raise RecordError("no assistant turn")
    return messages


def _message_list(value: object, key: str, role_of_string: Role | None) -> tuple[Message, ...]:
    """Messages of a list; a plain string becomes one message of role `role_of_string` where that is given."""
    if isinstance(value, str) and role_of_string is not None:
        value = [{"role": role_of_string, "content": value}]
    if not isinstance(value, list):
        raise RecordError("wrong type", f"{key} is {type(value).__name__}")
    return tuple(_message(message, f"{key}[{index}]") for index, message in enumerate(value))


def _message(value: object, place: str) -> Message:
    if not isinstance(value, dict):
        raise RecordError("wrong type", f"{place} is {type(value).__name__}, not an object")
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str):
        raise RecordError("wrong type", f"{place} has role of type {type(role).__name__}, not a string")
    if role not in get_args(Role):
        raise RecordError("unknown role", f"{place} has role {role!r:.40}; known: {', '.join(get_args(Role))}")
    _refuse_unsupported(value, _UNSUPPORTED_MESSAGE_KEYS)
    if not isinstance(content, str):
        raise RecordError("wrong type", f"{place} has content of type {type(content).__name__}, not a string")
    if not content.strip() and role != "system":
        raise RecordError("empty content", f"{place}, {role}")
    if "\0" in content:
        raise RecordError("NUL character", place)
    if not _is_unicode(content):
        raise RecordError("lone surrogate", place)
    return {"role": cast(Role, role), "content": content}


def _refuse_unsupported(keyed: Mapping[str, object], keys: Sequence[str]) -> None:
    for key in keys:
        # Empty lists are what columnar files put where a row has no tools; an advantage of 0 is a value.
        if keyed.get(key) not in (None, [], {}, ""):
            raise RecordError(f"{key} is not supported yet")


def _is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can spell and no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _describe_keys(row: Mapping[str, object], prompt_key: str, completion_key: str) -> str:
    names = [str(key) for key in row]
    found = ", ".join(names[:_REPORTED_KEYS]) + (", ..." if len(names) > _REPORTED_KEYS else "") if names else "none"
    wanted = f"wanted: messages, or {prompt_key} and {completion_key}"
    missing = next(key for key in (prompt_key, completion_key) if key not in row)
    return f"keys found: {found}; {wanted}{nearest_name_hint(missing, names) or nearest_name_hint('messages', names)}"
