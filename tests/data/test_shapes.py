"""Contents and messages in other shapes than strings and lists."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.formats import RecordKeys
from megatron_psft.data.pairs import Pair, parse_pair
from megatron_psft.data.records import read_records
from tests.data.spelled import CHAT, RIGHT, USER, WRONG, answered, both_forms, good, parse, reason, sharegpt


@pytest.mark.parametrize("form", [0, 1], ids=["messages", "ShareGPT"])
def test_parts_of_text_are_joined(form):
    parts = [
        {"type": "text", "text": "2+"},
        {"type": "text", "text": "2?", "image_url": None, "cache_control": {"a": 1}},
    ]
    row = both_forms([{**USER, "content": parts}, {**RIGHT, "content": [{"type": "text", "text": "4"}]}])[form]
    assert good(row).messages == (USER, RIGHT)


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ({"type": "image_url", "image_url": {"url": "a"}}, "content part of type 'image_url' is not supported"),
        ({"type": "thinking", "thinking": "Hm."}, "content part of type 'thinking' is not supported"),
        ({"text": "a"}, "content part of type None is not supported"),
        ({"type": "text", "text": "a", "image": "a.png"}, "message key image is not supported"),
        ({"type": "text", "text": "a", "weight": 0}, "content part with weight, which is a key of messages"),
        ("a", "wrong type"),
        ({"type": "text", "text": "a\0"}, "NUL character"),
    ],
)
def test_other_parts_are_refused_by_name(part, found):
    assert reason(answered(content=[{"type": "text", "text": "4"}, part])).startswith(found)


def test_keys_of_parts_can_be_ignored_and_those_of_calls_stay():
    part = {"type": "text", "text": "4", "style": "x"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}
    tool = {"role": "tool", "content": [part], "name": "f"}
    row = {"messages": [USER, call, tool, {**RIGHT, "content": [part], "name": "bob"}]}
    assert "message key name" in reason(row, ignored=("style",))
    assert "message key style" in reason(row, ignored=("name",))
    record = good(row, ignored=("style", "name"))
    assert record.messages[1]["tool_calls"][0]["function"]["name"] == "f"
    assert record.messages[2:] == ({"role": "tool", "content": "4"}, RIGHT)


def test_a_message_in_two_forms_is_refused():
    both = {"from": "human", "value": "2+2?", "role": "user", "content": "3+3?"}
    assert reason({"messages": [both, RIGHT]}) == "message with both from and role: keep one form"


def test_no_parts_are_no_content():
    assert reason(answered(content=[])) == "empty content"


SHAPES = {
    "JSON text": json.dumps,
    "JSON text with blanks": lambda messages: f"\n {json.dumps(messages, indent=1)}\n",
    "struct of lists": lambda messages: {key: [turn[key] for turn in messages] for key in messages[0]},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_messages_are_read_from_other_shapes_of_columns(tmp_path, shape, column):
    messages = [{**turn, "weight": int(turn is not WRONG), "zzz": "x"} for turn in CHAT]
    messages = sharegpt(messages) if column == "conversations" else messages
    pq.write_table(pa.Table.from_pylist([{column: SHAPES[shape](messages)}]), tmp_path / "a.parquet")
    (record,), bad = read_records([str(tmp_path / "a.parquet")], RecordKeys(ignored=("zzz",)), field="data")
    assert not bad
    assert (record.messages, record.unlearned) == (tuple(CHAT), {1})
    records, (bad_record,) = read_records([str(tmp_path / "a.parquet")], field="data")
    assert not records
    assert "message key zzz is not known" in bad_record.reason


@pytest.mark.parametrize(
    ("value", "found", "detail"),
    [
        ("2+2?", "wrong type", "messages is str, neither a list nor the JSON text of one"),
        ("[{", "not JSON", "messages: "),
        ('{"role": "user"}', "wrong type", "messages is str"),
        ({"role": ["user"], "content": ["a", "b"]}, "wrong type", "messages has lists of different lengths"),
        ({"role": ["user"], "content": "a"}, "wrong type", "messages is dict"),
        (b'[{"role": "user"}]', "wrong type", "messages is bytes"),
    ],
)
def test_shapes_that_are_no_messages_are_refused(value, found, detail):
    bad = parse({"messages": value})
    assert isinstance(bad, BadRecord)
    assert bad.reason == found
    assert detail in bad.detail


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_a_list_of_messages_that_was_written_as_text_is_not_trained_on_as_text(column):
    row = {"prompt": "2+2?", "completion": "4", column: json.dumps([USER])}
    assert reason(row) == "JSON text of messages"
    assert good({"prompt": "2+2?", "completion": '[{"a": 1}]'}).messages[1]["content"] == '[{"a": 1}]'
    meant = {"prompt": "2+2?", "completion": [{"role": "assistant", "content": json.dumps([USER])}]}
    assert good(meant).messages[1]["content"] == json.dumps([USER])


def test_a_side_of_a_pair_may_be_one_message_with_parts_or_lists():
    parts, columns = {**RIGHT, "content": [{"type": "text", "text": "4"}]}, {"role": ["assistant"], "content": ["5"]}
    pair = parse_pair(Row(source="a:1", value={"prompt": "2+2?", "chosen": parts, "rejected": columns}), RecordKeys())
    assert isinstance(pair, Pair)
    assert (pair.chosen.messages, pair.rejected.messages) == ((USER, RIGHT), (USER, WRONG))
