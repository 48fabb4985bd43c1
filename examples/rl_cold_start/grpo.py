"""GRPO with TRL from an exported model: the rewards are those of `psft rollout`.

On one process as below, on several with `accelerate launch` or torchrun in front. Needs `pip install -e '.[rl]'`.
"""

import sys
from dataclasses import dataclass

from trl_run import TrainConfig, train_and_save

from megatron_psft.config.flags import run_command
from megatron_psft.data.chat import ChatRenderer
from megatron_psft.errors import UserError
from megatron_psft.hf.hub import ModelConfig
from megatron_psft.rollout.prompts import PromptConfig, read_prompts
from megatron_psft.rollout.rewards import VerifierName, build_verifier

EXAMPLES = """example:
    python examples/rl_cold_start/grpo.py --model runs/first/hf --prompts gsm8k/train.jsonl --prompt-key question \\
        --out runs/first/grpo"""


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """GRPO: several answers per prompt, compared with each other."""

    verifier: VerifierName = "math"
    """What makes an answer right: math, its last expression equals the known answer; exact, its text does."""
    num_samples: int = 8
    """Answers per prompt; `global_batch_size` is a multiple."""
    max_new_tokens: int = 1024
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """Divides the logits when answers are sampled."""
    clip_ratio_low: float = 0.2
    """Lower half-width of the clipped ratio."""
    clip_ratio_high: float = 0.28
    """Upper half-width of the clipped ratio."""
    kl_coef: float = 0.0
    """Weight of the divergence from the initial model; 0 keeps no second model."""

    def __post_init__(self) -> None:
        if self.num_samples < 2:
            raise UserError(f"num_samples ({self.num_samples}) must be at least 2: answers are compared")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole run."""

    model: ModelConfig
    prompts: PromptConfig
    grpo: GrpoConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        if self.train.global_batch_size % self.grpo.num_samples:
            raise UserError(
                f"global_batch_size ({self.train.global_batch_size}) must be a multiple of num_samples "
                f"({self.grpo.num_samples})"
            )


def train(config: Config) -> None:
    verifier = build_verifier(config.grpo.verifier)
    prompts = read_prompts(config.prompts, verifier)
    folder, tokenizer = config.model.folder(), config.model.load_tokenizer()
    # A base model's end-of-text token is not what training has taught it to end a turn with.
    tokenizer.eos_token = ChatRenderer(tokenizer, "last").end_of_turn()

    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list, answer: list[str], **_: object) -> list[float]:
        texts = [messages[0]["content"] for messages in completions]
        return [verifier.score(text, known) for text, known in zip(texts, answer, strict=True)]

    arguments = GRPOConfig(
        **config.train.trl_arguments(),
        num_generations=config.grpo.num_samples,
        max_completion_length=config.grpo.max_new_tokens,
        temperature=config.grpo.temperature,
        epsilon=config.grpo.clip_ratio_low,
        epsilon_high=config.grpo.clip_ratio_high,
        beta=config.grpo.kl_coef,
    )
    rows = [{"prompt": list(prompt.messages), "answer": prompt.answer} for prompt in prompts]
    train_and_save(
        GRPOTrainer(
            model=str(folder),
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    )


def main(argv: list[str]) -> int:
    return run_command(Config, train, argv, epilog=EXAMPLES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
