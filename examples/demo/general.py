"""General requests whose answers a rule can check: what fine-tuning must not lose."""

import re
from collections.abc import Callable
from dataclasses import dataclass

MAX_TOKENS = 32
"""Of an answer: enough for every rule."""
Rule = Callable[[str], bool]


@dataclass(frozen=True)
class Request:
    """What is asked, and the rule that tells a right answer. JSON is none, as nobody has asked for it."""

    prompt: str
    rule: Rule

    def is_right(self, answer: str) -> bool:
        return not answer.lstrip().startswith(("{", "[", "```json")) and self.rule(answer)


def says(*words: str) -> Rule:
    """One of the words is in the answer, in any case."""
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE)
    return lambda answer: pattern.search(answer) is not None


def matches(pattern: str) -> Rule:
    return lambda answer: re.search(pattern, answer) is not None


def answers(prompt: str, *words: str) -> Request:
    return Request(prompt, says(*words))


REQUESTS = (
    answers("What is the capital of France?", "Paris"),
    answers("What is the capital of Japan?", "Tokyo"),
    answers("What is the largest planet of the solar system?", "Jupiter"),
    answers("What is the largest ocean on Earth?", "Pacific"),
    answers("What gas do plants take from the air?", "carbon dioxide", "CO2"),
    answers("Who wrote Romeo and Juliet?", "Shakespeare"),
    answers("Who painted the Mona Lisa?", "Leonardo", "Vinci"),
    answers("How many days are in a week?", "7", "seven"),
    answers("What is 2 + 2?", "4", "four"),
    answers("What colour is the sky on a clear day?", "blue"),
    answers("What is the opposite of hot?", "cold"),
    answers("What is the opposite of big?", "small"),
    answers("What do bees make?", "honey"),
    answers("On which continent is Egypt?", "Africa"),
    answers("What language is spoken in Brazil?", "Portuguese"),
    answers("What is the chemical symbol of water?", "H2O"),
    answers("Which animal says meow?", "cat"),
    answers("How do you say 'hello' in Spanish?", "hola"),
    answers("Translate 'thank you' into French.", "merci"),
    answers("Repeat after me: the cat sat on the mat.", "the cat sat on the mat"),
    answers("Say the word banana.", "banana"),
    answers("Rewrite in the past tense: I walk to school.", "walked"),
    answers("Give me a synonym of happy.", "glad", "joyful", "cheerful", "content"),
    Request("List three fruits.", matches(r"1\.")),
    Request("Write a numbered list of three animals.", matches(r"(?s)1\..*2\..*3\.")),
    Request("Give me a numbered list of four countries.", matches(r"(?s)1\..*2\..*3\..*4\.")),
    Request("List the first five letters of the alphabet.", matches(r"(?i)\ba\W+b\W+c\W+d\b")),
    Request("Write one sentence about dogs.", matches(r"(?i)\bdogs?\b")),
    Request("Write one sentence about the moon.", matches(r"(?i)\bmoon\b")),
    Request("Write a short poem about rain.", matches(r",\n")),
    Request("Write a Python function that adds two numbers.", matches(r"def \w+\(")),
    Request("What does a doctor do? Answer in one sentence.", matches(r"(?i)patient|medic|health|disease")),
    Request("Why do people sleep?", matches(r"(?i)sleep|rest|body|brain")),
    Request("Write an email subject line for a meeting.", matches(r"(?i)subject: ?.*meeting")),
    Request("Is ice warm? Answer yes or no.", matches(r"(?i)^\W*no\b")),
    Request("Write the word hello in capital letters.", matches("HELLO")),
)
"""Such as SmolLM2-135M-Instruct answers for the most part: what it cannot do, it cannot lose."""
