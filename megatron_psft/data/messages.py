"""The messages of a conversation, checked: what a row holds -> what chat templates take.

A message is `{"role", "content"}`, or `{"from", "value"}` as ShareGPT has it. Calls of functions are `tool_calls` of a
message as OpenAI's API has them, or ShareGPT's `function_call` turns.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, cast, get_args

Role = Literal["system", "developer", "user", "assistant", "tool"]

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}

_UNSUPPORTED_KEYS = ("function_call",)
"""Keys that change what has to be learned: training as if they were not there would be silently wrong."""


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
    """One turn, in the form that chat templates take. A key that says nothing is left out, since templates ask whether
    it is there."""

    tool_calls: list[ToolCall]
    reasoning_content: str
    tool_call_id: str
    """Of a tool's turn: the call that it answers."""
    name: str
    """Of a tool's turn: the function that was called."""


class RecordError(ValueError):
    """One record cannot be used. `reason` is a fixed text, to be counted over records; `detail` is about this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


def wrong_type(what: str, value: object) -> RecordError:
    """The error for a value of a type that `what` cannot have."""
    return RecordError("wrong type", f"{what} is {type(value).__name__}")


def parse_messages(value: object, name: str, role_of_string: Role | None = None) -> tuple[Message, ...]:
    """The checked messages of a list that stands under `name` in a row; a plain string becomes one message of role
    `role_of_string`, if given. Raises RecordError."""
    if isinstance(value, str) and role_of_string is not None:
        value = [{"role": role_of_string, "content": value}]
    if not isinstance(value, list):
        raise wrong_type(name, value)
    return tuple(parse_message(message, f"{name}[{index}]") for index, message in enumerate(value))


def parse_message(value: object, where: str) -> Message:
    """One checked message; `where` names it in errors. Raises RecordError."""
    if not isinstance(value, dict):
        raise RecordError("wrong type", f"{where} is {type(value).__name__}, not an object")
    is_sharegpt = "from" in value and "role" not in value
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    given_role, content = value.get(role_key), value.get(content_key)
    role = _parse_role(given_role, role_key, where, is_sharegpt)
    refuse_unsupported(value, _UNSUPPORTED_KEYS)
    is_call = is_sharegpt and given_role == "function_call"
    calls = _parse_calls(content if is_call else value.get("tool_calls"), where)
    if calls and role != "assistant":
        raise RecordError("tool_calls outside an assistant turn", f"{where}, {role}")
    # A turn that only calls has no content, or an empty one.
    content = "" if is_call or (calls and content is None) else content
    if not isinstance(content, str):
        raise RecordError("wrong type", f"{where} has {content_key} of type {type(content).__name__}, not a string")
    if not content.strip() and role not in ("system", "developer", "tool") and not calls:
        raise RecordError("empty content", f"{where}, {role}")
    _check_text(content, where)
    message: Message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = calls
    if reasoning := value.get("reasoning_content"):
        message["reasoning_content"] = _parse_reasoning(reasoning, role, where)
    return message


def _parse_role(value: object, key: str, where: str, is_sharegpt: bool) -> Role:
    if not isinstance(value, str):
        raise RecordError("wrong type", f"{where} has {key} of type {type(value).__name__}, not a string")
    role = _SHAREGPT_ROLES.get(value, value) if is_sharegpt else value
    if role not in get_args(Role):
        known = ", ".join([*_SHAREGPT_ROLES, *get_args(Role)] if is_sharegpt else get_args(Role))
        raise RecordError("unknown role", f"{where} has {key} {role!r:.40}; known: {known}")
    return cast(Role, role)


def _parse_reasoning(value: object, role: str, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError("wrong type", f"{where} has reasoning_content of type {type(value).__name__}, not a string")
    if role != "assistant":
        raise RecordError("reasoning_content outside an assistant turn", f"{where}, {role}")
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
        raise RecordError("wrong type", f"{where} is not an object with the name and the arguments of a function")
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
    """Schemas of the functions that may be called, from a list or its JSON text; a bare one is wrapped as OpenAI's API,
    and so whoever serves the model, writes it. Raises RecordError."""
    tools = _parse_json_text(value, "tools")
    if tools in (None, [], {}, ""):
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError("wrong type", "tools is not a list of objects")
    _check_unicode(_to_json(tools, "tools"), "tools")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


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


def refuse_unsupported(keyed: Mapping[str, object], keys: Sequence[str]) -> None:
    """Raises RecordError if one of `keys` has a value."""
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
