"""A model's own answers with their log-probabilities -> rows of a drift set, by which training measures forgetting."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_psft.data.drift_sets import LOG_PROBS, PROMPT, SAMPLED_FROM, TOKENS
from megatron_psft.errors import counted
from megatron_psft.rollout.prompts import Prompt
from megatron_psft.rollout.sampling import Answer

_DECIMALS = 7
"""Of a log-probability; fp32 has no more."""


@dataclass(kw_only=True)
class AnswerTally:
    """What was sampled; all of it is written."""

    written: int = 0
    tokens: int = 0
    unfinished: int = 0

    def __str__(self) -> str:
        mean = self.tokens / max(self.written, 1)
        return f"{counted(self.written, 'answer')}: mean length {mean:.1f} tokens, {self.unfinished} unfinished"


@dataclass(frozen=True, kw_only=True)
class OwnAnswers:
    """Makes the rows of one prompt after the other. Every answer is a row: without those that were cut at the longest
    length the others would be no fair sample."""

    sampled_from: Mapping[str, str]
    """What tells the model and its tokenizer from others."""
    tally: AnswerTally = field(default_factory=AnswerTally)

    def of(self, prompt: Prompt, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
        """The rows of one prompt's answers; the messages are for people, the tokens are what counts."""
        for answer in answers:
            assert answer.log_probs is not None, "the sampler was asked for them"
            self.tally.written += 1
            self.tally.tokens += len(answer.tokens)
            self.tally.unfinished += not answer.is_finished
            yield {
                "messages": [*prompt.messages, {"role": "assistant", "content": answer.text}],
                PROMPT: answer.prompt_tokens,
                TOKENS: answer.tokens,
                LOG_PROBS: [min(0.0, round(log_prob, _DECIMALS)) for log_prob in answer.log_probs],
                SAMPLED_FROM: dict(self.sampled_from),
            }
