"""Verifiers, which score an answer against the known one, and advantages, which compare the answers to one prompt.

Plain Python: nothing here knows of models or tokens. `psft rollout` and the examples that train with
reinforcement learning share these.
"""

import statistics
from collections.abc import Sequence
from typing import Literal, Protocol

from megatron_psft.errors import UserError

VerifierName = Literal["math", "exact"]
AdvantageName = Literal["grpo", "drgrpo"]

STD_EPS = 1e-6
"""Keeps a group of nearly equal rewards from a division by nothing; verl's value."""

_TIMEOUT_SECONDS = 5  # per expression: an answer may hold a power tower that no computer finishes
_GSM8K_MARK = "####"


class Verifier(Protocol):
    """Scores answers between 0 (wrong) and 1 (right)."""

    def check(self, answer: str) -> None:
        """Raises ValueError where nothing could ever be right by this known answer."""

    def score(self, text: str, answer: str) -> float:
        """The reward of the reply `text` where `answer` is known to be right."""


class ExactVerifier:
    """1 where the reply is the known answer, but for blanks around it."""

    def check(self, answer: str) -> None:
        if not answer.strip():
            raise ValueError("is empty")

    def score(self, text: str, answer: str) -> float:
        return float(text.strip() == answer.strip())


class MathVerifier:
    """1 where the final expression of the reply equals the known answer, by `math-verify`: `\\boxed{1/2}` is 0.5.

    The known answer is a number, an expression or LaTeX, with or without `$` or `\\boxed`; of one with GSM8K's mark,
    `#### 72`, what follows it counts. Only in the main thread: math-verify keeps its time limit with a signal.
    """

    def __init__(self) -> None:
        try:
            import math_verify
        except ImportError:
            raise UserError("verifier (math) needs math-verify; pip install math-verify") from None
        self._math_verify = math_verify

    def check(self, answer: str) -> None:
        if not self._parse_known(answer):
            raise ValueError("is no mathematical expression")

    def score(self, text: str, answer: str) -> float:
        found = self._math_verify.parse(text, parsing_timeout=_TIMEOUT_SECONDS)
        known = self._parse_known(answer)
        return float(self._math_verify.verify(known, found, timeout_seconds=_TIMEOUT_SECONDS))

    def _parse_known(self, answer: str) -> list[object]:
        text = bare_answer(answer)
        # Bare LaTeX is found only within delimiters.
        text = text if not text or "\\boxed" in text else f"\\boxed{{{text}}}"
        return list(self._math_verify.parse(text, parsing_timeout=_TIMEOUT_SECONDS))


def bare_answer(answer: str) -> str:
    """A known answer without the solution that GSM8K puts before its mark."""
    return answer.split(_GSM8K_MARK)[-1].strip()


def build_verifier(name: VerifierName) -> Verifier:
    """Raises UserError where the library that it needs is not installed."""
    return MathVerifier() if name == "math" else ExactVerifier()


def group_advantages(rewards: Sequence[float], name: AdvantageName) -> list[float]:
    """How much better each answer is than the others to the same prompt; zeros where all rewards are equal.

    Args:
        rewards: of one prompt's answers.
        name: `grpo`, (r - mean) / (std + 1e-6) with the sample's standard deviation (divisor n - 1), as TRL and verl
            compute DeepSeekMath's (arXiv 2402.03300, section 4.1.2); `drgrpo`, r - mean (arXiv 2503.20783): a group
            that nearly always fails, or never does, weighs no more than others.
    """
    if max(rewards) == min(rewards):  # rounding of the mean would leave advantages that are not quite 0
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards) + STD_EPS if name == "grpo" else 1.0
    return [(reward - mean) / scale for reward in rewards]
