"""How a row may spell a conversation: the formats that are accepted, in the order in which they are tried.

To add one, write its `Format` into `RECORD_FORMATS` or `PAIR_FORMATS`: error texts and the tables in docs/data.md are
made from these lists. Docs: docs/extending.md, "A record format".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_psft.data.messages import Message, RecordError, parse_message, parse_messages, wrong_type
from megatron_psft.errors import nearest_name_hint

DEFAULT_PROMPT_KEY = "prompt"
DEFAULT_COMPLETION_KEY = "completion"
_PAPER_COMPLETION_KEYS = ("demonstration", "demostration")
"""Columns of the paper's Parquet files; its script writes the first spelling and its trainer reads the second."""

_SHOWN_KEYS = 10
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True, kw_only=True)
class RecordKeys:
    """How rows are read. `system_prompt` replaces every record's own system message. `are_pairs`: rows are preference
    pairs (see `pairs.py`)."""

    prompt: str = DEFAULT_PROMPT_KEY
    completion: str = DEFAULT_COMPLETION_KEY
    system_prompt: str | None = None
    are_pairs: bool = False

    @property
    def are_named(self) -> bool:
        """True if the user has named keys."""
        return (self.prompt, self.completion) != (DEFAULT_PROMPT_KEY, DEFAULT_COMPLETION_KEY)

    def names_of(self, key: str) -> tuple[str, ...]:
        """Under which names a row may hold a format's `key`; the first that it has counts."""
        if key == DEFAULT_PROMPT_KEY:
            return (self.prompt,)
        if key != DEFAULT_COMPLETION_KEY:
            return (key,)
        return (key, *_PAPER_COMPLETION_KEYS) if self.completion == DEFAULT_COMPLETION_KEY else (self.completion,)


class Field(NamedTuple):
    """What a row holds for a format's key, and under which name, for errors."""

    name: str
    value: object


Fields = Mapping[str, Field]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to spell a record or the prompt of a preference pair."""

    name: str
    keys: tuple[str, ...]
    """A row that has all of them has this format."""
    optional: tuple[str, ...] = ()
    parse: Callable[[Fields], tuple[Message, ...]]
    """The messages of the keys that the row has. Raises RecordError."""
    example: str
    """A row, as a line of a JSON Lines file; docs/data.md shows it."""

    def fields(self, row: Mapping[str, object], keys: RecordKeys) -> Fields | None:
        """What `row` holds for the format's keys; None if it has another format."""
        names = {key: next((name for name in keys.names_of(key) if name in row), None) for key in self.all_keys}
        if any(names[key] is None for key in self.keys):
            return None
        return {key: Field(name, row[name]) for key, name in names.items() if name is not None}

    @property
    def all_keys(self) -> tuple[str, ...]:
        """Required and optional ones."""
        return (*self.keys, *self.optional)


def messages_of(
    row: Mapping[str, object], formats: Sequence[Format], keys: RecordKeys, *, reason: str
) -> tuple[Message, ...]:
    """The messages of `row` in the first format that it has.

    A format whose keys the user has named is tried before all others. Raises RecordError, with `reason` if the row has
    none of the formats.
    """
    for format in sorted(formats, key=lambda format: not (keys.are_named and _has_user_keys(format))):
        if (fields := format.fields(row, keys)) is not None:
            return format.parse(fields)
    raise RecordError(reason, _describe_keys(row, formats, keys))


def _has_user_keys(format: Format) -> bool:
    return {DEFAULT_PROMPT_KEY, DEFAULT_COMPLETION_KEY} <= set(format.keys)


def _describe_keys(row: Mapping[str, object], formats: Sequence[Format], keys: RecordKeys) -> str:
    names = [str(key)[:_SHOWN_CHARACTERS] for key in row]
    found = ", ".join(names[:_SHOWN_KEYS]) + (", ..." if len(names) > _SHOWN_KEYS else "") if names else "none"
    accepted = [[keys.names_of(key)[0] for key in format.keys] for format in formats]
    known = {name for format in formats for key in format.all_keys for name in keys.names_of(key)}
    hints = (nearest_name_hint(name, sorted(known)) for name in names if name not in known)
    return f"keys found: {found}; accepted: {'; '.join(map(_join, accepted))}{next(filter(None, hints), '')}"


def _join(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def format_table(formats: Sequence[Format]) -> str:
    """The Markdown table of docs/data.md."""
    rows = [("format", "keys", "example")]
    rows += [("---", "---", "---")]
    for format in formats:
        keys = [f"`{key}`" for key in format.keys] + [f"`{key}` (optional)" for key in format.optional]
        rows.append((format.name, ", ".join(keys), f"`{format.example}`"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _parse_messages(fields: Fields) -> tuple[Message, ...]:
    return parse_messages(fields["messages"].value, "messages")


def _parse_conversations(fields: Fields) -> tuple[Message, ...]:
    return parse_messages(fields["conversations"].value, "conversations")


def _parse_prompt(fields: Fields) -> tuple[Message, ...]:
    name, value = fields["prompt"]
    return parse_messages(value, name, "user")


def _parse_prompt_and_completion(fields: Fields) -> tuple[Message, ...]:
    name, value = fields["completion"]
    return (*_parse_prompt(fields), *parse_messages(value, name, "assistant"))


def _parse_instruction(fields: Fields) -> tuple[Message, ...]:
    """Alpaca's `instruction`, and `input` if there is any, as the user's message."""
    instruction, given = _text(fields["instruction"]), _text(fields["input"]) if "input" in fields else ""
    prompt = f"{instruction}\n{given}" if given else instruction
    return (parse_message({"role": "user", "content": prompt}, "instruction"),)


def _parse_alpaca(fields: Fields) -> tuple[Message, ...]:
    prompt = _parse_instruction(fields)
    return (*prompt, parse_message({"role": "assistant", "content": _text(fields["output"])}, "output"))


def _text(field: Field) -> str:
    if not isinstance(field.value, str):
        raise wrong_type(*field)
    return field.value


RECORD_FORMATS = (
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
    Format(
        name="prompt and completion",
        keys=("prompt", "completion"),
        parse=_parse_prompt_and_completion,
        example='{"prompt": "2+2?", "completion": "4"}',
    ),
    Format(
        name="Alpaca",
        keys=("instruction", "output"),
        optional=("input",),
        parse=_parse_alpaca,
        example='{"instruction": "Add", "input": "2 and 2", "output": "4"}',
    ),
)
"""Of demonstrations. Where a row has several, the first of this list counts."""

PAIR_FORMATS = (
    Format(
        name="prompt",
        keys=("prompt", "chosen", "rejected"),
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
        parse=_parse_instruction,
        example='{"instruction": "Add", "input": "2 and 2", "chosen": "4", "rejected": "5"}',
    ),
    Format(
        name="whole conversations",
        keys=("chosen", "rejected"),
        parse=lambda fields: (),
        example='{"chosen": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], '
        '"rejected": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}]}',
    ),
)
"""Of preference pairs. `parse` gives the messages of the prompt; `pairs.py` reads the two sides."""
