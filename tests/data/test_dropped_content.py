"""What a row says is trained on or refused by name: places where it was left out before."""

import pytest

from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.formats import RecordKeys
from megatron_psft.data.pairs import parse_pair
from megatron_psft.data.records import read_records
from megatron_psft.errors import UserError
from tests.data.spelled import AGAIN, CHAT, RIGHT, USER, WRONG, answered, both_forms, good, reason


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"context": ["x is 2.", "y is 2."]}, "context"),
        ({"Contexts": {"title": ["Numbers"], "sentences": [["x is 2."]]}}, "Contexts"),
        ({"instruction": "Add."}, "instruction"),
        ({"input": [USER]}, "input"),
        ({"image_1": {"bytes": "x"}}, "image_1"),
        ({"image2": "a.png"}, "image2"),
    ],
)
def test_what_stands_beside_a_prompt_is_refused(more, key):
    row = {"prompt": "2+2?", "completion": "4", **more}
    assert reason(row).startswith(f"row key {key} is not ")
    assert good(row, ignored=(key,)).messages == (USER, RIGHT)
    pair = {"prompt": "2+2?", "chosen": "4", "rejected": "5", **more}
    bad = parse_pair(Row(source="a:1", value=pair), RecordKeys(are_pairs=True))
    assert isinstance(bad, BadRecord)
    assert bad.reason.startswith(f"row key {key} is not ")


def test_a_number_beside_a_prompt_is_no_content():
    assert good({"prompt": "2+2?", "completion": "4", "document": 17}).messages == (USER, RIGHT)


@pytest.mark.parametrize("key", ["completion", "output", "response", "answer"])
def test_an_answer_beside_a_conversation_that_ends_without_one_is_refused(key):
    for row in both_forms([*CHAT, AGAIN]):
        assert reason({**row, key: "Yes."}).startswith(f"row key {key} is not read beside a conversation that ends")
        assert len(good({**row, key: "Yes."}, ignored=(key,)).messages) == 5
        assert len(good({**row, key: AGAIN["content"]}).messages) == 5  # it is there
    for row in both_forms(CHAT):
        assert len(good({**row, key: "Yes."}).messages) == 4


@pytest.mark.parametrize("form", ["OpenAI", "bare"])
@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"parameters": {"x": 1}}, "call with the key parameters"),
        ({"args": {"x": 1}}, "call with the key args"),
        ({"arguments": {"x": 1}, "result": "2"}, "call with the key result"),
    ],
)
def test_a_call_whose_arguments_stand_under_another_key_is_refused(form, more, part):
    call = {"name": "add", **more}
    calls = [call if form == "bare" else {"type": "function", "function": call}]
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": calls}]}
    assert reason(row).startswith(part)


def test_a_call_has_its_id_or_is_refused():
    call = {"type": "function", "index": 0, "function": {"name": "add", "arguments": {"x": 1}, "parameters": {}}}
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{**call, "id": "a"}]}]}
    assert good(row).messages[1]["tool_calls"][0]["id"] == "a"
    row["messages"][1]["tool_calls"][0]["id"] = 7
    assert reason(row) == "wrong type"


@pytest.mark.parametrize(("key", "why"), [("question", "no prompt"), ("input", "row key input is not read")])
def test_a_pair_without_a_prompt_is_refused(key, why):
    row = {"chosen": [RIGHT], "rejected": [WRONG], key: "2+2?"}
    bad = parse_pair(Row(source="a:1", value=row), RecordKeys(are_pairs=True))
    assert isinstance(bad, BadRecord)
    assert bad.reason.startswith(why)


