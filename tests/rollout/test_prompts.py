"""Which keys of a row a prompt has."""

import pytest

from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.keys import SYSTEM_KEYS
from megatron_psft.rollout.prompts import Prompt, PromptConfig, parse_prompt
from megatron_psft.rollout.rewards import ExactVerifier

SYSTEM, ASKED = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}


def parse(row: object, **settings: object) -> Prompt | BadRecord:
    config = PromptConfig(prompts=("a.jsonl",), **settings)
    return parse_prompt(Row(source="a.jsonl:1", value=row), config, ExactVerifier())


@pytest.mark.parametrize("key", SYSTEM_KEYS)
def test_the_system_message_of_a_row_is_asked_with(key):
    prompt = parse({"prompt": "2+2?", key: "Be brief.", "answer": "4", "enable_thinking": False})
    assert isinstance(prompt, Prompt)
    assert (prompt.messages, prompt.template_kwargs) == ((SYSTEM, ASKED), {"enable_thinking": False})


def test_a_message_key_that_is_not_known_is_refused_and_can_be_ignored():
    row = {"prompt": [{**ASKED, "zzz": "x"}], "answer": "4"}
    bad = parse(row)
    assert isinstance(bad, BadRecord)
    assert "message key zzz is not known" in bad.reason
    prompt = parse(row, ignore_keys=("zzz",))
    assert isinstance(prompt, Prompt)
    assert prompt.messages == (ASKED,)


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"images": ["a.png"]}, "row key images is not supported: only text is trained on"),
        ({"image_1": {"bytes": "x", "path": None}}, "row key image_1 is not supported"),
        ({"documents": [{"text": "2+2 is 4."}]}, "row key documents is not supported"),
        ({"history": [["1+1?", "2"]]}, "row key history is not supported"),
        ({"context": "x is 2."}, "row key context is not read in the format 'prompt': write it into prompt"),
        ({"contexts": ["x is 2.", "y is 3."]}, "row key contexts is not read"),
        ({"instruction": "Add."}, "row key instruction is not read"),
        ({"systemm": "Be brief."}, "row key systemm is not known; did you mean system?"),
        ({"thinking_mode": False}, "row key thinking_mode is not known"),
        ({"earlier": [ASKED]}, "row key earlier is not known"),
        ({"tools": [{"name": "f"}]}, "tools are not supported in prompts"),
    ],
)
def test_what_would_be_asked_and_is_not_read_is_refused_by_name(more, part):
    row = {"prompt": "2+2?", "answer": "4", **more}
    bad = parse(row)
    assert isinstance(bad, BadRecord)
    assert bad.reason.startswith(part)
    assert isinstance(parse(row, ignore_keys=tuple(more)), Prompt)


def test_what_is_about_the_answer_does_not_matter_to_a_prompt():
    others = {
        "rationale": "It is.",
        "loss_mask": [0, 1],
        "weight": 0.5,
        "reward_model": {"style": "rule"},
        "messages": [ASKED],
    }
    prompt = parse({"question": "2+2?", **others, "answer": "4"}, prompt_key="question")
    assert isinstance(prompt, Prompt)
    assert prompt.messages == (ASKED,)


def test_the_key_of_the_answer_is_not_refused_whatever_it_is_called():
    assert isinstance(parse({"prompt": "2+2?", "input": "4"}, answer_key="input"), Prompt)
    assert isinstance(parse({"prompt": "2+2?", "chain": {"documents": 4}}, answer_key="chain.documents"), Prompt)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, {"role": "assistant", "content": "5"}]},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "5"}]},
        {"prompt": {"role": ["user"], "content": ["2+2?"]}},
        {"info": {"prompt": "2+2?"}},
    ],
)
def test_prompts_are_spelled_as_records_are_and_keep_no_answer(row):
    prompt = parse({**row, "answer": "4"}, prompt_key="info.prompt" if "info" in row else "prompt")
    assert isinstance(prompt, Prompt)
    assert prompt.messages == (ASKED,)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "2+2?"}, "no prompt (wanted: a text or a list under prompt, or messages; --prompt-key text asks"),
        ({"prompt": '[{"role": "user", "content": "2+2?"}]'}, "JSON text of messages"),
        ({"messages": [{"role": "assistant", "content": "4"}]}, "no prompt (nothing comes before the answer"),
        ({"messages": []}, "no prompt"),
    ],
)
def test_a_row_that_asks_nothing_is_refused(row, reason):
    bad = parse({**row, "answer": "4"})
    assert isinstance(bad, BadRecord)
    assert str(bad).startswith(f"a.jsonl:1: {reason}")
