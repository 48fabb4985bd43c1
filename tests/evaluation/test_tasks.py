"""Which questions a file asks."""

import json

import pytest

from megatron_psft.errors import UserError
from megatron_psft.evaluation.tasks import TaskConfig, read_questions
from megatron_psft.rollout.rewards import ExactVerifier


def test_questions_that_differ_in_what_is_asked_with_them_are_not_one(tmp_path):
    row = {"prompt": "2+2?", "answer": "4"}
    rows = [row, {**row, "system": "Be brief."}, {**row, "enable_thinking": False}, row, {**row, "id": 7}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    found = read_questions(str(path), TaskConfig(tasks=(str(path),)), 1, ExactVerifier())
    assert [len(question.messages) for question in found.questions] == [1, 2, 1]
    assert [dict(question.template_kwargs) for question in found.questions] == [{}, {}, {"enable_thinking": False}]


def test_a_file_without_rows_is_refused_whatever_its_keys_are_called(tmp_path):
    path = tmp_path / "a.jsonl"
    path.touch()
    for keys in ({}, {"prompt_key": "q", "answer_key": "a"}):
        with pytest.raises(UserError, match=r"^tasks \(.*a\.jsonl\) must hold at least one question"):
            read_questions(str(path), TaskConfig(tasks=(str(path),), **keys), None, ExactVerifier())
