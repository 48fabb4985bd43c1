"""Likenesses of published chat templates x forms of records: each cell has the right labels or is refused by name."""

from typing import Any

import pytest

from megatron_psft.data.chat import ChatRenderer, RenderSettings
from megatron_psft.data.files import Row
from megatron_psft.data.formats import RecordKeys
from megatron_psft.data.messages import RecordError
from megatron_psft.data.records import Record, parse_row
from tests.data.templates import PUBLISHED
from tests.data.toys import label_texts_of

HI, WHY = ({"role": "user", "content": content} for content in ("Hi?", "Why?"))
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
RESULT = {"role": "tool", "content": "2", "tool_call_id": "abcdefghi", "name": "add"}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}


def said(content: str, **more: Any) -> dict:
    return {"role": "assistant", "content": content, **more}


FORMS: dict[str, dict] = {
    "plain": {"messages": [HI, said("Yes.")]},
    "two turns": {"messages": [HI, said("Yes."), WHY, said("So.")]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, HI, said("Yes.")]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, HI, said("Yes.")]},
    "reasoning": {"messages": [HI, said("Yes.", reasoning_content="Hm.")]},
    "reasoning twice": {
        "messages": [HI, said("Yes.", reasoning_content="Hm."), WHY, said("So.", reasoning_content="Ah.")]
    },
    "inline": {"messages": [HI, said("<think>\nHm.\n</think>\n\nYes.")]},
    "inline twice": {
        "messages": [HI, said("<think>\nHm.\n</think>\n\nYes."), WHY, said("<think>\nAh.\n</think>\n\nSo.")]
    },
    "tools": {"messages": [HI, said("", tool_calls=[CALL]), RESULT, said("So 2.")], "tools": [TOOL]},
    "not thinking": {"messages": [HI, said("Yes.")], "enable_thinking": False},
}

NO_REASONING = "does not render reasoning_content"
LOST = "drops the reasoning of a turn that is to be learned"
CHATML_TWICE = ["<think>\nHm.\n</think>\n\nYes.<|im_end|>", "<think>\nAh.\n</think>\n\nSo.<|im_end|>"]
QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
OSS_FINAL = "<|channel|>final<|message|>"
OSS_THOUGHT = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"

