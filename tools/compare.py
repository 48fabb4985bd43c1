# PYTHON_ARGCOMPLETE_OK: shells with argcomplete's global completion complete its flags
"""Sets two results folders of tools/evaluate.py, or two checkpoints, side by side: per task the difference with its
interval, the questions won and lost, and some answers of both.

The two have answered the same questions, so that the difference is taken question by question: its 95 % interval is the
normal one of these differences, and does not contain how much harder one question is than another.
"""

import html
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # As in evaluate.py, which lies beside this file: lm-eval imports another `evaluate`.
    sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

from megatron_psft.atomic import replace_file
from megatron_psft.config.flags import require_at_least, run_command
from megatron_psft.errors import UserError
from megatron_psft.evaluation.results import (
    CORRECT,
    Generation,
    ResultsFolder,
    estimate,
    group_by_question,
    known_ks,
    markdown_table,
    question_means,
    question_passes,
)
from megatron_psft.evaluation.tasks import Evaluation, EvaluationSampling, TaskConfig, evaluate
from megatron_psft.hf.hub import ModelConfig

EXAMPLES = """examples:
  results that are there:
    python tools/compare.py --first results/base --second results/psft --out results/base-psft
  checkpoints, which are evaluated into OUT/first and OUT/second; an interrupted command goes on where it was:
    python tools/compare.py --first Qwen/Qwen2.5-7B --second runs/first/hf --tasks gsm8k/test.jsonl --out results/both

--out receives compare.md. Wins are questions on which the second is better."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """What is compared, and how much of it is shown."""

    first: str
    """Results folder of tools/evaluate.py; or Hugging Face folder or hub ID of a model, which is evaluated first."""
    second: str
    """As `first`; differences are second minus first."""
    tokenizer: str | None = None
    """Models: folder or hub ID of the tokenizer of both; each its own where absent."""
    out: str
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

    tasks: tuple[str, ...] = ()
    """Maths sets and names of lm-evaluation-harness tasks, as for tools/evaluate.py."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The whole command."""

    sides: Sides
    tasks: ComparedTasks
    sampling: EvaluationSampling


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One question with the answers of both sides."""

    first: Sequence[Generation]
    second: Sequence[Generation]

    def difference(self, metric: str) -> float:
        first, second = question_means([self.first], metric), question_means([self.second], metric)
        return second[0] - first[0]


def main(argv: Sequence[str]) -> int:
    """Writes the comparison, prints its table and returns the exit code: 0, or 2 after a user's mistake."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("megatron_psft").setLevel(logging.INFO)
    return run_command(CompareConfig, compare, argv, epilog=EXAMPLES)


def compare(config: CompareConfig) -> None:
    """Raises UserError for folders that cannot be compared."""
    names = ("first", "second")
    models = [name for name in names if not ResultsFolder(Path(getattr(config.sides, name))).has_results]
    check_effects(config, models)
    first, second = (
        results_of(name, config) if name in models else ResultsFolder(Path(getattr(config.sides, name)))
        for name in names
    )
    tasks = [task for task in first.results() if task in second.results()]
    if not tasks:
        raise UserError(
            f"first ({first.path}) and second ({second.path}) must have a task in common, but have "
            f"{', '.join(first.results())} and {', '.join(second.results())}; evaluate both on the same"
        )
    pairs = {task: pairs_of(first, second, task) for task in tasks}
    for task, found in pairs.items():
        if not found and first.read_generations(task):
            raise UserError(f"{task} has no question that both were asked; evaluate both on the same file")
    table = markdown_table(difference_rows(first, second, pairs))
    target = Path(config.sides.out) / "compare.md"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, "\n\n".join([*head(first, second), table, *shown(pairs, config.sides)]) + "\n")
    except OSError as error:
        raise UserError(f"out ({config.sides.out}) must be a folder that can be written: {error.strerror}") from None
    print(table)
    print(f"\nfirst: {first.path}\nsecond: {second.path}\nwritten to {target}")


def check_effects(config: CompareConfig, models: Sequence[str]) -> None:
    """Refuses flags that evaluate models where there are none, and models without tasks."""
    for name in models:
        if not config.tasks.tasks:
            raise UserError(
                f"{name} ({getattr(config.sides, name)}) must be a results folder of tools/evaluate.py, with its "
                "results.json; or a model, which needs tasks"
            )
    if not models and (config.tasks != ComparedTasks() or config.sampling != EvaluationSampling()):
        raise UserError("tasks and sampling have no effect where first and second are results folders; leave them out")
    if not models and config.sides.tokenizer is not None:
        raise UserError(
            f"tokenizer ({config.sides.tokenizer}) has no effect where first and second are results folders; leave it "
            "out"
        )


def results_of(name: str, config: CompareConfig) -> ResultsFolder:
    """Evaluates the model on side `name`."""
    model = ModelConfig(model=getattr(config.sides, name), tokenizer=config.sides.tokenizer)
    out = str(Path(config.sides.out) / name)
    return evaluate(Evaluation(model=model, tasks=config.tasks, sampling=config.sampling, out=out))


def pairs_of(first: ResultsFolder, second: ResultsFolder, task: str) -> list[Pair]:
    """The questions of `task` that both were asked."""
    ours, theirs = (
        {identity(group[0]): group for group in group_by_question(side.read_generations(task))}
        for side in (first, second)
    )
    return [Pair(first=group, second=theirs[key]) for key, group in ours.items() if key in theirs]


