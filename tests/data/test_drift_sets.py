"""Which rows are answers of a drift set."""

import json

import numpy as np
import pytest

from megatron_psft.data.drift_sets import read_drift_set
from megatron_psft.errors import UserError

OF = {"model": "m", "tokenizer": "t"}
GOOD = {"prompt_tokens": [3, 4], "tokens": [5, 6, 1], "log_probs": [-0.5, 0.0, -2], "sampled_from": {**OF, "x": "y"}}


def read(tmp_path, *rows, seq_length=8):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_drift_set("own", [str(path)], sampled_from=OF, vocab_size=7, seq_length=seq_length)


def test_the_answers_tokens_are_the_labels(tmp_path):
    other = {**GOOD, "tokens": [2], "log_probs": [-1.5]}
    found = read(tmp_path, GOOD, other)
    assert [found.dataset[place].tokens.tolist() for place in (0, 1)] == [[3, 4, 5, 6, 1], [3, 4, 2]]
    assert found.dataset[0].label_mask.tolist() == [False, False, True, True, True]
    np.testing.assert_array_equal(found.nll, [2.5, 1.5])
    np.testing.assert_array_equal(found.tokens, [3, 1])
    assert found.dataset.fingerprint() != read(tmp_path, other, GOOD).dataset.fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probs": None}, "own.jsonl:2 has no log_probs"),
        ({"log_probs": []}, "has no log_probs"),
        ({"tokens": "567"}, "has no tokens"),
        ({"log_probs": [-1.0]}, "has 1 log_probs of 3 tokens"),
        ({"tokens": [5, 7, 1]}, "has a token id that is not one of the model's, 0 to 6"),
        ({"prompt_tokens": [True]}, "has a token id"),
        ({"log_probs": [-1.0, 0.5, -1]}, "has log_probs that are not finite and at most 0"),
        ({"log_probs": [-1.0, float("-inf"), -1]}, "has log_probs that are not finite"),
        ({"log_probs": [-1.0, "x", -1]}, "has log_probs that are not finite"),
        ({"sampled_from": {"model": "other", "tokenizer": "t"}}, "was sampled from another model than"),
        ({"sampled_from": {"model": "m"}}, "has no sampled_from with tokenizer"),
        ({"sampled_from": "m"}, "has no sampled_from with"),
    ],
)
def test_the_first_row_that_does_not_fit_is_named(tmp_path, change, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, GOOD, {**GOOD, **change})
    assert message in str(error.value)
    assert "`psft rollout --drift-set` writes one" in str(error.value)


def test_a_long_answer_and_a_single_one_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"longer than seq_length \(4\).*own.jsonl:1, has 5 tokens"):
        read(tmp_path, GOOD, GOOD, seq_length=4)
    with pytest.raises(UserError, match=r"at least 2 answers, found 1"):
        read(tmp_path, GOOD)
