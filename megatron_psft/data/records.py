"""Raw rows -> chat records; a row that is not one is kept with its place and reason, never dropped in silence.

Which rows are records: `formats.py`. Which keys are read beside those of a format, and which are refused: `keys.py`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.formats import RECORD_FORMATS, RecordKeys, content_of
from megatron_psft.data.keys import KWARGS_KEY, SYSTEM_KEYS, THINKING_KEY
from megatron_psft.data.messages import (
    Message,
    RecordError,
    Turn,
    parse_message,
    parse_template_kwargs,
    parse_tools,
    wrong_type,
)
from megatron_psft.data.sources import open_rows
from megatron_psft.errors import UserError, counted

Parsed = TypeVar("Parsed")

TEXT_REFUSED = "plain text is trained on with --loss-on all only"
"""The reason of a plain text where only conversations are read."""

NOTHING_TO_LEARN = "no assistant turn to learn"
"""The reason of a conversation without a label."""

_LARGEST_ADVANTAGE = 3.4028234663852886e38  # of fp32, in which it is kept

_REPORTED_RECORDS = 20


@dataclass(frozen=True, kw_only=True)
class Record:
    """A conversation with at least one assistant turn, or a plain text, which has no messages. `source` is `path:N`,
    lines or rows counted from 1."""

    messages: tuple[Message, ...] = ()
    source: str
    text: str | None = None
    """Of a plain text, whose every token is a label: all that it says."""
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


def iter_records(paths: Sequence[str], keys: RecordKeys, *, field: str) -> Iterator[Record | BadRecord]:
    """Streams the records of `paths` (see `open_source`) in order. All paths are checked before the first record.

    Raises UserError, which names `field`, the setting that `paths` are of, where a path, or a whole JSON or Parquet
    file, cannot be read.
    """
    for rows in [open_rows(path, field=field) for path in paths]:
        for row in rows:
            yield parse_row(row, keys)


def read_records(
    paths: Sequence[str], keys: RecordKeys | None = None, *, field: str
) -> tuple[list[Record], list[BadRecord]]:
    """All of `iter_records` in memory: (records, bad records), each in file order."""
    records: list[Record] = []
    bad: list[BadRecord] = []
    for item in iter_records(paths, keys or RecordKeys(), field=field):
        if isinstance(item, Record):
            records.append(item)
        else:
            bad.append(item)
    return records, bad


def raise_or_report(
    field: str,
    bad: Sequence[BadRecord],
    counts: Mapping[str, int],
    total: int,
    *,
    skip_bad_records: bool | None,
    lists: Sequence[str] = (),
) -> str:
    """The first 20 bad records by where, then counts by reason; an empty text without bad records.

    `bad` are the first ones at least, `counts` all of them by reason, `lists` the files that name each; `total` counts
    good and bad records. Raises UserError, which names the setting `field`, with that text unless `skip_bad_records`
    (None where no flag says so), and in any case if no good one is left.
    """
    number = sum(counts.values())
    head = f"{number:,} of {counted(total, 'record')} {'is' if number == 1 else 'are'} bad"
    lines = [head, *(f"  {record}" for record in bad[:_REPORTED_RECORDS])]
    if number > _REPORTED_RECORDS:
        lines.append(f"  ... and {number - _REPORTED_RECORDS} more{', all in ' if lists else ''}{', '.join(lists)}")
    lines += [f"  {count} x {reason}" for reason, count in Counter(counts).most_common()]
    report = "\n".join(lines)
    if number == total:
        raise UserError(f"{field} holds no usable record; check the files and the keys of their records: {report}")
    if number and not skip_bad_records:
        remedy = "fix them" if skip_bad_records is None else "fix them or pass --skip-bad-records"
        raise UserError(f"{field} must hold no bad record; {remedy}: {report}")
    return report if number else ""


def read_object(row: object, keys: RecordKeys) -> dict[str, Any]:
    """The row without the keys that are null or ignored, and with what lies under a named key that has dots. Raises
    RecordError for another value."""
    if not isinstance(row, dict):
        raise RecordError("not an object", f"found {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None and key not in keys.ignored}
    for name in (keys.prompt, keys.completion):
        if "." in name and name not in row and (value := _look_up(row, name)) is not None:
            row[name] = value
    return row


def _look_up(row: Mapping[str, object], path: str) -> object:
    """What lies under a path of keys, None where nothing does."""
    value: object = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _parse_value(value: object, source: str, keys: RecordKeys) -> Record:
    row = read_object(value, keys)
    content = content_of(row, RECORD_FORMATS, keys, reason="no known keys")
    advantage = _parse_advantage(row.get("advantage", 1.0))
    if isinstance(content, str):
        if not keys.takes_text:
            raise RecordError(TEXT_REFUSED)
        if keys.system_prompt is not None:
            raise RecordError("plain text has no place for the message of --system-prompt")
        return Record(text=content, source=source, advantage=advantage)
    _refuse_unread_answer(row, content)
    return make_record(row, with_system_prompt(row, content, keys), source, advantage=advantage)


def _refuse_unread_answer(row: Mapping[str, object], turns: Sequence[Turn]) -> None:
    """Raises RecordError for an answer beside a conversation that ends without one."""
    if not turns or turns[-1].message["role"] == "assistant":
        return
    for key in ("completion", "output", "response", "answer"):
        if isinstance(text := row.get(key), str) and all(text not in turn.message["content"] for turn in turns):
            raise RecordError(
                f"row key {key} is not read beside a conversation that ends without an answer: write it as the last "
                f"message; --ignore-keys {key} leaves it out"
            )


def make_record(
    row: Mapping[str, object],
    turns: Sequence[Turn],
    source: str,
    *,
    advantage: float = 1.0,
    prompt_length: int | None = None,
) -> Record:
    """The record of these turns, with what else the row says of it; the prompt is as long as the turns say if
    `prompt_length` is None. Raises RecordError where nothing of it can be learned."""
    if prompt_length is None:
        prompt_length = sum(turn.is_prompt for turn in turns)
    assistants = [index for index, turn in enumerate(turns) if turn.message["role"] == "assistant"]
    if not assistants:
        raise RecordError("no assistant turn")
    if not any(index >= prompt_length and turns[index].is_learned for index in assistants):
        raise RecordError(NOTHING_TO_LEARN, "each belongs to the prompt, or has weight 0, train false or the like")
    return Record(
        messages=tuple(turn.message for turn in turns),
        source=source,
        tools=parse_tools(row.get("tools")),
        advantage=advantage,
        prompt_length=prompt_length,
        unlearned=frozenset(index for index, turn in enumerate(turns) if not turn.is_learned),
        template_kwargs=parse_kwargs(row),
    )


def with_system_prompt(row: Mapping[str, object], turns: tuple[Turn, ...], keys: RecordKeys) -> tuple[Turn, ...]:
    """`turns` with the system message first, if there is one. Raises RecordError for two that differ."""
    if keys.system_prompt is not None:
        text, turns = keys.system_prompt, tuple(turn for turn in turns if turn.message["role"] != "system")
    elif not (text := _system_text(row)) or _has_system(row, turns, text):
        return turns
    is_prompt = bool(turns) and turns[0].is_prompt
    return (parse_message({"role": "system", "content": text}, "system")._replace(is_prompt=is_prompt), *turns)


def _system_text(row: Mapping[str, object]) -> str:
    texts = {key: text for key in SYSTEM_KEYS if key in row and (text := row[key]) != ""}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise wrong_type(key, text)
    if len({*texts.values()}) > 1:
        raise RecordError("two system messages", f"under {' and '.join(texts)}")
    return str(next(iter(texts.values()), ""))


def _has_system(row: Mapping[str, object], turns: Sequence[Turn], text: str) -> bool:
    """True where the turns have this system message themselves."""
    own = [turn.message["content"].strip() for turn in turns if turn.message["role"] == "system"]
    if own and own != [text.strip()]:
        keys = " ".join(key for key in SYSTEM_KEYS if key in row)
        raise RecordError(
            "two system messages", f"of row and messages; --ignore-keys {keys} keeps that of the messages"
        )
    return bool(own)


def parse_kwargs(row: Mapping[str, object]) -> dict[str, Any]:
    """A row's own variables for the chat template. Raises RecordError."""
    if KWARGS_KEY not in row and THINKING_KEY not in row:
        return {}
    kwargs = parse_template_kwargs(row.get(KWARGS_KEY), KWARGS_KEY)
    thinking = row.get(THINKING_KEY)
    if thinking is None:
        return kwargs
    if not isinstance(thinking, bool):
        raise RecordError("wrong type", f"{THINKING_KEY} is {type(thinking).__name__}, not true or false")
    if kwargs.get(THINKING_KEY, thinking) != thinking:
        raise RecordError(f"two values of {THINKING_KEY}", f"one of the row and one in its {KWARGS_KEY}")
    return {**kwargs, THINKING_KEY: thinking}


def _parse_advantage(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError("wrong type", f"advantage is {type(value).__name__}, not a number")
    if not abs(value) <= _LARGEST_ADVANTAGE:  # nor is NaN
        raise RecordError("advantage is not finite in fp32", f"found {value!r:.40}")
    return float(value)
