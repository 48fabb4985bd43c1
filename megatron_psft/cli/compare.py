"""Sets two results folders of `psft evaluate`, or two checkpoints, side by side: per task the difference with its
interval, the questions won and lost, and some answers of both.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_psft.atomic import replace_file
from megatron_psft.cli.output import configure_output
from megatron_psft.config.flags import require_at_least, run_command
from megatron_psft.config.inputs import TemplateConfig
from megatron_psft.config.paths import PathText
from megatron_psft.errors import UserError, folder_error
from megatron_psft.evaluation.compare import compare
from megatron_psft.evaluation.results import ResultsFolder
from megatron_psft.evaluation.tasks import Evaluation, EvaluationSampling, TaskConfig, evaluate
from megatron_psft.hf.hub import ModelConfig, model_folder

EXAMPLES = """examples:
  results that are there:
    psft compare --first results/base --second results/psft --out results/base-psft
  checkpoints, which are evaluated into OUT/first and OUT/second; an interrupted command goes on where it was:
    psft compare --first Qwen/Qwen2.5-7B --second runs/first/hf --tasks gsm8k/test.jsonl --out results/both

--out receives compare.md. Wins are questions on which the second is better."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """What is compared, and how much of it is shown."""

    first: PathText
    """Results folder of `psft evaluate`; or Hugging Face folder or hub ID of a model, which is evaluated first."""
    second: PathText
    """As `first`; differences are second minus first."""
    tokenizer: PathText | None = None
    """Models: folder or hub ID of the tokenizer of both; each its own if unset."""
    out: PathText
    """Folder that receives compare.md, and the results of models."""
    examples: int = 3
    """Questions of each task to show with an answer of both sides, from those won, and as many from those lost."""
    max_characters: int = 1500
    """Longest part of an answer that is shown, from its end."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "examples")
        require_at_least(1, self, "max_characters")


@dataclass(frozen=True, kw_only=True)
class ComparedTasks(TaskConfig):
    """Models: what is asked, and what makes an answer right."""

    tasks: tuple[PathText, ...] = ()
    """Maths sets and names of lm-evaluation-harness tasks, as for `psft evaluate`."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The whole command."""

    sides: Sides
    tasks: ComparedTasks
    template: TemplateConfig
    sampling: EvaluationSampling


def main(argv: Sequence[str]) -> int:
    """Writes the comparison, prints its table and returns the exit code: 0, or 2 after a user's mistake."""
    configure_output(level=logging.INFO)
    return run_command(CompareConfig, run, argv, prog="psft compare", epilog=EXAMPLES)


def run(config: CompareConfig) -> None:
    """Raises UserError for folders that cannot be compared."""
    sides = config.sides
    names = ("first", "second")
    models = [name for name in names if not ResultsFolder(Path(getattr(sides, name))).has_results]
    check_effects(config, models)
    # All of them before hours of sampling from the first.
    folders = {name: model_folder(name, getattr(sides, name), with_weights=True) for name in models}
    first, second = (
        results_of(name, folders[name], config) if name in models else ResultsFolder(Path(getattr(sides, name)))
        for name in names
    )
    comparison = compare(first, second)
    target = Path(sides.out) / "compare.md"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, comparison.report(examples=sides.examples, max_characters=sides.max_characters))
    except OSError as error:
        raise folder_error("out", Path(sides.out), error) from None
    print(comparison.table())
    print(f"\nfirst: {first.path}\nsecond: {second.path}\nwritten to {target}")


def check_effects(config: CompareConfig, models: Sequence[str]) -> None:
    """Refuses flags that evaluate models where there are none, and models without tasks."""
    for name in models:
        if not config.tasks.tasks:
            raise UserError(
                f"{name} ({getattr(config.sides, name)}) must be a results folder of `psft evaluate`, with its "
                "results.json; or a model, which needs tasks"
            )
    if not models and (
        config.tasks != ComparedTasks()
        or config.template != TemplateConfig()
        or config.sampling != EvaluationSampling()
    ):
        raise UserError(
            "tasks, chat template and sampling have no effect where first and second are results folders; remove them"
        )
    if not models and config.sides.tokenizer is not None:
        raise UserError(
            f"tokenizer ({config.sides.tokenizer}) has no effect where first and second are results folders; leave it "
            "out"
        )


def results_of(name: str, folder: Path, config: CompareConfig) -> ResultsFolder:
    """Evaluates the model in `folder`, on side `name`."""
    model = ModelConfig(model=str(folder), tokenizer=config.sides.tokenizer)
    out = str(Path(config.sides.out) / name)
    return evaluate(
        Evaluation(model=model, tasks=config.tasks, template=config.template, sampling=config.sampling, out=out)
    )
