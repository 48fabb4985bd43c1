"""Answers to one prompt -> records with advantages for training, and a tally of what has become of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_psft.data.chat import LOST_REASONING, ChatRenderer
from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.formats import RecordKeys
from megatron_psft.data.messages import RecordError
from megatron_psft.data.records import parse_row
from megatron_psft.errors import counted
from megatron_psft.rollout.prompts import Prompt
from megatron_psft.rollout.rewards import AdvantageName, Verifier, group_advantages
from megatron_psft.rollout.sampling import Answer

_UNTHOUGHT = "without reasoning in training; see --keep-reasoning"


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
            f"{counted(self.groups, 'prompt')}, {counted(self.answers, 'answer')}: mean reward "
            f"{self.reward / self.answers:.4f}, mean length {self.tokens / self.answers:.1f} tokens, "
            f"{self.unfinished} unfinished",
            f"groups of equal rewards: {self.all_equal}, of which {self.all_right} all right",
            *(f"left out: {counted(count, 'answer')} {reason}" for reason, count in self.left_out.items()),
        ]
        if self.other_tokens:
            lines.append(f"trained on as other tokens than were sampled: {counted(self.other_tokens, 'answer')}")
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
            row: dict[str, Any] = {"messages": [*prompt.messages, {"role": "assistant", "content": answer.text}]}
            if prompt.template_kwargs:
                row["chat_template_kwargs"] = dict(prompt.template_kwargs)
            if not answer.is_finished and not self.keep_unfinished:
                self.tally.left_out["unfinished"] += 1
                continue
            try:
                trained = tokens_in_training(row, self.renderer)
            except RecordError as error:
                is_unthought = error.reason == LOST_REASONING
                self.tally.left_out[_UNTHOUGHT if is_unthought else "empty or refused by the chat template"] += 1
                continue
            self.tally.written += 1
            self.tally.other_tokens += answer.is_finished and trained != answer.prompt_tokens + answer.tokens
            yield {**row, "advantage": advantage, "reward": reward, "answer": prompt.answer}


def tokens_in_training(row: dict[str, Any], renderer: ChatRenderer) -> tuple[int, ...]:
    """The tokens that training makes of a record, up to the last label. Raises RecordError if it would refuse it, as it
    does an empty answer."""
    record = parse_row(Row(source="", value=row), RecordKeys())
    if isinstance(record, BadRecord):
        raise RecordError(record.reason, record.detail)
    (example,) = renderer.tokenize(renderer.render(record))
    return tuple(example.tokens[: example.label_mask.nonzero()[0][-1] + 1].tolist())
