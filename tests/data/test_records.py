"""Which rows are records, and how the others are reported."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_psft.data.files import BadRecord
from megatron_psft.data.formats import RecordKeys
from megatron_psft.data.records import Record, iter_records, raise_or_report, read_records
from megatron_psft.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}
CHAT = (USER, ASSISTANT)
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
CALLING = ({"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "2"})
ACCEPTED = "messages; conversations; prompt and completion; instruction and output; text"
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {}}}


def write_rows(folder: Path, *rows: object) -> str:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_one(folder: Path, row: object, **keys: str) -> Record | BadRecord:
    records, bad = read_records([write_rows(folder, row)], RecordKeys(**keys), field="data")
    (item,) = [*records, *bad]
    return item


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT], "prompt": "other", "prompt_id": 7, "completion": "other"},
        {"messages": [{**USER, "id": "me"}, {**ASSISTANT, "tool_calls": None}], "tools": [], "advantage": None},
        {"prompt": "Hi?", "completion": "Yes."},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": "Yes."},
        {"prompt": "Hi?", "completion": [ASSISTANT]},
        {"prompt": [USER], "demonstration": "Yes."},
        {"prompt": [USER], "demostration": "Yes."},
        {"prompt": "Hi?", "completion": "Yes.", "demonstration": "No."},
        {"prompt": "Hi?", "completion": None, "demonstration": "Yes."},
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes.", "weight": None}]},
        {"conversations": [USER, ASSISTANT], "id": 7, "prompt": "other", "completion": "other"},
        {"instruction": "Hi?", "input": "", "output": "Yes."},
        {"instruction": "Hi?", "output": "Yes.", "history": [], "system": ""},
    ],
)
def test_every_form_gives_the_same_messages(tmp_path, row):
    record = read_one(tmp_path, row)
    assert isinstance(record, Record), record
    assert replace(record, prompt_length=0) == Record(messages=CHAT, source=f"{tmp_path}/a.jsonl:1")
    assert record.prompt_length == ("messages" not in row and "conversations" not in row)


def test_the_input_of_an_alpaca_record_follows_its_instruction(tmp_path):
    record = read_one(tmp_path, {"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert isinstance(record, Record)
    assert [message["content"] for message in record.messages] == ["Add.\n1, 2", "3"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "completion": "Yes."},
        {"messages": [{"role": "system", "content": "Be long."}, USER, ASSISTANT]},
        {"instruction": "Hi?", "output": "Yes.", "system": "Be long."},
    ],
)
def test_the_system_prompt_takes_the_place_of_each_record_s_own(tmp_path, row):
    record = read_one(tmp_path, row, system_prompt="Be brief.")
    assert isinstance(record, Record)
    assert record.messages == (SYSTEM, *CHAT)
    own = read_one(tmp_path, {**row, "system": "Be brief."} if "messages" not in row else {"messages": [SYSTEM, *CHAT]})
    assert isinstance(own, Record)
    assert own.messages == record.messages


@pytest.mark.parametrize(
    ("calls", "tools"),
    [
        ([CALL], [SCHEMA]),
        ([{"type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}], json.dumps([SCHEMA])),
        ([{"name": "add", "arguments": {"x": 1}}], json.dumps([SCHEMA["function"]])),
        (json.dumps([{"name": "add", "arguments": {"x": 1}}]), [SCHEMA["function"]]),
    ],
)
def test_calls_and_tools_have_one_form_however_they_are_spelled(tmp_path, calls, tools):
    calling = {"role": "assistant", "content": None, "tool_calls": calls}
    record = read_one(tmp_path, {"messages": [USER, calling, CALLING[1], ASSISTANT], "tools": tools})
    assert record == Record(messages=(USER, *CALLING, ASSISTANT), tools=(SCHEMA,), source=f"{tmp_path}/a.jsonl:1")


def test_turns_of_sharegpt_may_call_tools(tmp_path):
    turns = [("human", "Hi?"), ("function_call", '{"name": "add", "arguments": {"x": 1}}'), ("observation", "2")]
    row = {"conversations": [{"from": who, "value": text} for who, text in [*turns, ("gpt", "Yes.")]]}
    record = read_one(tmp_path, row)
    assert isinstance(record, Record)
    assert record.messages == (USER, *CALLING, ASSISTANT)


def test_columns_of_parquet_keep_the_arguments_of_each_call_apart(tmp_path):
    """Arrow gives every row the fields of all; what a row has not is null there, and is no argument."""
    calls = [{"function": {"name": "f", "arguments": {name: 1}}} for name in ("x", "y")]
    rows = [{"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]} for call in calls]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    records, bad = read_records([str(tmp_path / "a.parquet")], field="data")
    assert not bad
    found = [record.messages[1]["tool_calls"][0]["function"]["arguments"] for record in records]
    assert found == [{"x": 1}, {"y": 1}]


def test_reasoning_is_kept_beside_the_content(tmp_path):
    record = read_one(tmp_path, chat_with(reasoning_content="Hm."))
    assert isinstance(record, Record)
    assert record.messages == (USER, {**ASSISTANT, "reasoning_content": "Hm."})


def test_named_keys_win_over_messages_and_over_the_default_keys(tmp_path):
    row = {"question": "Hi?", "answer": "Yes.", "messages": [ASSISTANT], "prompt": "no", "demonstration": "no"}
    record = read_one(tmp_path, row, prompt="question", completion="answer")
    assert isinstance(record, Record)
    assert record.messages == CHAT


@pytest.mark.parametrize(
    ("row", "keys", "reason", "hint"),
    [
        ({"question": "Hi?", "answer": "Yes."}, {"completion": "answerr"}, "no key answerr", "did you mean answer?"),
        ({"question": "Hi?", "answer": "Yes."}, {"prompt": "questionn"}, "no key questionn", "did you mean question?"),
        ({"messages": [USER, ASSISTANT]}, {}, "no key question", "keys found: messages; accepted: question and answer"),
        ({"instruction": "Hi?", "output": "Yes."}, {}, "no key question", ""),
        ({"question": "Hi?", "completion": "Yes.", "conversations": []}, {}, "no key answer", ""),
        ({"question": "Hi?", "answer": None, "messages": [USER, ASSISTANT]}, {}, "no key answer", ""),
        ({"extra": {"answer": "Yes."}, "question": "Hi?"}, {"completion": "extra.answerr"}, "no key extra.answerr", ""),
    ],
)
def test_a_named_key_that_a_row_lacks_is_an_error_whatever_else_it_has(tmp_path, row, keys, reason, hint):
    bad = read_one(tmp_path, row, **{"prompt": "question", "completion": "answer"} | keys)
    assert isinstance(bad, BadRecord)
    assert (bad.reason, hint in bad.detail) == (reason, True)


@pytest.mark.parametrize("others", [{}, {"messages": [ASSISTANT]}, {"answer": "No."}])
def test_dots_in_a_named_key_go_into_objects(tmp_path, others):
    row = {"prompt": [USER], "extra_info": {"reply": {"text": "Yes."}, "split": "train"}, **others}
    record = read_one(tmp_path, row, completion="extra_info.reply.text")
    assert isinstance(record, Record)
    assert record.messages == CHAT


def test_a_key_that_has_dots_itself_is_no_path(tmp_path):
    row = {"a.b": "Hi?", "a": {"b": "no"}, "completion": "Yes."}
    record = read_one(tmp_path, row, prompt="a.b")
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
        (chat_with(content=[{"type": "text"}]), "wrong type", "messages[1].content[0].text is NoneType"),
        (chat_with(content={"text": "a"}), "wrong type", "messages[1] has content of type dict"),
        (chat_with(role=["assistant"]), "wrong type", "messages[1] has role of type list"),
        (
            chat_with(role="gpt"),
            "unknown role",
            "messages[1] has role 'gpt'; known: system, developer, user, assistant, tool",
        ),
        (chat_with(content=" \n"), "empty content", "messages[1], assistant"),
        ({"prompt": "", "completion": "Yes."}, "empty content", "prompt[0], user"),
        (chat_with(content="a\0b"), "NUL character", "messages[1]"),
        (chat_with(content="a\ud800b"), "lone surrogate", "messages[1]"),
        *(
            ({"messages": [USER, ASSISTANT], "advantage": value}, "wrong type", f"advantage is {name}, not a number")
            for value, name in [(True, "bool"), ("0.5", "str"), ("", "str"), ([0.5], "list")]
        ),
        *(
            ({"messages": [USER, ASSISTANT], "advantage": value}, "advantage is not finite in fp32", f"found {value!r}")
            for value in [float("nan"), float("inf"), -3.5e38, 10**39]
        ),
        ({"messages": [USER, ASSISTANT], "system": 7}, "wrong type", "system is int"),
        ({"messages": [SYSTEM, USER, ASSISTANT], "system": "x"}, "two system messages", ""),
        ({"messages": [USER, ASSISTANT], "tools": 7}, "wrong type", "tools is not a list of objects"),
        ({"messages": [USER, ASSISTANT], "tools": "[{"}, "not JSON", "tools: "),
        ({"messages": [USER, ASSISTANT], "tools": [{"name": "\ud800"}]}, "lone surrogate", "tools"),
        ({"messages": [USER, ASSISTANT], "tools": [{"x": float("nan")}]}, "not JSON", "tools: "),
        (chat_with(tool_calls=7), "wrong type", "messages[1] has tool_calls of type int"),
        (chat_with(tool_calls=[{}]), "wrong type", "messages[1].tool_calls[0] is not an object with the name"),
        (chat_with(tool_calls=[{"name": "f", "arguments": [1]}]), "wrong type", "has arguments of type list"),
        (chat_with(tool_calls=[{"name": "f", "arguments": "{"}]), "not JSON", "tool_calls[0], arguments: "),
        (chat_with(tool_calls=[{"name": "f", "arguments": {"x": "\ud800"}}]), "lone surrogate", "tool_calls[0]"),
        (
            {"messages": [{**USER, "tool_calls": [CALL]}, ASSISTANT]},
            "tool_calls outside an assistant turn",
            "messages[0], user",
        ),
        (chat_with(reasoning_content=7), "wrong type", "reasoning_content of type int"),
        (chat_with(reasoning_content="\ud800"), "lone surrogate", "messages[1], reasoning_content"),
        (
            {"messages": [{**USER, "reasoning_content": "Hm."}, ASSISTANT]},
            "reasoning_content outside an assistant turn",
            "messages[0], user",
        ),
        (
            {"conversations": [{"from": "robot", "value": "Hi?"}]},
            "unknown role",
            "conversations[0] has from 'robot'; known: human, gpt, function_call, observation, system, developer",
        ),
        ({"conversations": [{"from": "human", "value": 7}]}, "wrong type", "has value of type int"),
        ({"conversations": [{"from": "human", "value": "Hi?"}]}, "no assistant turn", ""),
        ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "not JSON", "conversations[0], calls: "),
        ({"instruction": 7, "output": "Yes."}, "wrong type", "instruction is int"),
        ({"instruction": "Hi?", "output": ""}, "empty content", "output, assistant"),
        ({}, "no known keys", f"keys found: none; accepted: {ACCEPTED}"),
        (
            {"prompt": "Hi?", "completions": "Yes."},
            "no known keys",
            f"keys found: prompt, completions; accepted: {ACCEPTED}; did you mean completion?",
        ),
        ({"message": [USER, ASSISTANT]}, "no known keys", "did you mean messages?"),
        ({f"k{i}": i for i in range(11)}, "no known keys", "k8, k9, ...; accepted: "),
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
    records, bad = read_records([str(tmp_path / "train.parquet")], field="data")
    assert records == [Record(messages=CHAT, source=f"{tmp_path}/train.parquet:1", prompt_length=1)]
    assert not bad


def test_good_and_bad_rows_stay_in_order_over_several_files(tmp_path):
    (tmp_path / "b").mkdir()
    good = {"messages": [USER, ASSISTANT]}
    paths = [write_rows(tmp_path, good, {}, good), write_rows(tmp_path / "b", 1, good)]
    items = list(iter_records(paths, RecordKeys(), field="data"))
    assert [(type(item), item.source) for item in items] == [
        (Record, f"{paths[0]}:1"),
        (BadRecord, f"{paths[0]}:2"),
        (Record, f"{paths[0]}:3"),
        (BadRecord, f"{paths[1]}:1"),
        (Record, f"{paths[1]}:2"),
    ]
    records, bad = read_records(paths, field="data")
    assert [*records, *bad] == [items[0], items[2], items[4], items[1], items[3]]


def test_a_missing_file_stops_before_the_first_record(tmp_path):
    items = iter_records(
        [write_rows(tmp_path, {"messages": [USER, ASSISTANT]}), str(tmp_path / "gone.jsonl")],
        RecordKeys(),
        field="data",
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
    assert raise_or_report("data", bad, counts, 40, skip_bad_records=True) == REPORT
    for skip, remedy in ((False, "fix them or pass --skip-bad-records"), (None, "fix them")):
        with pytest.raises(UserError) as error:
            raise_or_report("demonstrations", bad, counts, 40, skip_bad_records=skip)
        assert str(error.value) == f"demonstrations must hold no bad record; {remedy}: {REPORT}"


@pytest.mark.parametrize("skip", [True, False, None])
def test_no_usable_record_is_an_error_even_when_bad_ones_are_skipped(skip):
    with pytest.raises(UserError, match=r"^valid_data holds no usable record.*22 of 22"):
        raise_or_report("valid_data", BAD, {"not JSON": 22}, 22, skip_bad_records=skip)
    with pytest.raises(UserError, match=r"holds no usable record.*0 of 0"):
        raise_or_report("data", [], {}, 0, skip_bad_records=skip)


def test_good_records_alone_give_an_empty_report():
    assert raise_or_report("data", [], {}, 3, skip_bad_records=False) == ""


@pytest.mark.parametrize(
    ("name", "keys", "count"),
    [
        ("gsm8k/test.jsonl", {"prompt": "question", "completion": "answer"}, 1319),
        ("longcot/limo_official_solution.jsonl", {}, 492),
        ("general/instruction_data.json", {}, 1100),
        ("general/glaive_function_calling_demo.json", {}, 300),
    ],
)
def test_real_files_are_records_throughout(real_data, name, keys, count):
    records, bad = read_records([str(real_data / name)], RecordKeys(**keys), field="data")
    assert (len(records), bad) == (count, [])


def test_prompts_without_completions_are_bad_records(real_data):
    records, bad = read_records([str(real_data / "eval/amc.parquet")], field="data")
    assert not records
    assert {record.reason for record in bad} == {"no known keys"}
    assert len(bad) == 1280
