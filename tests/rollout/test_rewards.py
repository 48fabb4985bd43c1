"""Verifiers against answers whose worth is plain, advantages against hand arithmetic."""

import math
import sys

import pytest

from megatron_psft.errors import UserError
from megatron_psft.rollout.rewards import ExactVerifier, MathVerifier, build_verifier, group_advantages


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("48 + 24 = 72. The answer is 72.", "72", 1.0),
        ("It is 72, no, \\boxed{71}.", "72", 0.0),
        ("It is 3. The answer is \\boxed{\\frac{1}{2}}.", "1/2", 1.0),
        ("0.5", "\\frac{1}{2}", 1.0),
        ("$x^2 + 2x + 1$", "(x+1)^2", 1.0),
        ("$x^2 + 2x$", "(x+1)^2", 0.0),
        ("so 1000", "1,000", 1.0),
        ("#### 72", "He sold 48/2 = 24.\n#### 72", 1.0),
        ("#### 24", "He sold 48/2 = 24.\n#### 72", 0.0),
        ("no idea", "72", 0.0),
        ("", "72", 0.0),
        ("$9^{9^{9^{9^9}}}$", "72", 0.0),
    ],
)
def test_the_last_expression_counts_and_its_form_does_not(text, answer, reward):
    verifier = MathVerifier()
    verifier.check(answer)
    assert verifier.score(text, answer) == reward


@pytest.mark.parametrize("answer", ["", "  ", "the cat\n####"])
def test_answers_that_nothing_equals_are_told(answer):
    with pytest.raises(ValueError, match="no mathematical expression"):
        MathVerifier().check(answer)


def test_exact_ignores_blanks_around_only():
    verifier = ExactVerifier()
    assert [verifier.score(text, "two 2") for text in (" two 2\n", "two  2", "two")] == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="empty"):
        verifier.check(" \n")


def test_math_verifier_without_its_library_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert isinstance(build_verifier("exact"), ExactVerifier)
    with pytest.raises(UserError, match=r"needs math-verify; pip install math-verify"):
        build_verifier("math")


def test_advantages_are_those_of_hand_arithmetic():
    rewards = [1.0, 0.0, 0.0, 1.0, 0.0]  # mean 0.4, squares 2 x 0.36 + 3 x 0.16 = 1.2, over 4: 0.3
    deviation = math.sqrt(0.3)
    grpo = group_advantages(rewards, "grpo")
    assert grpo == pytest.approx([(reward - 0.4) / (deviation + 1e-6) for reward in rewards], rel=1e-12)
    assert group_advantages(rewards, "drgrpo") == pytest.approx([0.6, -0.4, -0.4, 0.6, -0.4], rel=1e-12)


@pytest.mark.parametrize("name", ["grpo", "drgrpo"])
@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [1.0], [0.0, 0.0]])
def test_equal_rewards_have_no_advantage(name, rewards):
    assert group_advantages(rewards, name) == [0.0] * len(rewards)
