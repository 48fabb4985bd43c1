"""Rows for tests of what is read of them, and the reader with its answer checked."""

from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.formats import RecordKeys
from megatron_psft.data.records import Record, parse_row

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}
WRONG, RIGHT = {"role": "assistant", "content": "5"}, {"role": "assistant", "content": "4"}
AGAIN = {"role": "user", "content": "Sure?"}
CHAT = [USER, WRONG, AGAIN, RIGHT]
NAMES = {"user": "human", "assistant": "gpt"}


def parse(row: object, **settings: object) -> Record | BadRecord:
    return parse_row(Row(source="a.jsonl:1", value=row), RecordKeys(**settings))


def good(row: object, **settings: object) -> Record:
    record = parse(row, **settings)
    assert isinstance(record, Record), record
    return record


def reason(row: object, **settings: object) -> str:
    bad = parse(row, **settings)
    assert isinstance(bad, BadRecord), bad
    return bad.reason


def sharegpt(messages: list[dict[str, object]]) -> list[dict[str, object]]:
    """The same turns as ShareGPT spells them."""
    renamed = [{"from": NAMES.get(turn["role"], turn["role"]), "value": turn["content"]} for turn in messages]
    return [
        {**new, **{key: value for key, value in old.items() if key not in ("role", "content")}}
        for new, old in zip(renamed, messages, strict=True)
    ]


def both_forms(messages: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{"messages": messages}, {"conversations": sharegpt(messages)}]


def answered(**changes: object) -> dict[str, object]:
    """A row whose answer has other keys besides."""
    return {"messages": [USER, {**RIGHT, **changes}]}