CHATML: dict[str, Any] = {
    "plain": ["Yes.<|im_end|>"],
    "two turns": ["Yes.<|im_end|>", "So.<|im_end|>"],
    "system": ["Yes.<|im_end|>"],
    "developer": ["Yes.<|im_end|>"],
    "reasoning": NO_REASONING,
    "reasoning twice": NO_REASONING,
    "inline": CHATML_TWICE[:1],
    "inline twice": CHATML_TWICE,
    "tools": "does not render tool_calls",
    "not thinking": ["Yes.<|im_end|>"],
}
LABELS: dict[str, dict[str, Any]] = {
    "chatml": CHATML,
    "smollm2": CHATML,
    "qwen2.5": {**CHATML, "developer": "does not render role developer", "tools": [QWEN_CALL, "So 2.<|im_end|>"]},
    "qwen3": {
        "plain": ["<think>\n\n</think>\n\nYes.<|im_end|>"],
        "two turns": ["Yes.<|im_end|>", "<think>\n\n</think>\n\nSo.<|im_end|>"],
        "system": ["<think>\n\n</think>\n\nYes.<|im_end|>"],
        "developer": "does not render role developer",
        "reasoning": CHATML_TWICE[:1],
        "reasoning twice": CHATML_TWICE[1:],
        "inline": CHATML_TWICE[:1],
        "inline twice": CHATML_TWICE[1:],
        "tools": [QWEN_CALL, "<think>\n\n</think>\n\nSo 2.<|im_end|>"],
        "not thinking": ["Yes.<|im_end|>"],
    },
    "llama3": {
        "plain": ["Yes.<|eot_id|>"],
        "two turns": ["Yes.<|eot_id|>", "So.<|eot_id|>"],
        "system": ["Yes.<|eot_id|>"],
        "developer": ["Yes.<|eot_id|>"],
        "reasoning": NO_REASONING,
        "reasoning twice": NO_REASONING,
        "inline": ["<think>\nHm.\n</think>\n\nYes.<|eot_id|>"],
        "inline twice": ["<think>\nHm.\n</think>\n\nYes.<|eot_id|>", "<think>\nAh.\n</think>\n\nSo.<|eot_id|>"],
        "tools": ['{"name": "add", "parameters": {"x": 1}}<|eot_id|>', "So 2.<|eot_id|>"],
        "not thinking": ["Yes.<|eot_id|>"],
    },
    "r1": {
        "plain": ["Yes.<|end_of_sentence|>"],
        "two turns": ["Yes.<|end_of_sentence|>", "So.<|end_of_sentence|>"],
        "system": ["Yes.<|end_of_sentence|>"],
        "developer": "does not render role developer",
        "reasoning": NO_REASONING,
        "reasoning twice": NO_REASONING,
        "inline": LOST,
        "inline twice": LOST,
        "tools": "does not render tools",
        "not thinking": ["Yes.<|end_of_sentence|>"],
    },
    "gemma": {
        "plain": ["Yes.<end_of_turn>"],
        "two turns": ["Yes.<end_of_turn>", "So.<end_of_turn>"],
        "system": r"refused by the chat template \(System role not supported\)",
        "developer": "Conversation roles must alternate",
        "reasoning": NO_REASONING,
        "reasoning twice": NO_REASONING,
        "inline": ["<think>\nHm.\n</think>\n\nYes.<end_of_turn>"],
        "inline twice": ["<think>\nHm.\n</think>\n\nYes.<end_of_turn>", "<think>\nAh.\n</think>\n\nSo.<end_of_turn>"],
        "tools": "does not render tool_calls",
        "not thinking": ["Yes.<end_of_turn>"],
    },
    "mistral": {
        "plain": ["Yes.</s>"],
        "two turns": ["Yes.</s>", "So.</s>"],
        "system": ["Yes.</s>"],
        "developer": "Only user, system, assistant and tool roles are supported!",
        "reasoning": NO_REASONING,
        "reasoning twice": NO_REASONING,
        "inline": ["<think>\nHm.\n</think>\n\nYes.</s>"],
        "inline twice": ["<think>\nHm.\n</think>\n\nYes.</s>", "<think>\nAh.\n</think>\n\nSo.</s>"],
        "tools": ['[TOOL_CALLS][{"name": "add", "arguments": {"x": 1}, "id": "abcdefghi"}]</s>', "So 2.</s>"],
        "not thinking": ["Yes.</s>"],
    },
    "glm": {
        "plain": ["<think></think>Yes.<|endoftext|>"],
        "two turns": ["<think></think>Yes.<|user|>", "<think></think>So.<|endoftext|>"],
        "system": ["<think></think>Yes.<|endoftext|>"],
        "developer": "does not render role developer",
        "reasoning": ["<think>Hm.</think>Yes.<|endoftext|>"],
        "reasoning twice": ["<think>Ah.</think>So.<|endoftext|>"],
        "inline": ["<think>Hm.</think>Yes.<|endoftext|>"],
        "inline twice": ["<think>Ah.</think>So.<|endoftext|>"],
        "tools": [
            "<think></think><tool_call>add<arg_key>x</arg_key>\n<arg_value>1</arg_value></tool_call><|observation|>",
            "<think></think>So 2.<|endoftext|>",
        ],
        "not thinking": ["Yes.<|endoftext|>"],
    },
    "gpt-oss": {
        "plain": [OSS_FINAL + "Yes.<|return|>"],
        "two turns": [OSS_FINAL + "Yes.<|end|>", OSS_FINAL + "So.<|return|>"],
        "system": [OSS_FINAL + "Yes.<|return|>"],
        "developer": [OSS_FINAL + "Yes.<|return|>"],
        "reasoning": [OSS_THOUGHT.format("Hm.", "Yes.")],
        "reasoning twice": [OSS_THOUGHT.format("Ah.", "So.")],
        "inline": [OSS_FINAL + "<think>\nHm.\n</think>\n\nYes.<|return|>"],
        "inline twice": [
            OSS_FINAL + "<think>\nHm.\n</think>\n\nYes.<|end|>",
            OSS_FINAL + "<think>\nAh.\n</think>\n\nSo.<|return|>",
        ],
        "tools": [
            ' to=functions.add<|channel|>commentary json<|message|>{"x": 1}<|call|>',
            OSS_FINAL + "So 2.<|return|>",
        ],
        "not thinking": [OSS_FINAL + "Yes.<|return|>"],
    },
}
"""The label texts of the one sequence, or what the error says."""

