"""Answers to one prompt -> records with advantages for training, and a tally of what has become of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_psft.data.chat import ChatRenderer
from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.formats import RecordKeys
from megatron_psft.data.messages import RecordError
from megatron_psft.data.records import parse_row
from megatron_psft.rollout.prompts import Prompt
from megatron_psft.rollout.rewards import AdvantageName, Verifier, group_advantages
from megatron_psft.rollout.sampling import Answer


@dataclass(kw_only=True)
class Tally:
    """What was sampled, and what has become of it."""

    groups: int = 0
    answers: int = 0
    tokens: int = 0
    reward: float = 0.0
    unfinished: int = 0
    all_right: int = 0
    all_equal: int = 0
    written: int = 0
    other_tokens: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def add_group(self, answers: Sequence[Answer], rewards: Sequence[float]) -> None:
        self.groups += 1
        self.answers += len(answers)
        self.tokens += sum(len(answer.tokens) for answer in answers)
        self.reward += sum(rewards)
        self.unfinished += sum(not answer.is_finished for answer in answers)
        self.all_right += min(rewards) == 1
        self.all_equal += min(rewards) == max(rewards)

    def __str__(self) -> str:
        lines = [
            f"{self.groups} prompts, {self.answers} answers: mean reward {self.reward / self.answers:.4f}, mean length "
            f"{self.tokens / self.answers:.1f} tokens, {self.unfinished} unfinished",
            f"groups of equal rewards: {self.all_equal}, of which {self.all_right} all right",
            *(f"left out: {count} answers {reason}" for reason, count in self.left_out.items()),
        ]
        if self.other_tokens:
            lines.append(f"trained on as other tokens than were sampled: {self.other_tokens} answers")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class GroupRecords:
    """Makes the records of one group after the other."""

    verifier: Verifier
    renderer: ChatRenderer
    advantage: AdvantageName
    keep_flat_groups: bool = False
    """Whether a group whose rewards are all equal has records; their advantages are 0."""
    keep_unfinished: bool = False
    """Whether an answer that was cut at the longest length is a record."""
    tally: Tally = field(default_factory=Tally)
    """Counts every answer, and what is left out and why."""

    def of(self, prompt: Prompt, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
        """The records of one prompt's answers: messages, advantage, reward, answer (the known one)."""
        rewards = [self.verifier.score(answer.text, prompt.answer) for answer in answers]
        advantages = group_advantages(rewards, self.advantage)
        self.tally.add_group(answers, rewards)
        if min(rewards) == max(rewards) and not self.keep_flat_groups:
            self.tally.left_out["in groups of equal rewards"] += len(answers)
            return
        for answer, reward, advantage in zip(answers, rewards, advantages, strict=True):
            messages = [*prompt.messages, {"role": "assistant", "content": answer.text}]
            trained = tokens_in_training(messages, self.renderer)
            if not answer.is_finished and not self.keep_unfinished:
                self.tally.left_out["unfinished"] += 1
            elif trained is None:
                self.tally.left_out["empty or refused by the chat template"] += 1
            else:
                self.tally.written += 1
                self.tally.other_tokens += answer.is_finished and trained != answer.prompt_tokens + answer.tokens
                yield {"messages": messages, "advantage": advantage, "reward": reward, "answer": prompt.answer}


def tokens_in_training(messages: list[Any], renderer: ChatRenderer) -> tuple[int, ...] | None:
    """The tokens that training makes of a conversation, up to the last label, or None if it would refuse the record, as
    it does an empty answer."""
    record = parse_row(Row(source="", value={"messages": messages}), RecordKeys())
    if isinstance(record, BadRecord):
        return None
    try:
        (example,) = renderer.tokenize([renderer.render(record)])
    except RecordError:
        return None
    return tuple(example.tokens[: example.label_mask.nonzero()[0][-1] + 1].tolist())
