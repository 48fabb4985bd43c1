"""GRPO as a loop: `psft rollout` on the model as it is, `psft train` on the rollouts, and again.

Each round has a folder in --out: prompts.jsonl, rollouts.jsonl, run/ (metrics, checkpoints) and hf/, the model of the
next round. The same command again goes on where it ended: what a round has finished stands under its name and is not
done again, and a training resumes from its own checkpoints.

The old policy of a round is the model that has answered: train.yaml says `old_policy_interval: fixed`. Adam's moments
start anew with each round, as does the schedule of the learning rate.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_psft.config.flags import require_at_least, run_command
from megatron_psft.config.paths import PathText, escape_path
from megatron_psft.data.files import Row
from megatron_psft.data.sources import open_rows
from megatron_psft.errors import UserError
from megatron_psft.hf.hub import ModelConfig
from megatron_psft.rollout.prompts import PromptConfig

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
_RECIPES = escape_path(str(HERE))

EXAMPLES = """example:
    python examples/mixed/grpo.py --model runs/first/hf --prompts gsm8k/train.jsonl --prompt-key question \\
        --rounds 100 --prompts-per-round 128 --nproc-per-node 8 --out runs/grpo"""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The rounds."""

    rounds: int
    """Rounds in all, those that --out already holds included."""
    prompts_per_round: int
    """Prompts that a round answers; each is asked once before any is asked again."""
    rollout_config: PathText = f"{_RECIPES}/rollout.yaml"
    """YAML file of further flags of `psft rollout`."""
    train_config: PathText = f"{_RECIPES}/train.yaml"
    """YAML file of further flags of `psft train`."""
    nproc_per_node: int = 1
    """Processes that train, on this machine."""
    seed: int = 1234
    """Seed of the order of prompts; round number N samples and trains with seed + N."""
    out: PathText
    """Folder of the rounds."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "rounds", "prompts_per_round", "nproc_per_node")
        for name in ("rollout_config", "train_config"):
            if not Path(getattr(self, name)).is_file():
                raise UserError(f"{name} ({getattr(self, name)}) must be a file; check the path")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole loop."""

    model: ModelConfig
    prompts: PromptConfig
    loop: LoopConfig


def main(argv: Sequence[str]) -> int:
    """Runs what is missing and returns the exit code: 0, 2 after a user's mistake, or that of a command that failed."""
    return run_command(Config, run_rounds, argv, epilog=EXAMPLES)


def run_rounds(config: Config) -> int:
    rows = read_rows(config.prompts.prompts)
    model = config.model.model
    tokenizer = config.model.model if config.model.tokenizer is None else config.model.tokenizer
    for number in range(1, config.loop.rounds + 1):
        folder = Path(config.loop.out).resolve() / f"round_{number:04d}"
        if not (folder / "hf").is_dir():
            print(f"round {number} of {config.loop.rounds}", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            write_prompts(rows, number, config.loop, folder / "prompts.jsonl")
            if code := sample(model, tokenizer, number, config, folder) or train(
                model, tokenizer, number, config, folder
            ):
                return code
        model = str(folder / "hf")
    print(f"{config.loop.rounds} rounds are done; the model is {model}")
    return 0


def read_rows(paths: Sequence[str]) -> list[object]:
    """The rows as they are: `psft rollout` says which keys are wanted."""
    rows = []
    for row in (row for path in paths for row in open_rows(path, field="prompts")):
        if not isinstance(row, Row):
            raise UserError(f"prompts must hold usable rows only; the first that is not is {row}")
        rows.append(row.value)
    return rows


def write_prompts(rows: Sequence[object], number: int, loop: LoopConfig, path: Path) -> None:
    """The prompts of round `number`, from 1: the next of a sequence that goes through all rows, in a new order each
    time."""
    if len(rows) < loop.prompts_per_round:
        raise UserError(
            f"prompts_per_round ({loop.prompts_per_round}) must be at most the number of prompts ({len(rows)})"
        )
    places = range((number - 1) * loop.prompts_per_round, number * loop.prompts_per_round)
    orders = {epoch: shuffled(len(rows), loop.seed + epoch) for epoch in {place // len(rows) for place in places}}
    chosen = [rows[orders[place // len(rows)][place % len(rows)]] for place in places]
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")


def shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def sample(model: str, tokenizer: str, number: int, config: Config, folder: Path) -> int:
    """Rollouts of the current model; the exit code."""
    if (folder / "rollouts.jsonl").exists():
        return 0
    command = [sys.executable, "tools/rollout.py", "--config", str(Path(config.loop.rollout_config).resolve())]
    command += ["--model", model, "--tokenizer", tokenizer, "--prompts", str(folder / "prompts.jsonl")]
    command += ["--prompt-key", config.prompts.prompt_key, "--answer-key", config.prompts.answer_key]
    command += [] if config.prompts.system_prompt is None else ["--system-prompt", config.prompts.system_prompt]
    command += ["--seed", str(config.loop.seed + number), "--out", str(folder / "rollouts.jsonl")]
    return run(command)


def train(model: str, tokenizer: str, number: int, config: Config, folder: Path) -> int:
    """One training on the rollouts, whose export is the next model; the exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(config.loop.nproc_per_node), "pretrain_psft.py"]
    command += ["--config", str(Path(config.loop.train_config).resolve())]
    command += ["--load-hf", model, "--tokenizer", tokenizer, "--data", str(folder / "rollouts.jsonl")]
    command += ["--save", str(folder / "run"), "--export-hf", str(folder / "hf")]
    return run([*command, "--seed", str(config.loop.seed + number)])


def run(command: Sequence[str]) -> int:
    # The commands are run from the repository, and find its package there.
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
