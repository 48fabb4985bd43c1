"""Sets two results folders side by side: per task the difference with its interval, the questions won and lost, and
some answers of both.

The two have answered the same questions, so that the difference is taken question by question: its 95 % interval is the
normal one of these differences, and does not contain how much harder one question is than another.
"""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One question with the answers of both sides."""

    first: Sequence[Generation]
    second: Sequence[Generation]

    def difference(self, metric: str) -> float:
        first, second = question_means([self.first], metric), question_means([self.second], metric)
        return second[0] - first[0]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two results folders and the questions that both have answered."""

    first: ResultsFolder
    second: ResultsFolder
    pairs: Mapping[str, Sequence[Pair]]
    """By task."""

    def table(self) -> str:
        """Markdown: a row per task and metric."""
        return markdown_table(_difference_rows(self.first, self.second, self.pairs))

    def report(self, *, examples: int, max_characters: int) -> str:
        """Markdown: the settings that differ, the table, and per task up to `examples` questions that the second has
        won and as many that it has lost, with an answer of both sides, of each at most its last `max_characters`."""
        shown = _shown(self.pairs, examples, max_characters)
        return "\n\n".join([*_head(self.first, self.second), self.table(), *shown]) + "\n"


def compare(first: ResultsFolder, second: ResultsFolder) -> Comparison:
    """Raises UserError for folders that have no task, or no question of a task, in common."""
    tasks = [task for task in first.results() if task in second.results()]
    if not tasks:
        raise UserError(
            f"first ({first.path}) and second ({second.path}) must have a task in common, but have "
            f"{', '.join(first.results())} and {', '.join(second.results())}; evaluate both on the same"
        )
    pairs = {task: _pairs_of(first, second, task) for task in tasks}
    for task, found in pairs.items():
        if not found and first.read_generations(task):
            raise UserError(f"{task} has no question that both were asked; evaluate both on the same file")
    return Comparison(first=first, second=second, pairs=pairs)


def _pairs_of(first: ResultsFolder, second: ResultsFolder, task: str) -> list[Pair]:
    """The questions of `task` that both were asked."""
    ours, theirs = (
        {_identity(group[0]): group for group in group_by_question(side.read_generations(task))}
        for side in (first, second)
    )
    return [Pair(first=group, second=theirs[key]) for key, group in ours.items() if key in theirs]


def _identity(generation: Generation) -> str:
    """What two answers share that are to the same question: its messages and its known answer. The system message is
    each side's own affair; so is all of the text that lm-eval makes with the model's template, and there the number
    counts."""
    prompt = generation.prompt
    asked = generation.question if isinstance(prompt, str) else [m for m in prompt if m["role"] != "system"]
    return json.dumps([asked, generation.answer])


def _difference_rows(
    first: ResultsFolder, second: ResultsFolder, pairs: Mapping[str, Sequence[Pair]]
) -> list[list[str]]:
    """A row per task and metric."""
    rows = [
        ["task", "metric", "questions", "first", "second", "second - first", "95 % interval", "wins", "losses", "ties"]
    ]
    for task, found in pairs.items():
        by_question = _values_by_question(found)
        rows += [_difference_row(task, metric, *values) for metric, values in by_question.items()]
        ours, theirs = first.results()[task].metrics, second.results()[task].metrics
        for metric in ours:
            # A figure that is no mean over questions, such as a share of all instructions in all prompts.
            if metric in theirs and metric not in by_question and "@" not in metric:
                one, other = ours[metric].value, theirs[metric].value
                rows.append([task, metric, "", f"{one:.4f}", f"{other:.4f}", f"{other - one:+.4f}", "", "", "", ""])
    return rows


def _values_by_question(pairs: Sequence[Pair]) -> dict[str, tuple[list[float], list[float]]]:
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


def _difference_row(task: str, metric: str, first: Sequence[float], second: Sequence[float]) -> list[str]:
    differences = [other - one for one, other in zip(first, second, strict=True)]
    found = estimate(differences)
    interval = "" if found.low is None else f"{found.low:+.4f} to {found.high:+.4f}"
    counts = [sum(map(is_it, differences)) for is_it in (lambda x: x > 0, lambda x: x < 0, lambda x: x == 0)]
    values = [f"{sum(side) / len(side):.4f}" for side in (first, second)]
    return [task, metric, str(len(differences)), *values, f"{found.value:+.4f}", interval, *map(str, counts)]


def _head(first: ResultsFolder, second: ResultsFolder) -> list[str]:
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


def _shown(pairs: Mapping[str, Sequence[Pair]], examples: int, max_characters: int) -> list[str]:
    """Per task, some questions with an answer of both sides."""
    parts = []
    for task, found in pairs.items():
        for pair, metric in _chosen(found, examples):
            question = pair.first[0]
            prompt = question.prompt if isinstance(question.prompt, str) else question.prompt[-1]["content"]
            difference = pair.difference(metric)
            parts.append(f"## {task}, question {question.question + 1}: {metric} {difference:+.4f}")
            parts.append(
                f"<pre>{_escaped(str(prompt))}</pre>\n\nKnown answer: <code>{_escaped(question.answer)}</code>"
            )
            cells = [
                _answer_cell(_best(side, metric, worst=is_worse), metric, max_characters)
                for side, is_worse in ((pair.first, difference > 0), (pair.second, difference < 0))
            ]
            parts.append(
                "<table><tr><th>first</th><th>second</th></tr>\n<tr>"
                + "".join(f"<td>{cell}</td>" for cell in cells)
                + "</tr></table>"
            )
    return parts


def _chosen(pairs: Sequence[Pair], count: int) -> list[tuple[Pair, str]]:
    """Up to `count` questions that were won and as many that were lost, the clearest first; where there are none of
    both, `count` of equal ones."""
    metric = next(iter(pairs[0].first[0].scores), None) if pairs else None
    if metric is None:
        return []
    ranked = sorted(pairs, key=lambda pair: -abs(pair.difference(metric)))
    won = [pair for pair in ranked if pair.difference(metric) > 0][:count]
    lost = [pair for pair in ranked if pair.difference(metric) < 0][:count]
    return [(pair, metric) for pair in (won + lost or ranked[:count])]


def _best(answers: Sequence[Generation], metric: str, *, worst: bool) -> Generation:
    """The first answer with the highest score, or the lowest."""
    return (min if worst else max)(answers, key=lambda answer: answer.scores[metric])


def _answer_cell(answer: Generation, metric: str, max_characters: int) -> str:
    text = answer.text if len(answer.text) <= max_characters else "... " + answer.text[-max_characters:]
    return f"{metric} {answer.scores[metric]:.4g}<pre>{_escaped(text)}</pre>"


def _escaped(text: str) -> str:
    """For HTML within Markdown, which would take an empty line for its end."""
    return html.escape(text).replace("\n", "&#10;")