def test_a_key_that_comes_twice_and_a_text_that_does_not_end_are_errors(tmp_path):
    lines = [
        '{"prompt": "a", "prompt": "b", "completion": "c"}',
        '{"messages": [{"role": "user", "role": "assistant"}]}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    records, bad = read_records([str(path)], field="data")
    assert records == []
    wanted = "not JSON (key {!r} comes twice in an object)"
    assert [str(one) for one in bad] == [f"{path}:{n}: {wanted.format(k)}" for n, k in ((1, "prompt"), (2, "role"))]
    path.write_text('{"prompt": "a', encoding="utf-8")
    (cut,) = read_records([str(path)], field="data")[1]
    assert cut.detail == "Unterminated string starting at column 12"
    path.with_suffix(".json").write_text('[{"prompt": "a', encoding="utf-8")
    with pytest.raises(UserError, match="Unterminated string starting at line 1, column 13;"):
        read_records([str(path.with_suffix(".json"))], field="data")
    path.with_suffix(".json").write_text(f"[{lines[0]}]", encoding="utf-8")
    with pytest.raises(UserError, match="key 'prompt' comes twice"):
        read_records([str(path.with_suffix(".json"))], field="data")


@pytest.mark.parametrize(
    "key",
    [
        *(
            "Complex_CoT",
            "CoT",
            "thinking_trajectories",
            "deepseek_thinking_trajectory",
            "reasoning_trace",
            "thinkContent",
        ),
        *("reasoning_steps", "deepseek_reasoning", "model-reasoning", "thinking process", "qwq_thoughts", "scratchpad"),
        *("generated_reasoning_2", "reasoning_path", "chain_of_thought_en"),
    ],
)
@pytest.mark.parametrize("value", ["Hm.", ["Hm.", "So."], [{"step": 1, "text": "Hm."}]])
def test_a_column_of_reasoning_is_refused_under_any_name(key, value):
    row = {"prompt": "2+2?", "completion": "4", key: value}
    assert "is not supported: give reasoning as reasoning_content" in reason(row)
    assert good(row, ignored=(key,)).messages == (USER, RIGHT)
    assert "message key" in reason(answered(**{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("reasoning_effort", "high"), ("thinking_budget", 1024), ("reasoning_language", "en"), ("cot_type", "long")),
        *(("reasoning_tokens", 17), ("reasoning_model", "a/b"), ("thinking_mode", "auto"), ("reasoning_score", 0.5)),
        *(("is_reasoning_complete", [True]), ("reasoning_trace", " "), ("reasoning_traces", [""]), ("cottage", "x")),
    ],
)
def test_what_is_about_reasoning_and_is_none_is_no_reason_to_refuse_a_row(key, value):
    assert good({"messages": [USER, RIGHT], key: value}).messages == (USER, RIGHT)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((name, False) for name in ("is_target", "is_label", "is_learnable", "is_supervised", "was_ignored")),
        *(("is_ignored", True), ("labels", False), ("labels", [0, 1]), ("used_in_training", False)),
        *(("used_in_training", 0), ("labels", 0)),
    ],
)
def test_a_message_key_that_says_what_is_learned_is_refused(key, value):
    assert reason(answered(**{key: value})).startswith(f"message key {key} is not ")
    assert good(answered(**{key: value}), ignored=(key,)).messages == (USER, RIGHT)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("labels", [0, 1]), ("labels", False), ("label", [0, 1]), ("target_turns", [3]), ("targetTurns", 3)),
        *(
            ("mask_history", 1),
            ("mask_history", 1.0),
            ("mask_history", "true"),
            ("train_on_last_turn_only", 1),
            ("train_on", "last"),
        ),
        *(("maskPrompt", "No"), ("used_in_training", False), ("is_target", False), ("loss_on", "all")),
    ],
)
def test_a_row_key_that_says_what_is_learned_is_refused(key, value):
    row = {"messages": [USER, RIGHT], key: value}
    assert reason(row).startswith(f"row key {key} is not ")
    assert good(row, ignored=(key,)).messages == (USER, RIGHT)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("label", "math"), ("label", 1), ("labels", ["a"]), ("labels", 0), ("label_name", "x"), ("target", "x")),
        *(
            ("train_size", 100),
            ("train_count", 1),
            ("n_masked", 1),
            ("training_source", "web"),
            ("mask_token", "[MASK]"),
        ),
        *(("train_id", 1), ("label_id", 0), ("targets", ["4"]), ("training_data", "yes, it is")),
    ],
)
def test_labels_and_counts_of_a_row_are_harmless(key, value):
    assert good({"messages": [USER, RIGHT], key: value}).messages == (USER, RIGHT)
