"""How a row may spell a record: the formats that are accepted, in the order in which they are tried.

To add one, write its `Format` into `RECORD_FORMATS` or `PAIR_FORMATS`: error texts and the tables in docs/data.md are
made from these lists. Docs: docs/extending.md, "A record format".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from megatron_psft.data.keys import (
    KWARGS_KEY,
    SYSTEM_KEYS,
    THINKING_KEY,
    is_empty,
    is_one_of,
    refused_beside,
    row_key_problem,
)
from megatron_psft.data.messages import (
    Field,
    RecordError,
    Turn,
    check_text,
    parse_message,
    parse_messages,
    refuse_keys,
    wrong_type,
)
from megatron_psft.errors import nearest_name_hint

DEFAULT_PROMPT_KEY = "prompt"
DEFAULT_COMPLETION_KEY = "completion"
_UNREAD_TEXTS = ("context", "passage", "document")
"""Columns of which a question may be about; a format without a place for them would drop them."""
_BESIDE_PROMPT = ("instruction", "input", *_UNREAD_TEXTS)
_PAPER_COMPLETION_KEYS = ("demonstration", "demostration")
"""Columns of the paper's Parquet files; its script writes the first spelling and its trainer reads the second."""

_BESIDE_TEXT = (
    *("prompt", "completion", *_PAPER_COMPLETION_KEYS, "instruction", "input", "output", "chosen", "rejected"),
    *(*SYSTEM_KEYS, "tools", KWARGS_KEY, THINKING_KEY, *_UNREAD_TEXTS),
)
"""What other formats read, and a plain text has no place for."""

_SHOWN_KEYS = 10
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True, kw_only=True)
class RecordKeys:
    """How rows are read. `system_prompt` replaces every record's own system message. `are_pairs`: rows are preference
    pairs (see `pairs.py`). `are_prompts`: nothing of a row is learned. `takes_text`: plain texts are records, too. Keys
    of rows and of messages that are `ignored` are read as if they were not there."""

    prompt: str = DEFAULT_PROMPT_KEY
    completion: str = DEFAULT_COMPLETION_KEY
    system_prompt: str | None = None
    are_pairs: bool = False
    are_prompts: bool = False
    takes_text: bool = False
    ignored: tuple[str, ...] = ()

    @cached_property
    def named(self) -> tuple[str, ...]:
        """The keys of formats for which the user has named others."""
        chosen = {DEFAULT_PROMPT_KEY: self.prompt, DEFAULT_COMPLETION_KEY: self.completion}
        return tuple(key for key, name in chosen.items() if name != key)

    def names_of(self, key: str) -> tuple[str, ...]:
        """Under which names a row may hold a format's `key`; the first that it has counts."""
        if key == DEFAULT_PROMPT_KEY:
            return (self.prompt,)
        if key != DEFAULT_COMPLETION_KEY:
            return (key,)
        return (key, *_PAPER_COMPLETION_KEYS) if self.completion == DEFAULT_COMPLETION_KEY else (self.completion,)


Fields = Mapping[str, Field]
Content = TypeVar("Content", covariant=True)


@dataclass(frozen=True, kw_only=True)
class Format(Generic[Content]):
    """One way to spell a record or the prompt of a preference pair."""

    name: str
    keys: tuple[str, ...]
    """A row that has all of them has this format."""
    optional: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    """Keys whose text belongs to the prompt, and would be dropped: a row with anything but a number under one is
    refused."""
    parse: Callable[[Fields], Content]
    """What the keys that the row has say: turns, or a plain text. Raises RecordError."""
    example: str
    """A row, as a line of a JSON Lines file; docs/data.md shows it."""

    def fields(self, row: Mapping[str, object], keys: RecordKeys) -> Fields | None:
        """What `row` holds for the format's keys; None if it has another format."""
        names = {key: next((name for name in keys.names_of(key) if name in row), None) for key in self.all_keys}
        if any(names[key] is None for key in self.keys):
            return None
        return {key: Field(name, row[name], keys.ignored) for key, name in names.items() if name is not None}

    @property
    def all_keys(self) -> tuple[str, ...]:
        """Required and optional ones."""
        return (*self.keys, *self.optional)


