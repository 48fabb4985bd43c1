"""The messages of a conversation, checked: what a row holds -> what chat templates take.

A message is `{"role", "content"}`, or `{"from", "value"}` as ShareGPT has it. Calls of functions are `tool_calls` of a
message as OpenAI's API has them, or ShareGPT's `function_call` turns.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple, TypedDict, cast, get_args

from megatron_psft.data.keys import LEARN_KEYS, REASONING_KEYS, is_empty, message_key_problem, shown_key
from megatron_psft.data.marks import split_content

Role = Literal["system", "developer", "user", "assistant", "tool"]

_ROLES: tuple[str, ...] = get_args(Role)
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
_KEYS_OF_BOTH = frozenset({"tool_calls", "tool_call_id", *REASONING_KEYS, *LEARN_KEYS})
_CALL_KEYS = frozenset({"function", "name", "arguments", "parsed_arguments", "id"})
_KEYS, _SHAREGPT_KEYS = _KEYS_OF_BOTH | {"role", "content"}, _KEYS_OF_BOTH | {"from", "value"}


class _Call(TypedDict):
    type: Literal["function"]
    function: dict[str, Any]


class ToolCall(_Call, total=False):
    """A call as chat templates take it: `function` has a `name`, and `arguments` as an object."""

    id: str


class _RoleAndContent(TypedDict):
    role: Role
    content: str


class Message(_RoleAndContent, total=False):
    """One turn, in the form that chat templates take. A key that says nothing is left out, since templates ask whether
    it is there."""

    tool_calls: list[ToolCall]
    reasoning_content: str
    tool_call_id: str
    """Of a tool's turn: the call that it answers."""
    name: str
    """Of a tool's turn: the function that was called."""


class Turn(NamedTuple):
    """A message, and what the row says of its place in training. `is_prompt`: nothing of it is learned, be it an
    assistant's, since it stands before what is. Not `is_learned`: the message itself says that it is no label."""

    message: Message
    is_learned: bool = True
    is_prompt: bool = False


class Field(NamedTuple):
    """What a row holds under a key, with its name for errors. Keys of messages that are `ignored` are not read."""

    name: str
    value: object
    ignored: Collection[str] = ()


