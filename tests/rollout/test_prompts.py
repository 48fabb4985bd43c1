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
