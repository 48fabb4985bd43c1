"""Raw rows -> chat records; a row that is none is kept with its place and reason, never dropped in silence.

A row has one of these forms; where it has several, the first of this list counts, and a pair of keys that the user has
named counts before all of them:

* `{"messages": [{"role", "content"}, ...]}`
* `{"conversations": [{"from", "value"}, ...]}`, ShareGPT's
* `{"prompt", "completion"}` or the paper's `{"prompt", "demonstration"}`, strings or lists of messages
* `{"instruction", "input", "output"}`, Alpaca's

`system` beside them is the system message. `tools` holds the schemas of functions, as a list or as its JSON
text; calls are `tool_calls` of a message as OpenAI's API has them, or ShareGPT's `function_call` turns. `advantage` is
the record's weight in a policy gradient, a number.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar, cast, get_args

from megatron_psft.data.files import BadRecord, Row, open_rows
from megatron_psft.errors import UserError, nearest_name_hint

Parsed = TypeVar("Parsed")

Role = Literal["system", "user", "assistant", "tool"]

DEFAULT_PROMPT_KEY = "prompt"
DEFAULT_COMPLETION_KEY = "completion"
_REFERENCE_COMPLETION_KEYS = ("demonstration", "demostration")
"""Columns of the paper's Parquet files; its script writes the first spelling and its trainer reads the second."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}

_LARGEST_ADVANTAGE = 3.4028234663852886e38  # of fp32, in which it is kept

_UNSUPPORTED_RECORD_KEYS = ("functions", "history", "images", "videos", "audios")
_UNSUPPORTED_MESSAGE_KEYS = ("function_call",)
"""Keys that change what has to be learned: training as if they were absent would be silently wrong."""

_REPORTED_RECORDS = 20
_REPORTED_KEYS = 10
_REPORTED_CHARACTERS = 40


class _Call(TypedDict):
    type: Literal["function"]
    function: dict[str, Any]


class ToolCall(_Call, total=False):
    """A call as chat templates take it: `function` has a `name`, and `arguments` as an object."""

    id: str


class _Turn(TypedDict):
    role: Role
    content: str


class Message(_Turn, total=False):
    """One turn, in the form that chat templates take. A key that says nothing is absent, since templates ask for it."""

    tool_calls: list[ToolCall]
    reasoning_content: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """A conversation with at least one assistant turn. `source` is `path:N`, lines or rows counted from 1."""

    messages: tuple[Message, ...]
    source: str
    tools: tuple[dict[str, Any], ...] = ()
    """Schemas of the functions that the assistant may call."""
    advantage: float = 1.0
    prompt_length: int = 0
    """Leading messages of which nothing is learned, be they an assistant's."""


@dataclass(frozen=True, kw_only=True)
class RecordKeys:
    """How rows are read. `system_prompt` takes the place of every record's own system message. `are_pairs`: rows are
    preference pairs (see `pairs.py`)."""

    prompt: str = DEFAULT_PROMPT_KEY
    completion: str = DEFAULT_COMPLETION_KEY
    system_prompt: str | None = None
    are_pairs: bool = False

    @property
    def are_named(self) -> bool:
        """True where the user has named keys."""
        return (self.prompt, self.completion) != (DEFAULT_PROMPT_KEY, DEFAULT_COMPLETION_KEY)