KEPT: dict[str, dict[str, list[list[str]]]] = {
    "qwen3": {form: [[text] for text in CHATML_TWICE] for form in ("reasoning twice", "inline twice")},
    "r1": {
        form: [["Hm.\n</think>\n\nYes.<|end_of_sentence|>"], ["Ah.\n</think>\n\nSo.<|end_of_sentence|>"]]
        for form in ("reasoning twice", "inline twice")
    },
    "glm": {
        form: [["<think>Hm.</think>Yes.<|endoftext|>"], ["<think>Ah.</think>So.<|endoftext|>"]]
        for form in ("reasoning twice", "inline twice")
    },
    "gpt-oss": {"reasoning twice": [[OSS_THOUGHT.format("Hm.", "Yes.")], [OSS_THOUGHT.format("Ah.", "So.")]]},
}
"""The label texts of each sequence with `keep_reasoning`, where it changes anything."""


def record_of(form: str) -> Record:
    record = parse_row(Row(source="toy:1", value=FORMS[form]), RecordKeys())
    assert isinstance(record, Record), record
    return record


def labels_of(name: str, form: str, **settings: Any) -> list[list[str]]:
    tokenizer = PUBLISHED[name].tokenizer()
    renderer = ChatRenderer(tokenizer, "assistant", RenderSettings(**settings))
    return [label_texts_of(example, tokenizer) for example in renderer.tokenize(renderer.render(record_of(form)))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_each_form_has_its_labels_or_is_refused_by_name(name, form):
    expected = LABELS[name][form]
    if isinstance(expected, str):
        with pytest.raises(RecordError, match=expected):
            labels_of(name, form)
    else:
        assert labels_of(name, form) == [expected]


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, forms in KEPT.items() for form in forms])
def test_kept_reasoning_has_a_sequence_for_each_turn(name, form):
    assert labels_of(name, form, keep_reasoning=True) == KEPT[name][form]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form)
        for name in PUBLISHED
        for form in ("plain", "two turns", "tools")
        if isinstance(LABELS[name][form], list)
    ],
)
def test_what_loses_no_reasoning_stays_one_sequence(name, form):
    assert labels_of(name, form, keep_reasoning=True) == [LABELS[name][form]]


@pytest.mark.parametrize(
    ("name", "form", "expected"),
    [
        ("qwen3", "plain", ["Yes.<|im_end|>"]),
        ("qwen3", "two turns", ["Yes.<|im_end|>", "So.<|im_end|>"]),
        ("qwen3", "reasoning", ["<think>\nHm.\n</think>\n\nYes.<|im_end|>"]),
        ("qwen3", "tools", [QWEN_CALL, "So 2.<|im_end|>"]),
        ("glm", "two turns", ["Yes.<|user|>", "So.<|endoftext|>"]),
        ("chatml", "plain", ["Yes.<|im_end|>"]),
    ],
)
def test_an_empty_block_of_the_template_can_be_left_out_of_the_labels(name, form, expected):
    assert labels_of(name, form, loss_on_empty_think=False) == [expected]
