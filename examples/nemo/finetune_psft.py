"""Fine-tunes with PSFT in Megatron-Bridge; `--help` has examples."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from megatron_psft.config.flags import run_command
from megatron_psft.config.paths import PathText
from megatron_psft.distributed.environment import prepare_environment
from megatron_psft.distributed.exit_code import leave, left_behind
from megatron_psft.errors import UserError

if TYPE_CHECKING:  # it takes seconds to import, and `--help` answers at once
    from megatron_psft.nemo.config import PsftConfigContainer

EXAMPLES = """examples:
  one node, records of {"messages": [...]} in DATA/training.jsonl:
    torchrun --nproc-per-node 8 examples/nemo/finetune_psft.py --recipe qwen25_7b \\
        --pretrained-checkpoint Qwen2.5-7B-Instruct --data DATA --save runs/first
  any field of Megatron-Bridge's configuration, and of PSFT's section:
    ... --overrides train.train_iters=500 model.context_parallel_size=2 psft.old_policy_interval=4

Exit codes, and PSFT_EXIT_CODE_FILE, are those of `psft train`."""


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """What to train, on what."""

    recipe: Literal["qwen25_7b", "llama31_8b", "qwen3_4b", "qwen25_vl_7b", "qwen3_30b_a3b"]
    """Recipe of megatron_psft.nemo.recipes, without `_psft_config`."""
    pretrained_checkpoint: PathText
    """Hugging Face folder, or Megatron-Core checkpoint, to start from."""
    data: PathText | None = None
    """Folder with training.jsonl, and validation.jsonl where validation.eval_iters is not 0; the recipe's data set
    if unset. For text recipes."""
    save: PathText | None = None
    """Folder for checkpoints. Where it holds one already, the run resumes from it. The recipe's if unset."""
    overrides: tuple[str, ...] = ()
    """Fields to set, as section.field=value."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The command's only section."""

    run: RecipeConfig


def main(argv: Sequence[str]) -> int:
    """Trains on this rank and returns the exit code, as `psft train` has it."""
    prepare_environment()  # before torch is imported
    with left_behind():
        code = run_command(FinetuneConfig, train, argv, epilog=EXAMPLES)
        leave(code)
        return code


def train(config: FinetuneConfig) -> None:
    """Builds the recipe and trains."""
    recipe = build_recipe(config.run)
    from megatron_psft.nemo.train import finetune

    finetune(recipe)


def build_recipe(config: RecipeConfig) -> "PsftConfigContainer":
    """The recipe with what the command line says.

    Raises:
        UserError: Megatron-Bridge is not installed, or an override names no field.
    """
    try:
        from megatron_psft.nemo import recipes
    except ImportError as error:
        raise UserError(str(error)) from error
    from megatron.bridge.data.sft_processing import ChatSFTPreprocessingConfig
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    recipe: PsftConfigContainer = getattr(recipes, f"{config.recipe}_psft_config")()
    recipe.checkpoint.pretrained_checkpoint = config.pretrained_checkpoint
    if config.save is not None:
        recipe.checkpoint.save = recipe.checkpoint.load = config.save
    if config.data is not None:
        recipe.dataset = replace(
            recipe.dataset,
            hf_dataset=None,
            hf_validation_proportion=None,
            dataset_root=config.data,
            preprocessing=ChatSFTPreprocessingConfig(),
            do_test=False,
        )
    return process_config_with_overrides(recipe, cli_overrides=list(config.overrides))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
