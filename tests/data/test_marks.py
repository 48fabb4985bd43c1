"""What a row says of its labels, reasoning, system message and template besides the texts."""

import pytest

from megatron_psft.data import keys
from megatron_psft.data.chat import ChatRenderer, render_record
from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.formats import RecordKeys
from megatron_psft.data.messages import RecordError
from megatron_psft.data.pairs import Pair, parse_pair
from tests.data import toys
from tests.data.spelled import (
    AGAIN,
    CHAT,
    RIGHT,
    SYSTEM,
    USER,
    WRONG,
    answered,
    both_forms,
    good,
    parse,
    reason,
    sharegpt,
)
from tests.data.toys import byte_tokenizer, label_texts_of


@pytest.mark.parametrize("form", [0, 1], ids=["messages", "ShareGPT"])
@pytest.mark.parametrize(
    ("no", "yes"),
    [
        *(({"weight": off}, {"weight": on}) for off, on in [(0, 1), (0.0, 1.0), (0, None)]),
        *(({key: False}, {key: True}) for key in ("train", "loss", "training", "trainable")),
        ({"train": 0}, {"train": 1}),
        ({"weight": 0, "train": False}, {}),
    ],
)
def test_a_turn_is_left_out_of_the_labels_as_its_message_says(form, no, yes):
    row = both_forms([USER, {**WRONG, **no}, AGAIN, {**RIGHT, **yes}])[form]
    record = good(row)
    assert (record.messages, record.unlearned) == (tuple(CHAT), frozenset({1}))


def test_indices_of_turns_count_a_system_message_that_is_put_first_or_taken_out():
    messages = [USER, {**WRONG, "weight": 0}, AGAIN, RIGHT]
    assert good({"messages": messages, "system": "Be brief."}).unlearned == {2}
    assert good({"messages": [SYSTEM, *messages]}).unlearned == {2}
    assert good({"messages": messages}, system_prompt="Be kind.").unlearned == {2}
    late = [USER, SYSTEM, {**WRONG, "weight": 0}, AGAIN, RIGHT]
    assert good({"messages": late}).unlearned == {2}
    assert good({"messages": late}, system_prompt="Be kind.").unlearned == {2}
    record = good({"prompt": messages[:3], "completion": "4", "system": "Be brief."})
    assert (record.prompt_length, record.unlearned) == (4, {2})


@pytest.mark.parametrize("form", [0, 1], ids=["messages", "ShareGPT"])
@pytest.mark.parametrize("value", [0.5, 2, -1, "0", "", "false", [0], float("nan"), 10**400])
def test_other_weights_are_refused_by_value(form, value):
    bad = parse(both_forms([USER, {**RIGHT, "weight": value}])[form])
    assert isinstance(bad, BadRecord)
    assert bad.reason == "message key weight is not 0 or 1"
    assert f"{value!r:.40}" in bad.detail


def test_a_switch_that_is_no_truth_value_is_refused_by_value():
    assert reason(answered(trainable="no")) == "message key trainable is not true or false"


def test_switches_that_contradict_each_other_are_refused():
    bad = parse(answered(weight=1, train=False))
    assert isinstance(bad, BadRecord)
    assert (bad.reason, bad.detail) == (
        "message keys that contradict each other",
        "messages[1] has weight 1, train False",
    )


@pytest.mark.parametrize(
    "row",
    [
        answered(weight=0),
        {"messages": [USER, {**WRONG, "loss": False}, AGAIN, {**RIGHT, "train": False}]},
        {"prompt": [USER, WRONG], "completion": [AGAIN]},
        {"prompt": [USER], "completion": [{**RIGHT, "weight": 0}]},
    ],
)
def test_a_record_of_which_no_turn_is_learned_is_bad(row):
    assert reason(row) == "no assistant turn to learn"


@pytest.mark.parametrize(
    ("row", "length"),
    [
        ({"prompt": CHAT[:3], "completion": [RIGHT]}, 3),
        ({"prompt": CHAT[:3], "completion": "4"}, 3),
        ({"prompt": sharegpt(CHAT[:3]), "completion": "4", "system": "Be brief."}, 4),
        ({"prompt": [SYSTEM, *CHAT[:3]], "completion": [RIGHT, AGAIN, RIGHT]}, 4),
        ({"instruction": "2+2?", "output": "4"}, 1),
        ({"messages": CHAT, "system": "Be brief."}, 0),
    ],
)
def test_the_turns_of_a_prompt_are_no_labels(row, length):
    assert good(row).prompt_length == length


@pytest.mark.parametrize("completion", [" three", [RIGHT]])
def test_a_completion_cannot_go_on_with_the_prompt_s_last_turn(completion):
    row = {"prompt": [USER, {"role": "assistant", "content": "One, two,"}], "completion": completion}
    assert reason(row) == "prompt that ends with an assistant turn"
    bad = parse_pair(Row(source="a:1", value={**row, "chosen": completion, "rejected": "no"}), RecordKeys())
    assert isinstance(bad, BadRecord)
    assert bad.reason == "prompt that ends with an assistant turn"


