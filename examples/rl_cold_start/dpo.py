"""DPO with TRL from an exported model, on pairs of a chosen and a rejected answer.

On one process as below, on several with `accelerate launch` or torchrun in front. Needs `pip install -e '.[rl]'`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from trl_run import TrainConfig, train_and_save

from megatron_psft.config.flags import require_at_least, require_positive, run_command
from megatron_psft.config.paths import PathText
from megatron_psft.data.files import BadRecord
from megatron_psft.data.formats import RecordKeys
from megatron_psft.data.messages import Message
from megatron_psft.data.pairs import Pair, parse_pair
from megatron_psft.data.sources import open_rows
from megatron_psft.errors import UserError
from megatron_psft.hf.hub import ModelConfig

EXAMPLES = """example:
    python examples/rl_cold_start/dpo.py --model runs/first/hf --pairs pairs.jsonl --out runs/first/dpo"""


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """Direct preference optimization."""

    pairs: tuple[PathText, ...]
    """JSON Lines, JSON or Parquet files, folders of them, or hub IDs, whose rows are preference pairs in any form that
    `psft train --objective dpo` reads; chosen and rejected differ in one assistant turn."""
    dpo_beta: float = 0.1
    """How strongly the trained model is held to the initial one."""
    seq_length: int = 4096
    """Longest prompt and answer, in tokens; what is longer is cut at its end."""

    def __post_init__(self) -> None:
        require_positive(self, "dpo_beta")
        require_at_least(2, self, "seq_length")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole run."""

    model: ModelConfig
    dpo: DpoConfig
    train: TrainConfig


def read_pairs(paths: Sequence[str]) -> list[dict[str, list[Message]]]:
    """Rows of prompt, chosen and rejected as lists of messages. Raises UserError that names the first bad row."""
    pairs = []
    for row in (row for path in paths for row in open_rows(path, field="pairs")):
        pair = parse_pair(row, RecordKeys(are_pairs=True))
        if isinstance(pair, BadRecord):
            raise UserError(f"pairs must hold usable rows only; the first that is not is {pair}")
        prompt, chosen, rejected = _split(pair)
        if pair.chosen.tools or pair.chosen.template_kwargs or len(chosen) != 1 or len(rejected) != 1:
            raise UserError(
                "pairs must differ in one assistant turn, and have no tools or variables for the chat template; "
                f"{pair.source} does not"
            )
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if not pairs:
        raise UserError(f"pairs ({' '.join(paths)}) must hold at least one row")
    return pairs


def _split(pair: Pair) -> tuple[list[Message], list[Message], list[Message]]:
    """What both sides begin with, and what each goes on with: an assistant's turn first."""
    end = pair.chosen.prompt_length
    return (list(pair.chosen.messages[:end]), list(pair.chosen.messages[end:]), list(pair.rejected.messages[end:]))


def train(config: Config) -> None:
    pairs = read_pairs(config.dpo.pairs)
    folder, tokenizer = config.model.folder(), config.model.load_tokenizer()

    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(**config.train.trl_arguments(), beta=config.dpo.dpo_beta, max_length=config.dpo.seq_length)
    train_and_save(
        DPOTrainer(
            model=str(folder), args=arguments, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
        )
    )


def main(argv: list[str]) -> int:
    return run_command(Config, train, argv, epilog=EXAMPLES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