def identity(generation: Generation) -> str:
    """What two answers share that are to the same question: its messages and its known answer. The system message is
    each side's own affair; so is all of the text that lm-eval makes with the model's template, and there the number
    counts."""
    prompt = generation.prompt
    asked = generation.question if isinstance(prompt, str) else [m for m in prompt if m["role"] != "system"]
    return json.dumps([asked, generation.answer])


def difference_rows(first: ResultsFolder, second: ResultsFolder, pairs: dict[str, list[Pair]]) -> list[list[str]]:
    """A row per task and metric."""
    rows = [
        ["task", "metric", "questions", "first", "second", "second - first", "95 % interval", "wins", "losses", "ties"]
    ]
    for task, found in pairs.items():
        by_question = values_by_question(found)
        rows += [difference_row(task, metric, *values) for metric, values in by_question.items()]
        ours, theirs = first.results()[task].metrics, second.results()[task].metrics
        for metric in ours:
            # A figure that is no mean over questions, such as a share of all instructions in all prompts.
            if metric in theirs and metric not in by_question and "@" not in metric:
                one, other = ours[metric].value, theirs[metric].value
                rows.append([task, metric, "", f"{one:.4f}", f"{other:.4f}", f"{other - one:+.4f}", "", "", "", ""])
    return rows


def values_by_question(pairs: Sequence[Pair]) -> dict[str, tuple[list[float], list[float]]]:
    """By metric, the values of first and second on each question."""
    firsts, seconds = [pair.first for pair in pairs], [pair.second for pair in pairs]
    found = {}
    for metric in pairs[0].first[0].scores if pairs else ():
        if metric == CORRECT:
            counts = sorted({len(firsts[0]), len(seconds[0])})
            name = " and ".join(f"mean@{count}" for count in counts)
            found[name] = (question_means(firsts, metric), question_means(seconds, metric))
            for k in known_ks(counts[0]):
                found[f"pass@{k}"] = (question_passes(firsts, k), question_passes(seconds, k))
        elif metric in pairs[0].second[0].scores:
            found[metric] = (question_means(firsts, metric), question_means(seconds, metric))
    return found


def difference_row(task: str, metric: str, first: Sequence[float], second: Sequence[float]) -> list[str]:
    differences = [other - one for one, other in zip(first, second, strict=True)]
    found = estimate(differences)
    interval = "" if found.low is None else f"{found.low:+.4f} to {found.high:+.4f}"
    counts = [sum(map(is_it, differences)) for is_it in (lambda x: x > 0, lambda x: x < 0, lambda x: x == 0)]
    values = [f"{sum(side) / len(side):.4f}" for side in (first, second)]
    return [task, metric, str(len(differences)), *values, f"{found.value:+.4f}", interval, *map(str, counts)]


def head(first: ResultsFolder, second: ResultsFolder) -> list[str]:
    """Title, and the settings in which the two differ."""
    ours, theirs = first.settings(), second.settings()
    rows = [["setting", "first", "second"], ["results", str(first.path), str(second.path)]]
    rows += [
        [name, str(ours.get(name)), str(theirs.get(name))]
        for name in {**ours, **theirs}
        if name != "weights" and ours.get(name) != theirs.get(name)
    ]
    note = "Differences are taken question by question; their 95 % intervals are normal ones. Wins are the second's."
    return ["# First and second", markdown_table(rows), note]


def shown(pairs: dict[str, list[Pair]], sides: Sides) -> list[str]:
    """Per task, some questions with an answer of both sides."""
    parts = []
    for task, found in pairs.items():
        for pair, metric in chosen(found, sides.examples):
            question = pair.first[0]
            prompt = question.prompt if isinstance(question.prompt, str) else question.prompt[-1]["content"]
            difference = pair.difference(metric)
            parts.append(f"## {task}, question {question.question + 1}: {metric} {difference:+.4f}")
            parts.append(f"<pre>{escaped(str(prompt))}</pre>\n\nKnown answer: <code>{escaped(question.answer)}</code>")
            cells = [
                answer_cell(best(side, metric, worst=is_worse), metric, sides.max_characters)
                for side, is_worse in ((pair.first, difference > 0), (pair.second, difference < 0))
            ]
            parts.append(
                "<table><tr><th>first</th><th>second</th></tr>\n<tr>"
                + "".join(f"<td>{cell}</td>" for cell in cells)
                + "</tr></table>"
            )
    return parts


def chosen(pairs: Sequence[Pair], count: int) -> list[tuple[Pair, str]]:
    """Up to `count` questions that were won and as many that were lost, the clearest first; where there are none of
    both, `count` of equal ones."""
    metric = next(iter(pairs[0].first[0].scores), None) if pairs else None
    if metric is None:
        return []
    ranked = sorted(pairs, key=lambda pair: -abs(pair.difference(metric)))
    won = [pair for pair in ranked if pair.difference(metric) > 0][:count]
    lost = [pair for pair in ranked if pair.difference(metric) < 0][:count]
    return [(pair, metric) for pair in (won + lost or ranked[:count])]


def best(answers: Sequence[Generation], metric: str, *, worst: bool) -> Generation:
    """The first answer with the highest score, or the lowest."""
    return (min if worst else max)(answers, key=lambda answer: answer.scores[metric])


def answer_cell(answer: Generation, metric: str, max_characters: int) -> str:
    text = answer.text if len(answer.text) <= max_characters else "... " + answer.text[-max_characters:]
    return f"{metric} {answer.scores[metric]:.4g}<pre>{escaped(text)}</pre>"


def escaped(text: str) -> str:
    """For HTML within Markdown, which would take an empty line for its end."""
    return html.escape(text).replace("\n", "&#10;")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
