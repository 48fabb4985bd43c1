"""Which rows are records, and how the others are reported."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_psft.data.records import BadRecord, Record, RecordKeys, iter_records, raise_or_report, read_records
from megatron_psft.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}
CHAT = (USER, ASSISTANT)


def write_rows(folder: Path, *rows: object) -> str:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_one(folder: Path, row: object, **keys: str) -> Record | BadRecord:
    records, bad = read_records([write_rows(folder, row)], RecordKeys(**keys))
    (item,) = [*records, *bad]
    return item


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT], "prompt": "other", "prompt_id": 7, "completion": "other"},
        {"messages": [{**USER, "name": "me"}, {**ASSISTANT, "tool_calls": None}], "tools": [], "advantage": None},
        {"prompt": "Hi?", "completion": "Yes."},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": "Yes."},
        {"prompt": "Hi?", "completion": [ASSISTANT], "messages": None},
        {"prompt": [USER], "demonstration": "Yes."},
        {"prompt": [USER], "demostration": "Yes."},
        {"prompt": "Hi?", "completion": "Yes.", "demonstration": "No."},
        {"prompt": "Hi?", "completion": None, "demonstration": "Yes."},
    ],
)
def test_every_form_gives_the_same_messages(tmp_path, row):
    assert read_one(tmp_path, row) == Record(messages=CHAT, source=f"{tmp_path}/a.jsonl:1")


def test_named_keys_win_over_messages_and_over_the_default_keys(tmp_path):
    row = {"question": "Hi?", "answer": "Yes.", "messages": [ASSISTANT], "prompt": "no", "demonstration": "no"}
    record = read_one(tmp_path, row, prompt="question", completion="answer")
    assert isinstance(record, Record)
    assert record.messages == CHAT


def test_rows_without_the_named_keys_may_still_be_messages(tmp_path):
    record = read_one(tmp_path, {"messages": [USER, ASSISTANT]}, prompt="question", completion="answer")
    assert isinstance(record, Record)
    assert record.messages == CHAT


def test_a_conversation_may_have_many_roles_and_end_with_the_user(tmp_path):
    messages = ({"role": "system", "content": ""}, USER, ASSISTANT, {"role": "tool", "content": "7"}, ASSISTANT, USER)
    record = read_one(tmp_path, {"messages": messages})
    assert isinstance(record, Record)
    assert record.messages == messages


def chat_with(**changes: object) -> dict[str, object]:
    return {"messages": [USER, {**ASSISTANT, **changes}]}


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ([USER, ASSISTANT], "not an object", "found list"),
        (None, "not an object", "found NoneType"),
        ({"messages": [USER]}, "no assistant turn", ""),
        ({"messages": []}, "no assistant turn", ""),
        ({"prompt": "Hi?", "completion": [USER]}, "no assistant turn", ""),
        ({"messages": "Hi?"}, "wrong type", "messages is str"),
        ({"messages": [USER, "Yes."]}, "wrong type", "messages[1] is str, not an object"),
        ({"prompt": 1, "completion": "Yes."}, "wrong type", "prompt is int"),
        ({"prompt": "Hi?", "completion": {"a": 1}}, "wrong type", "completion is dict"),
        (chat_with(content=None), "wrong type", "messages[1] has content of type NoneType, not a string"),
        (chat_with(content=[{"type": "text"}]), "wrong type", "messages[1] has content of type list"),
        (chat_with(role=["assistant"]), "wrong type", "messages[1] has role of type list"),
        (chat_with(role="gpt"), "unknown role", "messages[1] has role 'gpt'; known: system, user, assistant, tool"),
        (chat_with(content=" \n"), "empty content", "messages[1], assistant"),
        ({"prompt": "", "completion": "Yes."}, "empty content", "prompt[0], user"),
        (chat_with(content="a\0b"), "NUL character", "messages[1]"),
        (chat_with(content="a\ud800b"), "lone surrogate", "messages[1]"),
        ({"messages": [USER, ASSISTANT], "advantage": 0.0}, "advantage is not supported yet", ""),
        (chat_with(function_call={"name": "f"}), "function_call is not supported yet", ""),
        ({}, "no known keys", "keys found: none; wanted: messages, or prompt and completion"),
        (
            {"prompt": "Hi?", "completions": "Yes."},
            "no known keys",
            "keys found: prompt, completions; wanted: messages, or prompt and completion; did you mean completions?",
        ),
        ({"message": [USER, ASSISTANT]}, "no known keys", "did you mean message?"),
        ({f"k{i}": i for i in range(11)}, "no known keys", "k8, k9, ...; wanted"),
    ],
)
def test_a_row_that_is_no_record_is_named_with_its_reason(tmp_path, row, reason, detail):
    bad = read_one(tmp_path, row)
    assert isinstance(bad, BadRecord)
    assert (bad.source, bad.reason) == (f"{tmp_path}/a.jsonl:1", reason)
    assert detail in bad.detail
    assert bad.detail or not detail


def test_columns_of_the_reference_parquet_are_read(tmp_path):
    rows = [{"data_source": "limo", "prompt": [USER], "demonstration": "Yes."}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    records, bad = read_records([str(tmp_path / "train.parquet")])
    assert records == [Record(messages=CHAT, source=f"{tmp_path}/train.parquet:1")]
    assert not bad


def test_good_and_bad_rows_stay_in_order_over_several_files(tmp_path):
    (tmp_path / "b").mkdir()
    good = {"messages": [USER, ASSISTANT]}
    paths = [write_rows(tmp_path, good, {}, good), write_rows(tmp_path / "b", 1, good)]
    items = list(iter_records(paths, RecordKeys()))
    assert [(type(item), item.source) for item in items] == [
        (Record, f"{paths[0]}:1"),
        (BadRecord, f"{paths[0]}:2"),
        (Record, f"{paths[0]}:3"),
        (BadRecord, f"{paths[1]}:1"),
        (Record, f"{paths[1]}:2"),
    ]
    records, bad = read_records(paths)
    assert [*records, *bad] == [items[0], items[2], items[4], items[1], items[3]]


def test_a_missing_file_stops_before_the_first_record(tmp_path):
    items = iter_records(
        [write_rows(tmp_path, {"messages": [USER, ASSISTANT]}), str(tmp_path / "gone.jsonl")], RecordKeys()
    )
    with pytest.raises(UserError, match=r"gone\.jsonl\) does not exist"):
        next(items)


BAD = [BadRecord(source=f"a:{i}", reason="not JSON", detail=f"column {i}") for i in range(1, 23)]
REPORT = "\n".join(
    [
        "23 of 40 records are bad",
        *(f"  a:{i}: not JSON (column {i})" for i in range(1, 21)),
        "  ... and 3 more",
        "  22 x not JSON",
        "  1 x no assistant turn",
    ]
)


def test_the_report_lists_twenty_records_and_counts_reasons():
    bad = [*BAD, BadRecord(source="b:1", reason="no assistant turn")]
    counts = {"no assistant turn": 1, "not JSON": 22}
    assert raise_or_report(bad, counts, 40, skip_bad_records=True) == REPORT
    with pytest.raises(UserError, match="pass --skip-bad-records") as error:
        raise_or_report(bad, counts, 40, skip_bad_records=False)
    assert str(error.value).endswith(REPORT)


@pytest.mark.parametrize("skip", [True, False])
def test_no_usable_record_is_an_error_even_when_bad_ones_are_skipped(skip):
    with pytest.raises(UserError, match=r"holds no usable record.*22 of 22"):
        raise_or_report(BAD, {"not JSON": 22}, 22, skip)
    with pytest.raises(UserError, match=r"holds no usable record.*0 of 0"):
        raise_or_report([], {}, 0, skip)


def test_good_records_alone_give_an_empty_report():
    assert raise_or_report([], {}, 3, skip_bad_records=False) == ""


@pytest.mark.parametrize(
    ("name", "keys", "count"),
    [
        ("gsm8k/test.jsonl", {"prompt": "question", "completion": "answer"}, 1319),
        ("longcot/limo_official_solution.jsonl", {}, 492),
        ("general/instruction_data.json", {}, 1100),
    ],
)
def test_real_files_are_records_throughout(real_data, name, keys, count):
    records, bad = read_records([str(real_data / name)], RecordKeys(**keys))
    assert (len(records), bad) == (count, [])


def test_prompts_without_completions_are_bad_records(real_data):
    records, bad = read_records([str(real_data / "eval/amc.parquet")])
    assert not records
    assert {record.reason for record in bad} == {"no known keys"}
    assert len(bad) == 1280
