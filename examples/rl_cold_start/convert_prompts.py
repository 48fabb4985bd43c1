"""Writes prompts with known answers as verl or NeMo-RL read them."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_psft.config.flags import require_absent, run_command
from megatron_psft.config.paths import PathText
from megatron_psft.errors import UserError
from megatron_psft.rollout.prompts import Prompt, PromptConfig, read_prompts
from megatron_psft.rollout.rewards import MathVerifier, bare_answer

EXAMPLES = """examples:
    python examples/rl_cold_start/convert_prompts.py --prompts gsm8k/train.jsonl --prompt-key question \\
        --framework verl --out gsm8k/train.parquet
    python examples/rl_cold_start/convert_prompts.py --prompts gsm8k/train.jsonl --prompt-key question \\
        --framework nemo-rl --out gsm8k/nemo_rl_train.jsonl"""

VERL_SCORER = "lighteval/MATH"
"""The data source for which verl compares what is in the last \\boxed{} (verl/utils/reward_score)."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is written."""

    framework: Literal["verl", "nemo-rl"]
    """verl: Parquet with data_source, prompt, reward_model; nemo-rl: JSON Lines with input (a user turn), output."""
    out: PathText
    """File to write; it must not exist."""

    def __post_init__(self) -> None:
        require_absent(self, "out")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole command."""

    prompts: PromptConfig
    output: OutputConfig


def main(argv: Sequence[str]) -> int:
    """Writes the file and returns the exit code: 0, or 2 after a user's mistake."""
    return run_command(Config, convert, argv, epilog=EXAMPLES)


def convert(config: Config) -> None:
    prompts = read_prompts(config.prompts, MathVerifier())
    out = Path(config.output.out)
    if config.output.framework == "verl":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([verl_row(prompt) for prompt in prompts]), out)
    else:
        out.write_text("".join(json.dumps(nemo_rl_row(prompt)) + "\n" for prompt in prompts), encoding="utf-8")
    print(f"{len(prompts)} prompts in {out}")


def verl_row(prompt: Prompt) -> dict[str, Any]:
    return {
        "data_source": VERL_SCORER,
        "prompt": [dict(message) for message in prompt.messages],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": bare_answer(prompt.answer)},
        "extra_info": {"source": prompt.source},
    }


def nemo_rl_row(prompt: Prompt) -> dict[str, str]:
    if len(prompt.messages) > 1:
        raise UserError(f"framework (nemo-rl) takes one user turn per prompt; {prompt.source} has more messages")
    return {"input": prompt.messages[0]["content"], "output": bare_answer(prompt.answer)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
