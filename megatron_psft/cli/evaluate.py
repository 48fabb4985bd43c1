"""Asks a model the questions of maths sets and of lm-evaluation-harness's tasks, and keeps answers and results.

A question of a maths set gets n answers; mean@n is the share of right ones, and pass@k the probability that of k
answers at least one is right, without bias estimated from all n. Figures are means over questions, with the normal 95 %
interval of the questions' values.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_psft.cli.output import configure_output
from megatron_psft.config.flags import run_command
from megatron_psft.config.inputs import TemplateConfig
from megatron_psft.config.paper import EVALUATION
from megatron_psft.config.paths import PathText
from megatron_psft.evaluation.results import results_table
from megatron_psft.evaluation.tasks import Evaluation, EvaluationSampling, TaskConfig, evaluate
from megatron_psft.hf.hub import ModelConfig

EXAMPLES = """examples:
  the paper's maths sets, as it samples them: 32 answers of up to 10,240 tokens, temperature 0.7, top-p 0.95:
    psft evaluate --model runs/first/hf --tasks eval/*.parquet --preset paper --out results/first
  GSM8K, 4 answers to each of its first 200 questions:
    psft evaluate --model runs/first/hf --tasks gsm8k/test.jsonl --limit 200 --num-samples 4 \\
        --out results/gsm8k
  instruction following and knowledge, by lm-evaluation-harness (pip install 'lm-eval[hf,ifeval]'):
    psft evaluate --model runs/first/hf --tasks ifeval mmlu --out results/general

--out receives results.md, results.json, settings.json, and generations/TASK.jsonl with a line per answer: question,
sample, prompt, answer (the known one), text, scores, tokens, is_finished. The same command goes on where it was
interrupted, by whole tasks; another --tasks adds to the folder. `psft compare` sets two such folders side by side."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where results go."""

    out: PathText
    """Folder of results; created, or added to where it holds results of the same model and settings."""


PRESETS = {"paper": EVALUATION}
PresetName = Literal["paper"]


@dataclass(frozen=True, kw_only=True)
class PresetConfig:
    """Several settings by one name."""

    preset: PresetName | None = field(default=None, metadata={"presets": PRESETS})
    """Sampling of maths sets as in published evaluations, where its flags are not given. paper (arXiv 2508.17784):
    temperature 0.7, top_p 0.95, max_new_tokens 10240, num_samples 32."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """The whole command."""

    model: ModelConfig
    tasks: TaskConfig
    template: TemplateConfig
    preset: PresetConfig
    sampling: EvaluationSampling
    output: OutputConfig


def main(argv: Sequence[str]) -> int:
    """Writes the results, prints their table and returns the exit code: 0, or 2 after a user's mistake."""
    configure_output(level=logging.INFO)
    return run_command(EvaluateConfig, run, argv, prog="psft evaluate", epilog=EXAMPLES)


def run(config: EvaluateConfig) -> None:
    """Raises UserError for what cannot be evaluated."""
    folder = evaluate(
        Evaluation(
            model=config.model,
            tasks=config.tasks,
            template=config.template,
            sampling=config.sampling,
            out=config.output.out,
        )
    )
    print(results_table(folder.results()))
    print(f"\nresults in {folder.path}")
