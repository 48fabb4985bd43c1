"""Raw rows -> preference pairs: two conversations that differ from an assistant's turn on, `chosen` and `rejected`.

What comes before them is the prompt, in one of `formats.PAIR_FORMATS`; without one both sides are whole conversations,
and what they share is the prompt.

A side is a string, a message, or a list of messages, which may repeat the prompt. All other keys are those of
`records.py`. Only what differs is learned from: an assistant's turn that both sides share is no label.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.formats import PAIR_FORMATS, RecordKeys, content_of, join_turns
from megatron_psft.data.messages import Field, Message, RecordError, Turn, parse_messages
from megatron_psft.data.records import Record, make_record, parse_with, read_object, with_system_prompt


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one prompt. Both records have the same `source` and `prompt_length`."""

    chosen: Record
    rejected: Record

    @property
    def source(self) -> str:
        """`path:N`, lines or rows counted from 1."""
        return self.chosen.source


def parse_pair(row: Row | BadRecord, keys: RecordKeys) -> Pair | BadRecord:
    """The pair that a row is, or why it is not one."""
    return parse_with(lambda value, source: _parse_value(value, source, keys), row)


def _parse_value(value: object, source: str, keys: RecordKeys) -> Pair:
    row = read_object(value, keys)
    prompt = content_of(row, PAIR_FORMATS, keys, reason="no preference pair")
    if "advantage" in row:
        raise RecordError("advantage is not supported in a preference pair")
    sides = [with_system_prompt(row, _parse_side(row, key, prompt, keys), keys) for key in ("chosen", "rejected")]
    length = _shared_length(*(_messages_of(side) for side in sides))
    chosen, rejected = (make_record(row, side, source, prompt_length=length) for side in sides)
    return Pair(chosen=chosen, rejected=rejected)


def _messages_of(turns: tuple[Turn, ...]) -> tuple[Message, ...]:
    return tuple(turn.message for turn in turns)


def _parse_side(row: Mapping[str, object], key: str, prompt: tuple[Turn, ...], keys: RecordKeys) -> tuple[Turn, ...]:
    """The whole conversation of one side."""
    value = row[key]
    if isinstance(value, str) and not prompt:
        raise RecordError("wrong type", f"{key} is a string, and there is no prompt")
    is_message = isinstance(value, dict) and not isinstance(value.get("role", value.get("from")), list)
    turns = parse_messages(Field(key, [value] if is_message else value, keys.ignored), "assistant")
    if not prompt or _messages_of(turns[: len(prompt)]) == _messages_of(prompt):
        return turns
    if turns and turns[0].message["role"] != "assistant":
        role = turns[0].message["role"]
        raise RecordError("two different prompts", f"{key} begins with another {role} turn than the prompt")
    return join_turns(prompt, turns, key)


def _shared_length(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> int:
    """How many messages both sides begin with; the next one must be the assistant's in both."""
    if chosen == rejected:
        raise RecordError("chosen and rejected are the same")
    shortest = min(len(chosen), len(rejected))
    shared = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    if shared == shortest:
        raise RecordError("chosen or rejected is a prefix of the other", f"{shared} messages")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side[shared]["role"] != "assistant":
            detail = f"they differ first at a {side[shared]['role']} turn, messages[{shared}] of {name}"
            raise RecordError("chosen and rejected do not share a prompt", detail)
    if not shared:
        raise RecordError("no prompt", "chosen and rejected begin with the answer")
    return shared
