"""Samples answers to prompts, scores them with a verifier and writes them as records with advantages.

Each prompt's answers are a group: an answer's advantage says how much better it is than the others (GRPO). The records
are trained on with `psft train --data ROLLOUTS.jsonl --old-policy-interval fixed --clip-ratio-low 0.2`.

Text is what is kept of an answer, and training tokenizes it again, within the chat template. Where that gives other
tokens than were sampled, since the text has another tokenization or the template rewrites it, training takes the other
ones; their number is printed. An answer that was cut at the longest length has no end, but its record would get one: it
counts in its group's mean and is left out, unless --keep-unfinished. So is a group whose rewards are all equal, where
every advantage is 0, unless --keep-flat-groups, which is what mixing with demonstrations needs.

--drift-set writes something else: the answers that the initial model of a run gives to general prompts, with the
log-probability of each of their tokens. Training with --drift-data measures on them how far it goes from that model.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_psft.atomic import unfinished
from megatron_psft.cli.output import configure_output
from megatron_psft.config.flags import require_absent, run_command
from megatron_psft.config.inputs import TemplateConfig
from megatron_psft.config.paths import PathText
from megatron_psft.data.chat import ChatRenderer, RenderSettings
from megatron_psft.errors import UserError, counted, storage_error
from megatron_psft.hf.fingerprint import vocabulary_fingerprint, weights_fingerprint
from megatron_psft.hf.hub import ModelConfig
from megatron_psft.rollout.groups import GroupRecords
from megatron_psft.rollout.own_answers import OwnAnswers
from megatron_psft.rollout.prompts import PromptConfig, read_prompts, render_prompt
from megatron_psft.rollout.rewards import AdvantageName, VerifierName, build_verifier
from megatron_psft.rollout.sampling import Sampler, SamplingConfig

EXAMPLES = """examples:
  eight answers to each of GSM8K's questions, checked as maths:
    psft rollout --model runs/first/hf --prompts gsm8k/train.jsonl --prompt-key question \\
        --out rollouts.jsonl
  prompts as verl has them, 16 answers of at most 4096 tokens from a model that two GPUs share:
    psft rollout --model Qwen/Qwen2.5-7B-Instruct --prompts aime.parquet \\
        --answer-key reward_model.ground_truth --num-samples 16 --max-new-tokens 4096 \\
        --vllm-tensor-parallel-size 2 --out rollouts.jsonl
  two answers of the initial model to each general prompt, for the forgetting meter of training:
    psft rollout --model Qwen/Qwen2.5-7B --prompts general.jsonl --drift-set --num-samples 2 \\
        --out own_answers.jsonl

A record of --out: messages, advantage, reward (0 to 1), answer (the known one), group (row of the prompt, from 0).
A row of a drift set: messages, prompt_tokens, tokens, log_probs (nats, of each token), sampled_from, group."""


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

    out: PathText
    """JSON Lines file to write; it must not exist."""
    keep_flat_groups: bool = False
    """Also write groups whose rewards are all equal; their advantages are 0."""
    keep_unfinished: bool = False
    """Also write answers that were cut at max_new_tokens; training teaches the model to end where they were cut."""
    keep_reasoning: bool = False
    """Training will have this flag, too: also write answers whose reasoning the chat template drops without it."""
    drift_set: bool = False
    """Write a drift set, for --drift-data of training: every answer as tokens, with their log-probabilities, and
    nothing is scored, so that no known answer is needed. Needs temperature 1 and top_p 1. The model must be the one
    that the run starts from."""

    def __post_init__(self) -> None:
        require_absent(self, "out")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The whole command."""

    model: ModelConfig
    prompts: PromptConfig
    template: TemplateConfig
    sampling: SamplingConfig
    score: ScoreConfig
    output: OutputConfig

    def __post_init__(self) -> None:
        if self.output.drift_set:
            self._check_drift_set()

    def _check_drift_set(self) -> None:
        """Raises UserError for settings that would make another distribution, or have no effect."""
        for section, names in (
            (self.score, ("verifier", "advantage")),
            (self.prompts, ("answer_key",)),
            (self.output, ("keep_flat_groups", "keep_unfinished", "keep_reasoning")),
        ):
            for name in names:
                value = getattr(section, name)
                if value != getattr(type(section), name):
                    raise UserError(f"{name} ({value}) has no effect with drift_set; remove one of them")
        for name in ("temperature", "top_p"):
            value = getattr(self.sampling, name)
            if value != 1:
                raise UserError(f"{name} ({value}) must be 1 with drift_set, to draw from the model as it is; unset it")


def main(argv: Sequence[str]) -> int:
    """Writes the records and returns the exit code: 0, or 2 after a user's mistake."""
    configure_output()
    return run_command(RolloutConfig, rollout, argv, prog="psft rollout", epilog=EXAMPLES)


def rollout(config: RolloutConfig) -> None:
    """Samples, scores, writes and reports. Raises UserError for inputs that cannot be used, and if nothing is left that
    could be trained on."""
    is_drift_set = config.output.drift_set
    verifier = None if is_drift_set else build_verifier(config.score.verifier)
    prompts = read_prompts(config.prompts, verifier)
    model_folder = config.model.folder()
    tokenizer = config.model.load_tokenizer()
    settings = RenderSettings.of_template(config.template, keep_reasoning=config.output.keep_reasoning)
    renderer = ChatRenderer(tokenizer, "last", settings)
    rows: OwnAnswers | GroupRecords
    if verifier is None:
        model, vocabulary = weights_fingerprint(model_folder, "model"), vocabulary_fingerprint(tokenizer)
        rows = OwnAnswers(sampled_from={"model": model, "tokenizer": vocabulary})
    else:
        rows = GroupRecords(
            verifier=verifier,
            renderer=renderer,
            advantage=config.score.advantage,
            keep_flat_groups=config.output.keep_flat_groups,
            keep_unfinished=config.output.keep_unfinished,
        )
    sampler = Sampler(model_folder, tokenizer, renderer, config.sampling, with_log_probs=is_drift_set)
    rendered = [render_prompt("prompts", prompt, renderer) for prompt in prompts]
    partial = unfinished(Path(config.output.out))
    try:  # a folder that cannot be written to costs no sampling
        partial.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("w", encoding="utf-8")
    except OSError as error:
        text = f"out ({config.output.out}) must be a file that can be written: {error.strerror}"
        raise storage_error(error, text) from None
    try:
        with file, sampler:
            for number, (prompt, answers) in enumerate(zip(prompts, sampler.sample(rendered), strict=True)):
                for row in rows.of(prompt, answers):
                    file.write(json.dumps({**row, "group": number}, ensure_ascii=False) + "\n")
        print(rows.tally)
        if not rows.tally.written:
            raise UserError(
                "no answer is left to train on; use more num_samples, a higher temperature, other prompts, or "
                "--keep-flat-groups or --keep-unfinished"
            )
        os.replace(partial, config.output.out)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{counted(rows.tally.written, 'record')} in {config.output.out}")