@pytest.mark.parametrize("form", [0, 1], ids=["messages", "ShareGPT"])
@pytest.mark.parametrize("key", keys.REASONING_KEYS)
def test_reasoning_is_read_under_each_of_its_names(form, key):
    record = good(both_forms([USER, {**RIGHT, key: "Hm.", "reasoning_content": "Hm."}])[form])
    assert record.messages == (USER, {**RIGHT, "reasoning_content": "Hm."})


def test_reasoning_that_differs_or_is_not_the_assistant_s_is_refused():
    assert reason(answered(thinking="Hm.", reasoning="Well.")) == "two texts of reasoning"
    assert reason({"messages": [{**USER, "thought": "Hm."}, RIGHT]}) == "thought outside an assistant turn"
    assert reason(answered(thinking=True)) == "wrong type"


@pytest.mark.parametrize("form", [0, 1], ids=["messages", "ShareGPT"])
@pytest.mark.parametrize("content", ["<think>\nHm.\n</think>\n\n4", "<reasoning>Hm.</reasoning>4", "Hm.</think>4"])
def test_reasoning_in_the_content_and_under_a_key_is_taken_once(form, content):
    record = good(both_forms([USER, {**RIGHT, "content": content, "thinking": "Hm. "}])[form])
    assert record.messages == (USER, {**RIGHT, "reasoning_content": "Hm. "})
    assert reason(answered(content=content.removesuffix("4"), thinking="Hm.")) == "empty content"


@pytest.mark.parametrize("content", ["<think>Well.</think>4", "<think></think>4", " [THINK]Well.[/THINK]4"])
def test_reasoning_in_the_content_that_says_something_else_than_a_key_is_refused(content):
    bad = parse(answered(content=content, reasoning_content="Hm."))
    assert isinstance(bad, BadRecord)
    assert bad.reason == "two texts of reasoning"
    assert bad.detail == "messages[1] has one under a key and one in its content"
    assert good(answered(content=content, reasoning_content="")).messages[1]["content"] == content
    assert good(answered(content=content, reasoning_content="Hm."), ignored=("reasoning_content",))


@pytest.mark.parametrize("content", ["The tag </think> ends it.", "It is <think>a</think>.", "<think> begins it."])
def test_an_answer_beside_reasoning_may_speak_of_the_marks(content):
    assert good(answered(content=content, reasoning_content="Hm.")).messages[1]["content"] == content


@pytest.mark.parametrize("key", [*keys.REASONING_KEYS, "thoughts"])
def test_reasoning_beside_the_messages_is_refused_with_the_place_it_belongs_to(key):
    found = reason({"prompt": "2+2?", key: "Hm.", "completion": "4"})
    assert found.startswith(f"row key {key} is not supported: give reasoning as reasoning_content")


def test_sides_of_a_pair_say_which_turns_are_learned():
    chosen, rejected = [RIGHT, AGAIN, {**RIGHT, "weight": 0}], [{**WRONG, "train": True}]
    row = {"prompt": [SYSTEM, USER], "chosen": chosen, "rejected": rejected}
    pair = parse_pair(Row(source="a:1", value=row), RecordKeys(are_pairs=True))
    assert isinstance(pair, Pair)
    assert (pair.chosen.unlearned, pair.rejected.unlearned, pair.chosen.prompt_length) == ({4}, frozenset(), 2)
    nothing = parse_pair(Row(source="a:1", value={**row, "rejected": [{**WRONG, "weight": 0}]}), RecordKeys())
    assert isinstance(nothing, BadRecord)
    assert nothing.reason == "no assistant turn to learn"


def test_a_flag_makes_no_difference_between_the_sides_of_a_pair():
    row = {"chosen": [USER, {**WRONG, "weight": 0}, AGAIN, RIGHT], "rejected": [USER, WRONG, AGAIN, WRONG]}
    pair = parse_pair(Row(source="a:1", value=row), RecordKeys(are_pairs=True))
    assert isinstance(pair, Pair)
    assert pair.chosen.prompt_length == 3


@pytest.mark.parametrize("system", keys.SYSTEM_KEYS)
def test_a_system_message_of_the_row_comes_first(system):
    for row in (
        *both_forms([USER, RIGHT]),
        {"prompt": "2+2?", "completion": "4"},
        {"instruction": "2+2?", "output": "4"},
        {"messages": [SYSTEM, USER, RIGHT]},  # who says it twice says it once
    ):
        assert good({**row, system: "Be brief."}).messages == (SYSTEM, USER, RIGHT)


