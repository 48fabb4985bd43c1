"""Which keys of rows and messages are refused, harmless or ignored, in every format that has them."""

import json
from collections import Counter

import pytest

from megatron_psft.config.inputs import DataConfig
from megatron_psft.data import keys
from megatron_psft.data.dataset import TokenizedDataset, build_dataset
from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.formats import PAIR_FORMATS, RECORD_FORMATS, RecordKeys
from megatron_psft.data.pairs import Pair, parse_pair
from megatron_psft.errors import UserError
from tests.data import toys
from tests.data.spelled import CHAT, RIGHT, USER, WRONG, answered, both_forms, good, parse, reason, sharegpt
from tests.data.toys import byte_tokenizer


@pytest.mark.parametrize("form", [0, 1], ids=["messages", "ShareGPT"])
@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("weightt", 0, "is not known; did you mean weight? --ignore-keys weightt leaves it out"),
        ("thoughts", "Hm.", "did you mean thought?"),
        ("is_trained", False, "is not known"),
        ("learn", False, "is not known"),
        ("prefix", True, "is not known"),
        ("zzz", 1.5, "message key zzz is not known; --ignore-keys zzz"),
        ("plan", {"steps": ["a"]}, "is not known"),
        ("images", ["a.png"], "is not supported: only text is trained on"),
        ("name", "bob", "is not supported: outside a tool's turn"),
        ("function_call", {"name": "f"}, "is not supported: give it as tool_calls"),
        ("loss_scale", 0.1, "is not supported: give weight 0 or 1"),
        ("reasoning_details", [{"text": "Hm."}], "give the text as reasoning_content"),
        ("a key\nof two lines", 1, r"message key 'a key\nof two lines' is not known"),
    ],
)
def test_a_message_key_that_is_not_known_is_refused_by_name_and_can_be_ignored(form, key, value, part):
    row = both_forms([USER, {**RIGHT, key: value}])[form]
    assert part in reason(row)
    assert good(row, ignored=(key,)).messages == (USER, RIGHT)


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (answered(foo="x", bar="y", id=7), "message key foo is not known", "messages[1]; so are bar"),
        ({**answered(), "images": ["x"], "loss_mask": [1], "id": 7}, "row key images is not", "so are loss_mask"),
    ],
)
def test_all_keys_that_are_refused_are_named(row, reason, detail):
    bad = parse(row)
    assert isinstance(bad, BadRecord)
    assert bad.reason.startswith(reason)
    assert bad.detail == detail


@pytest.mark.parametrize(
    "extra",
    [
        {"weightt": None, "zzz": "", "name": [], "plan": {}},
        {"id": "a", "uuid": "b", "source": "x", "timestamp": "2024-01-01", "lang": "en", "metadata": {"a": 1}},
        {"message_id": "a", "parent_id": "b", "created_date": "x", "review_count": 3, "synthetic": False, "rank": 0},
        {"country": "x", "hashed_ip_id": "x", "header": {"a": "b"}, "redacted": False, "toxic": True, "state": "x"},
        {"model": "x", "model_name": "x", "num_tokens": 3, "finish_reason": "stop", "usage": {"total_tokens": 3}},
        {"is_correct": True, "score": 0.5, "quality_score": 1, "tokens": 7, "turn_identifier": 5, "annotations": [1]},
    ],
)
def test_what_messages_of_public_sets_carry_besides_is_harmless(extra):
    assert good(answered(**extra)) == good({"messages": [USER, RIGHT]})


def test_a_tool_s_turn_keeps_its_name_and_the_call_it_answers():
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "function": {"name": "f"}}]}
    tool = {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "f"}
    assert good({"messages": [USER, call, tool, RIGHT]}).messages[2] == tool
    assert reason({"messages": [USER, call, {**tool, "name": 7}, RIGHT]}) == "wrong type"


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("images", ["a.png"], "is not supported: only text is trained on; --ignore-keys images leaves it out"),
        ("image", "a.png", "is not supported: only text"),
        ("Image", {"path": "a.png"}, "is not supported: only text"),
        ("functions", [{"name": "f"}], "is not supported: give schemas of functions under tools"),
        ("history", [["a", "b"]], "is not supported: give earlier turns as messages"),
        ("documents", [{"text": "a"}], "is not supported: write them into the messages"),
        ("loss_mask", [0, 0, 0, 1], "is not supported: give weight 0"),
        ("weight", 0, "is not supported: advantage weighs a record"),
        ("train", False, "is not supported"),
        ("sample_weights", 0.2, "is not supported: advantage weighs a record"),
        ("lossWeights", 0, "is not supported: advantage weighs a record"),
        ("Rationale", "2 and 2.", "is not supported: give reasoning as reasoning_content"),
        ("systemPrompt", "Be brief.", "is not known; did you mean system_prompt?"),
        ("systemm", "Be brief.", "is not known; did you mean system?"),
        ("system_instruction", "Be brief.", "is not known; did you mean system?"),
        ("tool", [{"name": "f"}], "is not known; did you mean tools?"),
        ("advantages", 0.5, "is not known; did you mean advantage?"),
        ("enable_thinkin", True, "is not known; did you mean enable_thinking?"),
        ("template_kwargs", {"enable_thinking": False}, "is not known"),
        ("thinking_mode", False, "is not known"),
        ("label", True, "is not known"),
        ("messages_mask", [1, 0], "is not known"),
        ("conversation", [USER, RIGHT], "is not known"),
        ("raw", sharegpt([USER, RIGHT]), "is not known"),
        ("turn", RIGHT, "is not known"),
    ],
)
def test_a_row_key_that_may_change_what_is_learned_is_refused_and_can_be_ignored(key, value, part):
    for row in (*both_forms([USER, RIGHT]), {"prompt": "2+2?", "completion": "4"}):
        found = reason({**row, key: value})
        assert found.startswith(f"row key {key} ")
        assert part in found
        assert good({**row, key: value}, ignored=(key,)).messages == (USER, RIGHT)
    pair = {"prompt": "2+2?", "chosen": "4", "rejected": "5", key: value}
    bad = parse_pair(Row(source="a:1", value=pair), RecordKeys())
    assert isinstance(bad, BadRecord)
    assert bad.reason == found
    assert isinstance(parse_pair(Row(source="a:1", value=pair), RecordKeys(ignored=(key,))), Pair)