class RecordError(ValueError):
    """One record cannot be used. `reason` is a fixed text, to be counted over records; `detail` is about this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


def parse_row(row: Row | BadRecord, keys: RecordKeys) -> Record | BadRecord:
    """The record that a row is, or why it is none."""
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
    good and bad records. Raises UserError with that text unless `skip_bad_records`, and in any case where no good one
    is left.
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
        raise UserError(f"data must hold no bad record; mend them or pass --skip-bad-records: {report}")
    return report if number else ""


def read_object(row: object) -> dict[str, Any]:
    """The row without the keys that are null. Raises RecordError for another value, and for keys that are not
    supported."""
    if not isinstance(row, dict):
        raise RecordError("not an object", f"found {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None}
    _refuse_unsupported(row, _UNSUPPORTED_RECORD_KEYS)
    return row


def _parse_value(row: object, source: str, keys: RecordKeys) -> Record:
    row = read_object(row)
    messages = with_system_prompt(row, _parse_messages(row, keys), keys)
    if all(message["role"] != "assistant" for message in messages):
        raise RecordError("no assistant turn")
    return Record(
        messages=messages,
        source=source,
        tools=parse_tools(row.get("tools")),
        advantage=_parse_advantage(row.get("advantage", 1.0)),
    )


def _parse_messages(row: Mapping[str, object], keys: RecordKeys) -> tuple[Message, ...]:
    completion_key = keys.completion
    if completion_key == DEFAULT_COMPLETION_KEY and completion_key not in row:
        completion_key = next((key for key in _REFERENCE_COMPLETION_KEYS if key in row), completion_key)
    has_pair = keys.prompt in row and completion_key in row
    if not (has_pair and keys.are_named):
        if "messages" in row:
            return message_list(row["messages"], "messages", None)
        if "conversations" in row:
            return message_list(row["conversations"], "conversations", None)
    if has_pair:
        prompt = message_list(row[keys.prompt], keys.prompt, "user")
        return (*prompt, *message_list(row[completion_key], completion_key, "assistant"))
    if "instruction" in row and "output" in row:
        return _alpaca_messages(row)
    raise RecordError("no known keys", _describe_keys(row, keys))


def with_system_prompt(
    row: Mapping[str, object], messages: tuple[Message, ...], keys: RecordKeys
) -> tuple[Message, ...]:
    """Puts first what the system message is. Raises RecordError where both the row and the messages have one."""
    if keys.system_prompt is not None:
        others = (message for message in messages if message["role"] != "system")
        return ({"role": "system", "content": keys.system_prompt}, *others)
    system = row.get("system", "")
    if not isinstance(system, str):
        raise RecordError("wrong type", f"system is {type(system).__name__}")
    if not system:
        return messages
    if any(message["role"] == "system" for message in messages):
        raise RecordError("two system messages", "one under system and one among the messages")
    return (_message({"role": "system", "content": system}, "system"), *messages)


def _alpaca_messages(row: Mapping[str, object]) -> tuple[Message, ...]:
    prompt, output = alpaca_prompt(row), row["output"]
    if not isinstance(output, str):
        raise RecordError("wrong type", f"output is {type(output).__name__}")
    return (prompt, _message({"role": "assistant", "content": output}, "output"))


def alpaca_prompt(row: Mapping[str, object]) -> Message:
    """`instruction`, and `input` if there is any, as the user's message."""
    instruction, given = row["instruction"], row.get("input", "")
    for name, value in (("instruction", instruction), ("input", given)):
        if not isinstance(value, str):
            raise RecordError("wrong type", f"{name} is {type(value).__name__}")
    prompt = f"{instruction}\n{given}" if given else instruction
    return _message({"role": "user", "content": prompt}, "instruction")


def message_list(value: object, key: str, role_of_string: Role | None) -> tuple[Message, ...]:
    """Messages of a list; a plain string becomes one message of role `role_of_string` where that is given."""
    if isinstance(value, str) and role_of_string is not None:
        value = [{"role": role_of_string, "content": value}]
    if not isinstance(value, list):
        raise RecordError("wrong type", f"{key} is {type(value).__name__}")
    return tuple(_message(message, f"{key}[{index}]") for index, message in enumerate(value))


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise RecordError("wrong type", f"{where} is {type(value).__name__}, not an object")
    is_sharegpt = "from" in value and "role" not in value
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    role, content = value.get(role_key), value.get(content_key)
    if not isinstance(role, str):
        raise RecordError("wrong type", f"{where} has {role_key} of type {type(role).__name__}, not a string")
    is_call = is_sharegpt and role == "function_call"
    role = _SHAREGPT_ROLES.get(role, role) if is_sharegpt else role
    if role not in get_args(Role):
        known = ", ".join([*_SHAREGPT_ROLES, *get_args(Role)] if is_sharegpt else get_args(Role))
        raise RecordError("unknown role", f"{where} has {role_key} {role!r:.40}; known: {known}")
    _refuse_unsupported(value, _UNSUPPORTED_MESSAGE_KEYS)
    calls = _parse_calls(content if is_call else value.get("tool_calls"), where)
    if calls and role != "assistant":
        raise RecordError("tool_calls of another role", f"{where}, {role}")
    # A turn that only calls has no content, or an empty one.
    content = "" if is_call or (calls and content is None) else content
    if not isinstance(content, str):
        raise RecordError("wrong type", f"{where} has {content_key} of type {type(content).__name__}, not a string")
    if not content.strip() and role not in ("system", "tool") and not calls:
        raise RecordError("empty content", f"{where}, {role}")
    _check_text(content, where)
    message: Message = {"role": cast(Role, role), "content": content}
    if calls:
        message["tool_calls"] = calls
    if reasoning := value.get("reasoning_content"):
        message["reasoning_content"] = _parse_reasoning(reasoning, role, where)
    return message