def content_of(
    row: Mapping[str, object], formats: Sequence[Format[Content]], keys: RecordKeys, *, reason: str
) -> Content:
    """What `row` says in the first format that it has; where the user has named keys, only formats with these count.

    Raises RecordError, with `reason` if the row has none of the formats, also for keys that are refused (`keys.py`).
    """
    for key in keys.named:
        candidates = [format for format in formats if key in format.keys]
        if candidates and not any(name in row for name in keys.names_of(key)):
            name = keys.names_of(key)[0]
            raise RecordError(f"no key {name}", _describe_keys(row, candidates, keys))
        formats = candidates or formats
    for format in formats:
        if (fields := format.fields(row, keys)) is not None:
            _refuse_keys(row, format, {field.name for field in fields.values()}, keys)
            return format.parse(fields)
    raise RecordError(reason, _describe_keys(row, formats, keys))


def _refuse_keys(row: Mapping[str, object], format: Format[Any], used: set[str], keys: RecordKeys) -> None:
    """Raises RecordError for a key of the row that would change what is learned, and that nobody reads."""
    problems: dict[str, str] = {}
    for key, value in row.items():
        if key in used or is_empty(value):
            continue
        is_known = key in _FORMAT_KEYS
        problem = None if is_known else row_key_problem(key, value, format.optional, is_prompt=keys.are_prompts)
        if problem is None and isinstance(value, str | bool | list | dict) and is_one_of(key, format.refused):
            problem = refused_beside(key, format.name, format.keys[0])
        if problem is not None:
            problems[key] = problem
    refuse_keys(problems)


def _describe_keys(row: Mapping[str, object], formats: Sequence[Format[Any]], keys: RecordKeys) -> str:
    names = [str(key)[:_SHOWN_CHARACTERS] for key in row]
    found = ", ".join(names[:_SHOWN_KEYS]) + (", ..." if len(names) > _SHOWN_KEYS else "") if names else "none"
    accepted = [[keys.names_of(key)[0] for key in format.keys] for format in formats]
    known = {name for format in formats for key in format.all_keys for name in keys.names_of(key)}
    missing = [name for key in keys.named for name in keys.names_of(key) if name not in row]
    hints = [nearest_name_hint(name, names) for name in missing]
    hints += [nearest_name_hint(name, sorted(known)) for name in names if name not in known]
    return f"keys found: {found}; accepted: {'; '.join(map(_join, accepted))}{next(filter(None, hints), '')}"