@pytest.mark.parametrize(
    ("row", "settings", "key"),
    [
        ({"instruction": "Add", "output": "4", "inputs": "2 and 2"}, {}, "inputs"),
        ({"instruction": "Add", "output": "4", "Input": "2 and 2"}, {}, "Input"),
        ({"instruction": "Add", "output": "4", "context": "2 and 2"}, {}, "context"),
        ({"prompt": "Add", "completion": "4", "Context": "2 and 2"}, {}, "Context"),
        ({"prompt": "Add", "completion": "4", "passage": "2 and 2"}, {}, "passage"),
        (
            {"instruction": "Add", "output": "4", "input": "2 and 2"},
            {"prompt": "instruction", "completion": "output"},
            "input",
        ),
        (
            {"instruction": "Add", "response": "4", "context": "2 and 2", "category": "sums"},
            {"prompt": "instruction", "completion": "response"},
            "context",
        ),
    ],
)
def test_text_of_the_prompt_under_a_key_that_the_format_does_not_read_is_refused(row, settings, key):
    assert reason(row, **settings).startswith(f"row key {key} is not ")
    assert good({**row, key: ""}, **settings).messages[0] == {"role": "user", "content": "Add"}
    assert good(row, **settings, ignored=(key,)).messages[0] == {"role": "user", "content": "Add"}
    assert good({"messages": [USER, RIGHT], "context": "x", "input": "y"}).messages == (USER, RIGHT)


NAMED = {"prompt": "problem", "completion": "solution"}
PUBLIC_ROWS = {
    "Tulu 3": ({"id": "a", "source": "b", "messages": CHAT}, {}),
    "UltraChat": ({"prompt": "2+2?", "prompt_id": "a", "messages": CHAT}, {}),
    "SmolTalk 2": (
        {
            "messages": CHAT,
            "chat_template_kwargs": {"custom_instructions": "", "enable_thinking": False, "python_tools": []},
            "source": "a",
        },
        {},
    ),
    "OpenThoughts": ({"system": "Be brief.", "conversations": sharegpt(CHAT)}, {}),
    "OpenR1-Math": (
        {
            "problem": "2+2?",
            "solution": "4",
            "answer": "4",
            "problem_type": "Algebra",
            "question_type": "math-word-problem",
            "problem_is_valid": "Yes",
            "uuid": "a",
            "is_reasoning_complete": [True, False],
            "generations": ["<think>\n</think>4"],
            "correctness_math_verify": [True, True],
            "correctness_llama": None,
            "finish_reasons": ["stop"],
            "correctness_count": 2,
            "messages": CHAT,
        },
        {},
    ),
    "NuminaMath 1.5": (
        {
            "problem": "2+2?",
            "solution": "4",
            "answer": "4",
            "problem_type": "Algebra",
            "problem_is_valid": "Yes",
            "solution_is_valid": "Yes",
            "source": "a",
            "synthetic": False,
        },
        NAMED,
    ),
    "GSM8K": ({"question": "2+2?", "answer": "4"}, {"prompt": "question", "completion": "answer"}),
    "MATH": ({"problem": "2+2?", "level": "Level 1", "type": "Algebra", "solution": "4"}, NAMED),
    "verl": (
        {
            "data_source": "a",
            "prompt": [USER],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"answer": "4", "index": 3, "question": "2+2?", "split": "train"},
        },
        {"completion": "extra_info.answer"},
    ),
    "UltraFeedback, chosen side": (
        {
            "prompt": "2+2?",
            "prompt_id": "a",
            "chosen": [USER, RIGHT],
            "rejected": [USER, WRONG],
            "messages": [USER, RIGHT],
            "score_chosen": 8.5,
            "score_rejected": 2.0,
        },
        {},
    ),
    "OpenOrca": (
        {"id": "a", "system_prompt": "Be brief.", "question": "2+2?", "response": "4"},
        {"prompt": "question", "completion": "response"},
    ),
    "Infinity-Instruct": (
        {
            "id": 1,
            "conversations": sharegpt(CHAT),
            "label": {"ability_en": ["sums"], "cate_ability_en": ["math"]},
            "langdetect": "en",
            "source": "a",
            "reward": 1.5,
        },
        {},
    ),
    "Magpie": (
        {
            "conversation_id": "a",
            "instruction": "2+2?",
            "response": "4",
            "conversations": sharegpt(CHAT),
            "gen_input_configs": {"temperature": 1.0, "top_p": 1.0},
            "intent": "to add",
            "knowledge": "sums",
            "difficulty": "easy",
            "task_category": "Math",
            "input_quality": "good",
            "quality_explanation": "x",
            "llama_guard_2": "safe",
            "reward_model": "x",
            "instruct_reward": 1.2,
            "min_neighbor_distance": 0.1,
            "repeat_count": 0,
            "min_similar_uuid": None,
            "input_length": 4,
            "output_length": 1,
            "language": "EN",
        },
        {},
    ),
    "OpenAI fine-tuning": (
        {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f"}}], "parallel_tool_calls": False},
        {},
    ),
    "a frame written by pandas": ({"prompt": "2+2?", "completion": "4", "__index_level_0__": 7, "Unnamed: 0": 7}, {}),
}


