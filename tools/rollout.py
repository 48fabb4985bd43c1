# PYTHON_ARGCOMPLETE_OK: shells with argcomplete's global completion complete its flags
"""Samples answers to prompts, scores them with a verifier and writes them as records with advantages.

Each prompt's answers are a group: an answer's advantage says how much better it is than the others (GRPO). The records
are trained on with `pretrain_psft.py --data ROLLOUTS.jsonl --old-policy-interval fixed --clip-ratio-low 0.2`.

Text is what is kept of an answer, and training tokenizes it again, within the chat template. Where that gives other
tokens than were sampled, since the text has another tokenization or the template rewrites it, training takes the other
ones; their number is printed. An answer that was cut at the longest length has no end, but its record would get one: it
counts in its group's mean and is left out, unless --keep-unfinished. So is a group whose rewards are all equal, where
every advantage is 0, unless --keep-flat-groups, which is what mixing with demonstrations needs.
"""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_psft.config.flags import require_absent, run_command
from megatron_psft.data.chat import ChatRenderer
from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.formats import RecordKeys
from megatron_psft.data.messages import RecordError
from megatron_psft.data.records import parse_row
from megatron_psft.errors import UserError
from megatron_psft.hf.hub import ModelConfig
from megatron_psft.rollout.prompts import Prompt, PromptConfig, read_prompts
from megatron_psft.rollout.rewards import AdvantageName, Verifier, VerifierName, build_verifier, group_advantages
from megatron_psft.rollout.sampling import Answer, Sampler, SamplingConfig

EXAMPLES = """examples:
  eight answers to each of GSM8K's questions, checked as maths:
    python tools/rollout.py --model runs/first/hf --prompts gsm8k/train.jsonl --prompt-key question \\
        --out rollouts.jsonl
  prompts as verl has them, 16 answers of at most 4096 tokens from a model that two GPUs share:
    python tools/rollout.py --model Qwen/Qwen2.5-7B-Instruct --prompts aime.parquet \\
        --answer-key reward_model.ground_truth --num-samples 16 --max-new-tokens 4096 \\
        --vllm-tensor-parallel-size 2 --out rollouts.jsonl

A record of --out: messages, advantage, reward (0 to 1), answer (the known one), group (row of the prompt, from 0)."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What answers are worth."""

    verifier: VerifierName = "math"
    """What makes an answer right: math, its last expression equals the known answer; exact, its text does."""
    advantage: AdvantageName = "grpo"
    """Advantage within a group: grpo, (reward - mean) / standard deviation; drgrpo, reward - mean."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is written."""

    out: str
    """JSON Lines file to write; it must not exist."""
    keep_flat_groups: bool = False
    """Also write groups whose rewards are all equal; their advantages are 0."""
    keep_unfinished: bool = False
    """Also write answers that were cut at max_new_tokens; training teaches the model to end where they were cut."""

    def __post_init__(self) -> None:
        require_absent(self, "out")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The whole command."""

    model: ModelConfig
    prompts: PromptConfig
    sampling: SamplingConfig
    score: ScoreConfig
    output: OutputConfig


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


def main(argv: Sequence[str]) -> int:
    """Writes the records and returns the exit code: 0, or 2 after a user's mistake."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    return run_command(RolloutConfig, rollout, argv, epilog=EXAMPLES)


def rollout(config: RolloutConfig) -> None:
    """Samples, scores, writes and reports. Raises UserError for inputs that cannot be used, and where nothing that
    could be trained on has come out."""
    verifier = build_verifier(config.score.verifier)
    prompts = read_prompts(config.prompts, verifier)
    model_folder = config.model.folder()
    tokenizer = config.model.load_tokenizer()
    renderer = ChatRenderer(tokenizer, "last")
    sampler = Sampler(model_folder, tokenizer, renderer, config.sampling)
    partial = Path(config.output.out + ".partial")
    try:  # a folder that cannot be written to costs no sampling
        partial.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"out ({config.output.out}) must be a file that can be written: {error.strerror}") from None
    with file:
        groups = sampler.sample([render_prompt(prompt, renderer) for prompt in prompts])
        tally = Tally()
        for number, (prompt, answers) in enumerate(zip(prompts, groups, strict=True)):
            for record in records_of_group(prompt, answers, verifier, renderer, config, tally):
                file.write(json.dumps({**record, "group": number}, ensure_ascii=False) + "\n")
    print(tally)
    if not tally.written:
        partial.unlink()
        raise UserError(
            "no answer is left to train on; use more num_samples, a higher temperature, other prompts, or "
            "--keep-flat-groups or --keep-unfinished"
        )
    os.replace(partial, config.output.out)
    print(f"{tally.written} records in {config.output.out}")


def render_prompt(prompt: Prompt, renderer: ChatRenderer) -> str:
    try:
        return renderer.render_prompt(prompt.messages)
    except RecordError as error:
        raise UserError(f"prompts must be what the chat template can write: {prompt.source}: {error}") from None


def records_of_group(
    prompt: Prompt,
    answers: Sequence[Answer],
    verifier: Verifier,
    renderer: ChatRenderer,
    config: RolloutConfig,
    tally: Tally,
) -> Iterator[dict[str, Any]]:
    """The records of one prompt's answers; `tally` counts them, and what is left out and why."""
    rewards = [verifier.score(answer.text, prompt.answer) for answer in answers]
    advantages = group_advantages(rewards, config.score.advantage)
    tally.add_group(answers, rewards)
    if min(rewards) == max(rewards) and not config.output.keep_flat_groups:
        tally.left_out["in groups of equal rewards"] += len(answers)
        return
    for answer, reward, advantage in zip(answers, rewards, advantages, strict=True):
        messages = [*prompt.messages, {"role": "assistant", "content": answer.text}]
        trained = tokens_in_training(messages, renderer)
        if not answer.is_finished and not config.output.keep_unfinished:
            tally.left_out["unfinished"] += 1
        elif trained is None:
            tally.left_out["empty or refused by the chat template"] += 1
        else:
            tally.written += 1
            tally.other_tokens += answer.is_finished and trained != answer.prompt_tokens + answer.tokens
            yield {"messages": messages, "advantage": advantage, "reward": reward, "answer": prompt.answer}


def tokens_in_training(messages: list[Any], renderer: ChatRenderer) -> tuple[int, ...] | None:
    """The tokens that training makes of a conversation, up to the last label, or None where it would refuse the record,
    as it does an empty answer."""
    record = parse_row(Row(source="", value={"messages": messages}), RecordKeys())
    if isinstance(record, BadRecord):
        return None
    try:
        (example,) = renderer.tokenize([renderer.render(record)])
    except RecordError:
        return None
    return tuple(example.tokens[: example.label_mask.nonzero()[0][-1] + 1].tolist())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