def _join(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def format_table(formats: Sequence[Format[Any]]) -> str:
    """The Markdown table of docs/data.md."""
    rows = [("format", "keys", "example")]
    rows += [("---", "---", "---")]
    for format in formats:
        keys = [f"`{key}`" for key in format.keys] + [f"`{key}` (optional)" for key in format.optional]
        rows.append((format.name, ", ".join(keys), f"`{format.example}`"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _parse_messages(fields: Fields) -> tuple[Turn, ...]:
    return parse_messages(fields["messages"])


def _parse_conversations(fields: Fields) -> tuple[Turn, ...]:
    return parse_messages(fields["conversations"])


def _parse_prompt(fields: Fields) -> tuple[Turn, ...]:
    return tuple(Turn(turn.message, turn.is_learned, True) for turn in parse_messages(fields["prompt"], "user"))


def _parse_prompt_and_completion(fields: Fields) -> tuple[Turn, ...]:
    return join_turns(
        _parse_prompt(fields), parse_messages(fields["completion"], "assistant"), fields["completion"].name
    )


def join_turns(prompt: tuple[Turn, ...], answer: tuple[Turn, ...], name: str) -> tuple[Turn, ...]:
    """The prompt with what answers it, which stands under `name`. Raises RecordError where it would have to go on with
    the prompt's last turn: templates begin a new one."""
    if prompt and answer and prompt[-1].message["role"] == answer[0].message["role"] == "assistant":
        raise RecordError(
            "prompt that ends with an assistant turn", f"{name} would have to go on with it; end it before"
        )
    return (*prompt, *answer)


def _parse_instruction(fields: Fields) -> tuple[Turn, ...]:
    """Alpaca's `instruction`, and `input` if there is any, as the user's message."""
    instruction, given = _text(fields["instruction"]), _text(fields["input"]) if "input" in fields else ""
    prompt = f"{instruction}\n{given}" if given else instruction
    return (parse_message({"role": "user", "content": prompt}, "instruction")._replace(is_prompt=True),)


def _parse_alpaca(fields: Fields) -> tuple[Turn, ...]:
    prompt = _parse_instruction(fields)
    return (*prompt, parse_message({"role": "assistant", "content": _text(fields["output"])}, "output"))


def _parse_text(fields: Fields) -> str:
    text = _text(fields["text"])
    if not text.strip():
        raise RecordError("empty content", "text")
    check_text(text, "text")
    return text


def _text(field: Field) -> str:
    if not isinstance(field.value, str):
        raise wrong_type(field.name, field.value)
    return field.value


CONVERSATION_FORMATS: tuple[Format[tuple[Turn, ...]], ...] = (
    Format(
        name="messages",
        keys=("messages",),
        parse=_parse_messages,
        example='{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}',
    ),
    Format(
        name="ShareGPT",
        keys=("conversations",),
        parse=_parse_conversations,
        example='{"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}',
    ),
)
"""Of turns that say themselves whose they are."""

PROMPT_FORMAT = Format(
    name="prompt", keys=("prompt",), refused=_BESIDE_PROMPT, parse=_parse_prompt, example='{"prompt": "2+2?"}'
)
"""Of what is asked only, with no answer that is learned."""

RECORD_FORMATS: tuple[Format[tuple[Turn, ...] | str], ...] = (
    *CONVERSATION_FORMATS,
    Format(
        name="prompt and completion",
        keys=("prompt", "completion"),
        refused=_BESIDE_PROMPT,
        parse=_parse_prompt_and_completion,
        example='{"prompt": "2+2?", "completion": "4"}',
    ),
    Format(
        name="Alpaca",
        keys=("instruction", "output"),
        optional=("input",),
        refused=_UNREAD_TEXTS,
        parse=_parse_alpaca,
        example='{"instruction": "Add", "input": "2 and 2", "output": "4"}',
    ),
    Format(name="text", keys=("text",), refused=_BESIDE_TEXT, parse=_parse_text, example='{"text": "2+2 is 4."}'),
)
"""Of demonstrations. Where a row has several, the first of this list counts."""

PAIR_FORMATS: tuple[Format[tuple[Turn, ...]], ...] = (
    Format(
        name="prompt",
        keys=("prompt", "chosen", "rejected"),
        refused=_BESIDE_PROMPT,
        parse=_parse_prompt,
        example='{"prompt": "2+2?", "chosen": "4", "rejected": "5"}',
    ),
    Format(
        name="ShareGPT",
        keys=("conversations", "chosen", "rejected"),
        parse=_parse_conversations,
        example='{"conversations": [{"from": "human", "value": "2+2?"}], "chosen": "4", "rejected": "5"}',
    ),
    Format(
        name="messages",
        keys=("messages", "chosen", "rejected"),
        parse=_parse_messages,
        example='{"messages": [{"role": "user", "content": "2+2?"}], "chosen": "4", "rejected": "5"}',
    ),
    Format(
        name="Alpaca",
        keys=("instruction", "chosen", "rejected"),
        optional=("input",),
        refused=_UNREAD_TEXTS,
        parse=_parse_instruction,
        example='{"instruction": "Add", "input": "2 and 2", "chosen": "4", "rejected": "5"}',
    ),
    Format(
        name="whole conversations",
        keys=("chosen", "rejected"),
        refused=_BESIDE_PROMPT,
        parse=lambda fields: (),
        example='{"chosen": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], '
        '"rejected": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}]}',
    ),
)
"""Of preference pairs. `parse` gives the messages of the prompt; `pairs.py` reads the two sides."""

_FORMAT_KEYS = frozenset(
    {key for format in (*RECORD_FORMATS, *PAIR_FORMATS) for key in format.all_keys} | {*_PAPER_COMPLETION_KEYS}
)
"""A row may have those of several formats: the first counts, as for sets that have both prompts and messages."""