@pytest.mark.parametrize("name", PUBLIC_ROWS)
def test_columns_of_public_sets_do_not_make_them_unusable(name):
    row, settings = PUBLIC_ROWS[name]
    record = good(row, **settings)
    assert record.messages[-1] == RIGHT
    assert [message["content"] for message in record.messages if message["role"] == "system"] in ([], ["Be brief."])


def test_keys_of_a_pair_s_messages_can_be_ignored():
    row = {"prompt": "2+2?", "chosen": {**RIGHT, "zzz": "x"}, "rejected": [{**WRONG, "zzz": "x"}]}
    assert isinstance(parse_pair(Row(source="a:1", value=row), RecordKeys(ignored=("zzz",))), Pair)
    bad = parse_pair(Row(source="a:1", value=row), RecordKeys())
    assert isinstance(bad, BadRecord)
    assert "message key zzz" in bad.reason


def test_a_named_prompt_that_a_pair_lacks_is_an_error_whatever_else_it_has():
    row = {"question": "2+2?", "messages": [USER], "chosen": "4", "rejected": "5"}
    bad = parse_pair(Row(source="a:1", value=row), RecordKeys(prompt="ask", are_pairs=True))
    assert isinstance(bad, BadRecord)
    assert bad.reason == "no key ask"


def test_no_key_has_two_meanings():
    for groups in ((keys.ROW_HEEDED, keys.ROW_REFUSED), (keys.MESSAGE_HEEDED, keys.MESSAGE_REFUSED)):
        names = Counter(name for group in groups for entry in group for name in entry.names)
        assert {name for name, count in names.items() if count > 1} <= {"name"}  # a tool's is heeded
        assert names.keys().isdisjoint(keys.HARMLESS)


@pytest.mark.parametrize("name", [name for group in keys.ROW_REFUSED for name in group.names])
def test_every_refused_key_of_a_row_is_refused(name):
    assert reason({"messages": [USER, RIGHT], name: "x"}).startswith(f"row key {name} is not supported")


@pytest.mark.parametrize("name", [name for group in keys.MESSAGE_REFUSED for name in group.names])
def test_every_refused_key_of_a_message_is_refused(name):
    assert reason(answered(**{name: "x"})).startswith(f"message key {name} is not supported")


@pytest.mark.parametrize("name", keys.HARMLESS)
@pytest.mark.parametrize("value", ["x", 1, True, {"a": 1}])
def test_every_harmless_key_is_harmless(name, value):
    formats = {key for format in (*RECORD_FORMATS, *PAIR_FORMATS) for key in format.all_keys}
    assert name not in formats
    assert good({**answered(**{name: value}), name: value}) == good({"messages": [USER, RIGHT]})


def test_the_report_counts_records_once_per_key_and_the_flag_is_the_way_on(tmp_path):
    rows = [{"messages": [USER, {**RIGHT, key: "x"}]} for key in ("zzz", "yyy", "zzz")]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def build(**settings: object) -> TokenizedDataset:
        config = DataConfig(data=(str(path),), data_cache_dir=str(tmp_path / "cache"), **settings)
        return build_dataset(
            config.data, byte_tokenizer(toys.CHATML), config, seed=0, show_progress=False, field="data"
        )

    with pytest.raises(UserError, match="no usable record") as error:
        build()
    assert "  2 x message key zzz is not known; --ignore-keys zzz leaves it out\n" in str(error.value)
    assert str(error.value).endswith("  1 x message key yyy is not known; --ignore-keys yyy leaves it out")
    assert len(build(ignore_keys=("zzz",), skip_bad_records=True)) == 2
    assert build(ignore_keys=("zzz",), skip_bad_records=True).statistics().dropped == {
        "bad: message key yyy is not known": 1
    }
    assert len(build(ignore_keys=("zzz", "yyy"))) == 3
