"""Two hundred malformed records of many kinds: each is reported by file and line, none stops the others, none vanishes.

What stands here is what found its way into real files: half-written lines, other encodings, other types, other formats.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_psft.config.inputs import DataConfig
from megatron_psft.data.dataset import TokenizedDataset, build_dataset
from megatron_psft.data.files import BadRecord
from megatron_psft.data.records import Record, read_records
from megatron_psft.errors import UserError
from tests.data import toys
from tests.data.toys import byte_tokenizer

TOKENIZER = byte_tokenizer(toys.TOOLS)
USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}
GOOD = json.dumps({"messages": [USER, ASSISTANT]}).encode()
NOT_STRINGS = [None, 7, 2.5, True, [], ["a"], {}, {"a": 1}, float("nan"), float("inf"), 10**400]
NESTED: object = "x"
for _ in range(200):
    NESTED = {"role": [NESTED]}


def broken_lines() -> Iterator[bytes]:
    """No JSON, or none that UTF-8 spells."""
    yield from (GOOD[:cut] for cut in range(1, len(GOOD), 2))  # writers that were killed
    yield from (b"{", b"}", b"[", b"{]", b"nul", b"'a'", b"{'messages': []}", b"<html>", b"a,b,c", b"\\", b'"', b"\0")
    yield from (GOOD[:5] + b"\0" + GOOD[5:], GOOD + b",", GOOD + GOOD, b"data: " + GOOD, b"\xef\xbb\xbf" + GOOD)
    yield from (GOOD.decode().encode(encoding) for encoding in ("utf-16", "utf-16-be", "utf-32"))
    yield from (b'{"a": "\xff"}', b'{"a": "\xc3"}', b'{"a": "\xed\xa0\x80"}', '{"a": "é"}'.encode("latin-1"))
    for depth in (300, 900, 5000):
        deep = b"[" * depth + b"]" * depth
        yield GOOD.replace(b'"Yes."', deep)
        yield GOOD.replace(b'"Yes."', b'"", "tool_calls": [{"name": "f", "arguments": ' + deep + b"}]")
    yield from (b"[" * 100_000, b'{"a":' * 100_000, b'{"a": ' + b"1" * 5000 + b"}", b'{"a": "\t"}', b"\x1f\x8b\x08")


def wrong_values() -> Iterator[object]:
    """JSON, but no record."""
    yield from (None, 7, -0.5, True, "text", [], [USER, ASSISTANT], [[]], {}, {"a": 1}, float("nan"), float("-inf"))
    yield from ({"messages": value} for value in [*NOT_STRINGS, "text", [None], [7], ["a"], [[]], [USER], NESTED])
    yield from ({"conversations": value} for value in [7, "text", {}, [7], [{"from": "human", "value": "Hi?"}]])
    yield from ({"prompt": value, "completion": "Yes."} for value in [*NOT_STRINGS[1:], "", " \n"] if value != [])
    yield from ({"prompt": "Hi?", "completion": value} for value in [*NOT_STRINGS, "", " \n", NESTED])
    yield from ({"instruction": value, "output": "Yes."} for value in [*NOT_STRINGS[1:], ""])
    yield from ({"instruction": "Hi?", "input": value, "output": "Yes."} for value in [7, ["a"], {"a": 1}])
    for turn in (
        *({"role": value, "content": "Yes."} for value in [*NOT_STRINGS, "", "Assistant", "bot", "x" * 10**5, NESTED]),
        *({"role": "assistant", "content": value} for value in [*NOT_STRINGS, "", "\u2028", "a\0", "\ud800", "\udfff"]),
        *({"role": "assistant", "content": "", "tool_calls": value} for value in [7, True, "{", [7], [{}], NESTED]),
        *({"role": "assistant", "content": "Yes.", "reasoning_content": value} for value in [7, ["a"], "\udc80"]),
        *({"from": value, "value": "Yes."} for value in [7, "robot", "GPT"]),
        {"role": "assistant"},
        {"content": "Yes."},
    ):
        yield {"messages": [USER, turn]}
    yield from ({"messages": [USER, ASSISTANT], "tools": value} for value in [7, "text", "[", [7], [None], [[]]])
    for value in (True, "0.5", "", [0.5], {}, float("nan"), float("inf"), -1e39, 10**400):
        yield {"messages": [USER, ASSISTANT], "advantage": value}


def malformed_lines() -> list[bytes]:
    lines = [*broken_lines(), *(json.dumps(value).encode() for value in wrong_values())]
    return [line.replace(b"\n", b" ") for line in lines]


def build(data: Path, **changes: object) -> TokenizedDataset:
    settings = {"seq_length": 10**5, "data_cache_dir": str(data.parent / "cache"), "skip_bad_records": True}
    config = DataConfig(data=(str(data),), **(settings | changes))
    return build_dataset(config.data, TOKENIZER, config, seed=0, show_progress=False, field="data")


def reported_places(data: Path) -> list[str]:
    (path,) = (data.parent / "cache").glob("*/bad.jsonl")
    return [json.loads(line)["source"] for line in path.read_text().splitlines()]


def test_two_hundred_malformed_lines_are_reported_each_by_its_line(tmp_path):
    """Every other line is good; line ends are of both kinds, and the last line is cut off."""
    bad = malformed_lines()
    assert len(bad) >= 200
    data = tmp_path / "a.jsonl"
    data.write_bytes(b"\xef\xbb\xbf" + b"".join(GOOD + b"\r\n" + line + b"\n" for line in bad) + GOOD[:-1])
    dataset = build(data)
    assert reported_places(data) == [f"{data}:{2 * number}" for number in range(1, len(bad) + 1)] + [
        f"{data}:{2 * len(bad) + 1}"
    ]
    assert [dataset.location(index) for index in range(len(dataset))] == [
        f"{data}:{2 * i + 1}" for i in range(len(bad))
    ]
    assert sum(dataset.statistics().dropped.values()) == len(bad) + 1
    with pytest.raises(UserError, match=f"{len(bad) + 1} of {2 * len(bad) + 1} records are bad") as error:
        build(data, skip_bad_records=False)
    assert f"{data}:2: " in str(error.value)
    assert f"all in {tmp_path}" in str(error.value)


HUGE = "word " * (2 * 2**20)


@pytest.mark.parametrize(
    "row",
    [
        {HUGE: 1},
        {"messages": [USER, {**ASSISTANT, HUGE: 1}]},
        {"messages": [USER, ASSISTANT], HUGE + "_kwargs": 1, "images": [1]},
        {"prompt": "Hi?", "completion": HUGE + "\0"},
        {"prompt": "Hi?", "completion": HUGE + "\ud800"},
        {"messages": [USER, {"role": HUGE, "content": "Yes."}]},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": HUGE}]},
    ],
    ids=[
        "key",
        "key of a message",
        "key beside another",
        "content with NUL",
        "content with surrogate",
        "role",
        "calls",
    ],
)
def test_ten_megabytes_in_a_bad_place_are_reported_in_a_line(tmp_path, row):
    data = tmp_path / "a.jsonl"
    data.write_bytes(GOOD + b"\n" + json.dumps(row).encode() + b"\n" + GOOD + b"\n")
    assert len(build(data)) == 2
    assert reported_places(data) == [f"{data}:2"]
    with pytest.raises(UserError) as error:
        build(data, skip_bad_records=False)
    assert len(str(error.value)) < 1000


@pytest.mark.slow
def test_a_record_of_ten_megabytes_is_long_and_named_by_its_line(tmp_path):
    data = tmp_path / "a.jsonl"
    data.write_bytes(GOOD + b"\n" + json.dumps({"prompt": "Hi?", "completion": HUGE}).encode() + b"\n" + GOOD + b"\n")
    with pytest.raises(UserError, match=rf"found 1 in 3: {data}:2 \(10\d{{6}} tokens\)"):
        build(data)
    dataset = build(data, overlong="drop")
    assert (len(dataset), dataset.statistics().dropped) == (2, {"over-long": 1})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("role", "content", "from", "value", "messages", "tool_calls", "function", "name", "arguments"),
                    *("type", "text", "weight", "train", "reasoning", "thinking", "tool_call_id", "zzz", "\ud800"),
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)
rows = st.dictionaries(
    st.sampled_from(
        [
            *("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "tools", "system"),
            *("chat_template_kwargs", "enable_thinking", "system_prompt", "images", "zzz", "zzz_kwargs", "\ud800"),
        ]
    ),
    json_values
    | st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "tool"]), "content": json_values},
            optional={key: json_values for key in ("weight", "loss", "thinking", "name", "zzz")},
        )
    ),
    max_size=4,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(rows | json_values, min_size=1, max_size=4))
def test_whatever_json_says_is_a_record_or_a_bad_record(tmp_path, values):
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(value) + "\n" for value in values))
    records, bad = read_records([str(data)], field="data")
    assert sorted(item.source for item in [*records, *bad]) == [f"{data}:{i + 1}" for i in range(len(values))]
    assert all(isinstance(record, Record) for record in records)
    assert all(isinstance(record, BadRecord) and record.reason for record in bad)


TYPES = {
    "int": pa.array([1]),
    "null": pa.array([None]),
    "float": pa.array([float("nan")]),
    "binary": pa.array([b"\xff"]),
    "list of ints": pa.array([[1]]),
    "struct": pa.array([{"a": 1}]),
    "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    "date": pa.array([10**6], pa.date32()),
    "date beyond Python's": pa.array([2**31 - 1], pa.date32()),
    "timestamp": pa.array([2**62], pa.timestamp("us")),
    "decimal": pa.array([None], pa.decimal128(5)),
    "dictionary": pa.array([""]).dictionary_encode(),
    "not UTF-8": pa.StringArray.from_buffers(1, *pa.array([b"\xff"], pa.binary()).buffers()[1:]),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("column", ["prompt", "completion", "messages"])
def test_columns_of_other_types_are_bad_records_by_their_row(tmp_path, kind, column):
    columns = {"prompt": pa.array(["Hi?"]), "completion": pa.array(["Yes."])} | {column: TYPES[kind]}
    if column == "messages":
        columns = {"messages": TYPES[kind]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    records, bad = read_records([str(tmp_path / "a.parquet")], field="data")
    assert not records
    assert [record.source for record in bad] == [f"{tmp_path}/a.parquet:1"]