def _parse_reasoning(value: object, role: str, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError("wrong type", f"{where} has reasoning_content of type {type(value).__name__}, not a string")
    if role != "assistant":
        raise RecordError("reasoning_content of another role", f"{where}, {role}")
    _check_text(value, f"{where}, reasoning_content")
    return value


def _parse_calls(value: object, where: str) -> list[ToolCall]:
    calls = _parse_json_text(value, f"{where}, calls")
    if calls in (None, [], {}, ""):
        return []
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise RecordError("wrong type", f"{where} has tool_calls of type {type(calls).__name__}, not a list")
    return [_parse_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]


def _parse_call(value: object, where: str) -> ToolCall:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecordError("wrong type", f"{where} is no object with the name and the arguments of a function")
    # Templates write arguments as JSON, and would write the text of an object as a string within it.
    arguments = _parse_json_text(function.get("arguments"), f"{where}, arguments")
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, dict):
        raise RecordError("wrong type", f"{where} has arguments of type {type(arguments).__name__}, not an object")
    _check_unicode(_to_json([function["name"], arguments], where), where)
    call: ToolCall = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(value.get("id"), str):
        call["id"] = value["id"]
    return call


def parse_tools(value: object) -> tuple[dict[str, Any], ...]:
    """Schemas of functions; a bare one is wrapped as OpenAI's API, and so whoever serves the model, writes it."""
    tools = _parse_json_text(value, "tools")
    if tools in (None, [], {}, ""):
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError("wrong type", "tools is no list of objects")
    _check_unicode(_to_json(tools, "tools"), "tools")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _parse_advantage(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError("wrong type", f"advantage is {type(value).__name__}, not a number")
    if not abs(value) <= _LARGEST_ADVANTAGE:  # nor is NaN
        raise RecordError("advantage is not finite in fp32", f"found {value!r:.40}")
    return float(value)


def _parse_json_text(value: object, where: str) -> Any:
    """The value that a JSON text stands for; other values are themselves."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError("not JSON", f"{where}: {str(error) or 'nested too deeply'}") from error


def _to_json(value: object, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:  # NaN, or what only a columnar file can hold
        raise RecordError("not JSON", f"{where}: {error}") from error


def _refuse_unsupported(keyed: Mapping[str, object], keys: Sequence[str]) -> None:
    for key in keys:
        # Empty lists are what columnar files put where a row has none.
        if keyed.get(key) not in (None, [], {}, ""):
            raise RecordError(f"{key} is not supported yet")


def _check_text(text: str, where: str) -> None:
    if "\0" in text:
        raise RecordError("NUL character", where)
    _check_unicode(text, where)


def _check_unicode(text: str, where: str) -> None:
    """Refuses half of a surrogate pair, which JSON can spell and no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecordError("lone surrogate", where) from None


def found_keys(row: Mapping[str, object]) -> str:
    """The first keys of a row, for a message."""
    names = [str(key)[:_REPORTED_CHARACTERS] for key in row]
    return ", ".join(names[:_REPORTED_KEYS]) + (", ..." if len(names) > _REPORTED_KEYS else "") if names else "none"


def _describe_keys(row: Mapping[str, object], keys: RecordKeys) -> str:
    names = [str(key)[:_REPORTED_CHARACTERS] for key in row]
    wanted = f"wanted: messages, or {keys.prompt} and {keys.completion}"
    missing = next(key for key in (keys.prompt, keys.completion) if key not in row)
    hint = nearest_name_hint(missing, names) or nearest_name_hint("messages", names)
    return f"keys found: {found_keys(row)}; {wanted}{hint}"