def test_system_messages_that_differ_are_refused():
    row = {"messages": [USER, RIGHT]}
    assert good({**row, "system": "Be brief.", "system_prompt": "Be brief."}).messages[0] == SYSTEM
    assert reason({**row, "system": "Be brief.", "system_prompt": "Be long."}) == "two system messages"
    both = {"messages": [SYSTEM, USER, RIGHT], "system_prompt": "Be long."}
    bad = parse(both)
    assert isinstance(bad, BadRecord)
    assert bad.reason == "two system messages"
    assert bad.detail.endswith("--ignore-keys system_prompt keeps that of the messages")
    assert good(both, ignored=("system_prompt",)).messages[0] == SYSTEM
    assert good({**both, "system_prompt": "Be brief.\n"}).messages[0] == SYSTEM
    assert reason({**row, "system_prompt": ["Be brief."]}) == "wrong type"


@pytest.mark.parametrize(
    ("extra", "kwargs"),
    [
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": True}),
        ({"chat_template_kwargs": '{"enable_thinking": false, "a": 1}'}, {"enable_thinking": False, "a": 1}),
        ({"enable_thinking": False}, {"enable_thinking": False}),
        (
            {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": True, "a": [None]}},
            {"enable_thinking": True, "a": [None]},
        ),
        ({"chat_template_kwargs": {"a": None}, "enable_thinking": None}, {}),
        ({"chat_template_kwargs": ""}, {}),
    ],
)
def test_a_row_has_variables_for_the_template(extra, kwargs):
    for row in (*both_forms([USER, RIGHT]), {"prompt": "2+2?", "completion": "4"}):
        assert good({**row, **extra}).template_kwargs == kwargs
    pair = parse_pair(Row(source="a:1", value={"prompt": "?", "chosen": "a", "rejected": "b", **extra}), RecordKeys())
    assert isinstance(pair, Pair)
    assert pair.chosen.template_kwargs == pair.rejected.template_kwargs == kwargs


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        ({"chat_template_kwargs": [1]}, "wrong type"),
        ({"chat_template_kwargs": "enable_thinking"}, "not JSON"),
        ({"chat_template_kwargs": {"a": float("nan")}}, "not JSON"),
        ({"chat_template_kwargs": {"a": "\ud800"}}, "lone surrogate"),
        ({"enable_thinking": "true"}, "wrong type"),
        ({"enable_thinking": 1}, "wrong type"),
        (
            {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
            "two values of enable_thinking",
        ),
    ],
)
def test_variables_that_a_template_cannot_have_are_refused(extra, found):
    assert reason({"messages": [USER, RIGHT], **extra}) == found


@pytest.mark.parametrize(
    "key", ["tools", "messages", "conversation", "chat_template", "add_generation_prompt", "tokenize"]
)
def test_variables_that_rendering_sets_are_refused(key):
    renderer = ChatRenderer(byte_tokenizer(toys.CHATML), "assistant")
    record = good({"messages": [USER, RIGHT], "chat_template_kwargs": {key: []}})
    with pytest.raises(RecordError, match=rf"rendering sets itself \({key}\)"):
        renderer.render(record)


def test_labels_are_the_turns_that_are_to_be_learned():
    row = {"prompt": [USER, WRONG, AGAIN], "completion": [RIGHT, AGAIN, {**WRONG, "train": False}, AGAIN, RIGHT]}
    tokenizer = byte_tokenizer(toys.CHATML)
    assert label_texts_of(render_record(good(row), tokenizer, "assistant"), tokenizer) == ["4<|im_end|>"] * 2
    weighed = good({"messages": [USER, {**WRONG, "weight": 0}, AGAIN, RIGHT]})
    texts = label_texts_of(render_record(weighed, tokenizer, "all"), tokenizer)
    assert "5" not in "".join(texts)
    assert "".join(texts).count("2+2?") == 1


def test_a_record_whose_last_turn_is_not_to_be_learned_is_bad_where_that_one_alone_counts():
    tokenizer = byte_tokenizer(toys.CHATML)
    record = good({"messages": [USER, WRONG, AGAIN, {**RIGHT, "loss": False}]})
    assert label_texts_of(render_record(record, tokenizer, "assistant"), tokenizer) == ["5<|im_end|>"]
    with pytest.raises(RecordError, match=r"no assistant turn to learn \(--loss-on last takes the last one"):
        render_record(record, tokenizer, "last")


def test_a_turn_that_is_not_the_assistant_s_cannot_be_left_out_of_the_whole_text():
    record = good({"messages": [{**USER, "weight": 0}, RIGHT]})
    tokenizer = byte_tokenizer(toys.CHATML)
    assert label_texts_of(render_record(record, tokenizer, "assistant"), tokenizer) == ["4<|im_end|>"]
    with pytest.raises(RecordError, match=r"cannot be left out of --loss-on all \(messages\[0\], user\)"):
        render_record(record, tokenizer, "all")