class RecordError(ValueError):
    """One record cannot be used. `reason` is a fixed text, to be counted over records; `detail` is about this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


def wrong_type(what: str, value: object) -> RecordError:
    """The error for a value of a type that `what` cannot have."""
    return RecordError("wrong type", f"{what} is {type(value).__name__}")


def parse_messages(field: Field, role_of_string: Role | None = None) -> tuple[Turn, ...]:
    """The checked turns of a list of messages, of its JSON text, or of its columns (`{"role": [...], "content":
    [...]}`). With `role_of_string` a string is no JSON text but the one message of that role. Raises RecordError."""
    name, value, ignored = field
    if isinstance(value, str):
        value = _parse_list_text(value, name) if role_of_string is None else _text_message(value, name, role_of_string)
    elif isinstance(value, dict):
        value = _rows_of_columns(value, name)
    if not isinstance(value, list):
        raise wrong_type(name, value)
    if ignored:
        value = _without_keys(value, ignored)
    return tuple(parse_message(message, f"{name}[{index}]") for index, message in enumerate(value))


def _without_keys(values: list[object], ignored: Collection[str]) -> list[object]:
    """Messages, or parts of a content, without ignored keys."""
    return [_without(value, ignored) if isinstance(value, dict) else value for value in values]


def _without(message: dict[str, object], ignored: Collection[str]) -> dict[str, object]:
    kept = {key: value for key, value in message.items() if key not in ignored}
    for key in ("content", "value"):
        if isinstance(parts := kept.get(key), list):
            kept[key] = _without_keys(parts, ignored)
    return kept


def _parse_list_text(text: str, name: str) -> object:
    if not text.lstrip().startswith("["):
        raise RecordError("wrong type", f"{name} is str, neither a list nor the JSON text of one")
    return _parse_json_text(text, name)


def _text_message(text: str, name: str, role: Role) -> list[object]:
    if text.lstrip().startswith("[{") and _is_text_of_messages(text):
        # To train on JSON as an answer is rare, and so is a list that was written as text; only who wrote it knows.
        raise RecordError("JSON text of messages", f"{name}; give a list, or one message that has the text as content")
    return [{"role": role, "content": text}]


def _is_text_of_messages(text: str) -> bool:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return all(
        isinstance(item, dict) and ({"role", "content"} <= {*item} or {"from", "value"} <= {*item}) for item in value
    )


def _rows_of_columns(value: Mapping[str, object], name: str) -> list[object]:
    """A list of objects from an object of lists, as older versions of `datasets` write the former."""
    columns = {key: column for key, column in value.items() if isinstance(column, list)}
    if not columns or len(columns) < len(value):
        raise wrong_type(name, value)
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise RecordError("wrong type", f"{name} has lists of different lengths: {lengths!s:.80}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def parse_message(value: object, where: str) -> Turn:
    """One checked message; `where` names it in errors. Raises RecordError."""
    if not isinstance(value, dict):
        raise RecordError("wrong type", f"{where} is {type(value).__name__}, not an object")
    if not (is_empty(value.get("from")) or is_empty(value.get("role"))):
        raise RecordError("message with both from and role: keep one form", where)
    is_sharegpt = "from" in value and "role" not in value
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    given_role, content = value.get(role_key), value.get(content_key)
    role = _parse_role(given_role, role_key, where, is_sharegpt)
    if not value.keys() <= (known := _SHAREGPT_KEYS if is_sharegpt else _KEYS):
        _refuse_unknown(value, known | {"name"} if role == "tool" else known, where)
    is_call = is_sharegpt and given_role == "function_call"
    calls = _parse_calls(content if is_call else value.get("tool_calls"), where)
    if calls and role != "assistant":
        raise RecordError("tool_calls outside an assistant turn", f"{where}, {role}")
    # A turn that only calls has no content, or an empty one.
    text = "" if is_call or (calls and content is None) else _parse_content(content, content_key, where)
    if not text.strip() and role not in ("system", "developer", "tool") and not calls:
        raise RecordError("empty content", f"{where}, {role}")
    message: Message = {"role": role, "content": text}
    if calls:
        message["tool_calls"] = calls
    if len(value) == 2:
        return Turn(message)
    _add_reasoning(message, value, where)
    if role == "tool":
        _add_names(message, value, where)
    return Turn(message, is_learned=_parse_learned(value, where))


def _refuse_unknown(value: Mapping[str, object], known: Collection[str], where: str) -> None:
    """Raises RecordError for a key that is not `known` and might say what is to be learned."""
    unknown = {
        key: message_key_problem(key, value[key]) for key in value if key not in known and not is_empty(value[key])
    }
    refuse_keys({key: problem for key, problem in unknown.items() if problem is not None}, where)


def refuse_keys(problems: Mapping[str, str], where: str = "") -> None:
    """Raises RecordError if there are problems with keys. The reason names one of them, so that reasons are few; the
    others are in the detail."""
    if problems:
        (_, reason), *others = problems.items()
        also = f"so are {', '.join(shown_key(key) for key, _ in others[:10])}" if others else ""
        raise RecordError(reason, "; ".join(filter(None, (where, also))))


def _parse_content(content: object, key: str, where: str) -> str:
    if isinstance(content, list):
        content = "".join(_parse_part(part, f"{where}.{key}[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise RecordError("wrong type", f"{where} has {key} of type {type(content).__name__}, not a string")
    check_text(content, where)
    return content


def _parse_part(part: object, where: str) -> str:
    if not isinstance(part, dict):
        raise wrong_type(where, part)
    if (kind := part.get("type")) != "text":
        raise RecordError(f"content part of type {kind!r:.40} is not supported: only text is trained on", where)
    text = part.get("text")
    if not isinstance(text, str):
        raise wrong_type(f"{where}.text", text)
    # What a message may say of itself, it cannot say of a part: it would be read of the whole, or not at all.
    if said := sorted(key for key in _KEYS & part.keys() if not is_empty(part[key])):
        raise RecordError(f"content part with {said[0]}, which is a key of messages: give the part a message", where)
    _refuse_unknown(part, ("type", "text"), where)
    return text


def _add_names(message: Message, value: Mapping[str, object], where: str) -> None:
    for key in ("tool_call_id", "name"):
        if is_empty(given := value.get(key)):
            continue
        if not isinstance(given, str):
            raise RecordError("wrong type", f"{where} has {key} of type {type(given).__name__}, not a string")
        check_text(given, f"{where}, {key}")
        message[key] = given  # type: ignore[literal-required]


def _parse_learned(value: Mapping[str, object], where: str) -> bool:
    """False where the message says that it is not to be learned."""
    given = {key: flag for key in LEARN_KEYS if (flag := value.get(key)) is not None}
    for key, flag in given.items():
        if not isinstance(flag, bool | int | float) or flag not in (0, 1):
            allowed = "0 or 1" if key == "weight" else "true or false"
            raise RecordError(f"message key {key} is not {allowed}", f"{where} has {flag!r:.40}")
    if len({bool(flag) for flag in given.values()}) > 1:
        shown = ", ".join(f"{key} {flag!r}" for key, flag in given.items())
        raise RecordError("message keys that contradict each other", f"{where} has {shown}")
    return all(given.values())


def _parse_role(value: object, key: str, where: str, is_sharegpt: bool) -> Role:
    if not isinstance(value, str):
        raise RecordError("wrong type", f"{where} has {key} of type {type(value).__name__}, not a string")
    role = _SHAREGPT_ROLES.get(value, value) if is_sharegpt else value
    if role not in _ROLES:
        known = ", ".join([*_SHAREGPT_ROLES, *_ROLES] if is_sharegpt else _ROLES)
        raise RecordError("unknown role", f"{where} has {key} {role!r:.40}; known: {known}")
    return cast(Role, role)


def _parse_reasoning(value: Mapping[str, object], role: str, where: str) -> str:
    given = {key: text for key in REASONING_KEYS if not is_empty(text := value.get(key))}
    for key, text in given.items():
        if not isinstance(text, str):
            raise RecordError("wrong type", f"{where} has {key} of type {type(text).__name__}, not a string")
        if role != "assistant":
            raise RecordError(f"{key} outside an assistant turn", f"{where}, {role}")
        check_text(text, f"{where}, {key}")
    if len({*given.values()}) > 1:
        raise RecordError("two texts of reasoning", f"{where} has {' and '.join(given)}")
    return cast(str, next(iter(given.values()), ""))


def _add_reasoning(message: Message, value: Mapping[str, object], where: str) -> None:
    """Adds the reasoning that stands under a key, without which the content must have something to say."""
    if not (reasoning := _parse_reasoning(value, message["role"], where)):
        return
    message["reasoning_content"] = reasoning
    message["content"] = _without_repeated(reasoning, message["content"], where)
    if not message["content"].strip() and "tool_calls" not in message:
        raise RecordError("empty content", f"{where}, {message['role']}")


def _without_repeated(reasoning: str, content: str, where: str) -> str:
    """The content without a block of reasoning that says what a key says already; templates would write both. Raises
    RecordError for one that says something else."""
    if (split := split_content(content)) is None:
        return content
    if split.reasoning.strip() == reasoning.strip():
        return split.answer
    if split.is_opened:
        raise RecordError("two texts of reasoning", f"{where} has one under a key and one in its content")
    return content  # a mark that the answer speaks of


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
        raise RecordError("wrong type", f"{where} is not an object with the name and the arguments of a function")
    for key, item in (*value.items(), *function.items()):  # such as parameters, or the result
        if key not in _CALL_KEYS and not is_empty(item) and message_key_problem(key, item) is not None:
            raise RecordError(
                f"call with the key {shown_key(key)}: only a function's name and arguments are read", where
            )
    # Templates write arguments as JSON, and would write the text of an object as a string within it.
    arguments = _parse_json_text(function.get("arguments"), f"{where}, arguments")
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, dict):
        raise RecordError("wrong type", f"{where} has arguments of type {type(arguments).__name__}, not an object")
    _check_unicode(_to_json([function["name"], arguments], where), where)
    call: ToolCall = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if (identity := value.get("id")) is not None:
        if not isinstance(identity, str):
            raise wrong_type(f"{where}.id", identity)
        call["id"] = identity
    return call


def parse_tools(value: object) -> tuple[dict[str, Any], ...]:
    """Schemas of the functions that may be called, from a list or its JSON text; a bare one is wrapped as OpenAI's API,
    and so whoever serves the model, writes it. Raises RecordError."""
    tools = _parse_json_text(value, "tools")
    if tools in (None, [], {}, ""):
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError("wrong type", "tools is not a list of objects")
    _check_unicode(_to_json(tools, "tools"), "tools")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def parse_template_kwargs(value: object, name: str) -> dict[str, Any]:
    """Variables for a chat template, from an object or its JSON text; those that are null are left out. Raises
    RecordError."""
    value = _parse_json_text(value, name)
    if is_empty(value):
        return {}
    if not isinstance(value, dict):
        raise RecordError("wrong type", f"{name} is {type(value).__name__}, not an object")
    _check_unicode(_to_json(value, name), name)
    return {key: item for key, item in value.items() if item is not None}


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


def check_text(text: str, where: str) -> None:
    """Raises RecordError for characters that no text should have."""
    if "\0" in text:
        raise RecordError("NUL character", where)
    _check_unicode(text, where)


def _check_unicode(text: str, where: str) -> None:
    """Refuses half of a surrogate pair, which JSON can spell and no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecordError("lone surrogate", where) from None
