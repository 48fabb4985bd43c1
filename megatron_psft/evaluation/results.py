"""What an evaluation has found: generations with their scores, figures over questions, and the folder that keeps both.

The questions of a task stand for all that could have been asked, and the answers to one question are alike. So every
figure is a mean over questions of a value per question, and its 95 % interval is the normal one of these values: mean
+- 1.96 standard deviations / sqrt(questions). However many answers a question gets, it counts once.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_psft.atomic import replace_file
from megatron_psft.errors import UserError, folder_error, reason_of

CORRECT = "correct"
"""The score that a verifier gives, 0 (wrong) to 1 (right)."""

_Z = 1.96  # of a two-sided interval of 95 %
_RESULTS, _SETTINGS, _TABLE, _GENERATIONS = "results.json", "settings.json", "results.md", "generations"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One answer."""

    question: int
    """Number of the question in its task, from 0."""
    sample: int
    """Number of the answer among those to its question, from 0."""
    prompt: Any
    """What was asked: messages, or text; JSON values."""
    answer: str
    """The known answer."""
    text: str
    scores: dict[str, float] = field(default_factory=dict)
    """What the answer is worth, by metric; empty until it has been checked."""
    tokens: int | None = None
    """Length with the end token, where it is known."""
    is_finished: bool | None = None
    """Whether the model has ended it; otherwise it was cut at the longest length. None where this is not known."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its 95 % interval, which is absent where nothing tells it, as with one question."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What one task has come to."""

    source: str
    """File of its questions, or the library that has them."""
    questions: int
    metrics: dict[str, Estimate]
    samples_per_question: int = 1
    unfinished: float | None = None
    """Share of the answers that were cut at the longest length."""
    mean_tokens: float | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    """Of the libraries that had a part in it; None for those that are not installed."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TaskResult":
        """The reverse of `dataclasses.asdict`."""
        return cls(**{**value, "metrics": {name: Estimate(**found) for name, found in value["metrics"].items()}})


def normal_estimate(value: float, standard_error: float | None) -> Estimate:
    """A figure with the normal interval of its standard error; without one where that is absent or 0, as a spread of
    nothing over the questions asked says nothing of others."""
    if not standard_error:
        return Estimate(value=value)
    return Estimate(value=value, low=value - _Z * standard_error, high=value + _Z * standard_error)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and normal interval of the values of questions."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return normal_estimate(statistics.fmean(values), deviation and deviation / math.sqrt(len(values)))


def estimate_share(values: Sequence[float]) -> Estimate:
    """`estimate` of values between 0 and 1, which its interval does not leave.

    Where all are 0, or all are 1, Wilson's interval of so many questions stands in, which for 0 of 30 reaches to 0.11.
    """
    found = estimate(values)
    if found.low is not None and found.high is not None:
        return Estimate(value=found.value, low=max(found.low, 0.0), high=min(found.high, 1.0))
    if found.value in (0, 1):
        width = _Z**2 / (len(values) + _Z**2)
        return Estimate(value=found.value, low=found.value * (1 - width), high=found.value + (1 - found.value) * width)
    return found


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that of `k` answers, drawn from `num_samples` without putting back, at least one is right.

    The unbiased estimate of arXiv 2107.03374, equation 1; `k` is at most `num_samples`.
    """
    assert 1 <= k <= num_samples, (k, num_samples)
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def group_by_question(generations: Iterable[Generation]) -> list[list[Generation]]:
    """The answers to each question, in the order of their first."""
    groups: dict[int, list[Generation]] = {}
    for generation in generations:
        groups.setdefault(generation.question, []).append(generation)
    return list(groups.values())


def question_means(groups: Sequence[Sequence[Generation]], metric: str) -> list[float]:
    """The mean score of each question's answers."""
    return [statistics.fmean(answer.scores[metric] for answer in group) for group in groups]


def question_passes(groups: Sequence[Sequence[Generation]], k: int) -> list[float]:
    """`pass_at_k` of each question; an answer is right where its verifier gives all of 1."""
    return [pass_at_k(len(group), sum(answer.scores[CORRECT] == 1 for answer in group), k) for group in groups]


def known_ks(num_samples: int) -> list[int]:
    """The k of pass@k that are reported: powers of two, and all samples. pass@1 is the mean."""
    powers = [2**power for power in range(1, num_samples.bit_length()) if 2**power < num_samples]
    return [*powers, num_samples] if num_samples > 1 else []


def summarize(source: str, generations: Sequence[Generation]) -> TaskResult:
    """mean@n and pass@k of checked answers, n to each question."""
    groups = group_by_question(generations)
    n = len(groups[0])
    assert all(len(group) == n for group in groups), "questions with unequal numbers of answers"
    metrics = {f"mean@{n}": estimate_share(question_means(groups, CORRECT))}
    metrics |= {f"pass@{k}": estimate_share(question_passes(groups, k)) for k in known_ks(n)}
    return TaskResult(
        source=source,
        questions=len(groups),
        samples_per_question=n,
        metrics=metrics,
        unfinished=statistics.fmean(not answer.is_finished for answer in generations),
        mean_tokens=statistics.fmean(answer.tokens or 0 for answer in generations),
    )


class ResultsFolder:
    """`settings.json`, `results.json` and its table `results.md`, and `generations/TASK.jsonl`, one answer a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def has_results(self) -> bool:
        return (self.path / _RESULTS).is_file()

    def begin(self, settings: dict[str, Any]) -> None:
        """Creates the folder, or goes on with one.

        Raises UserError where it cannot be written, or holds what other settings have given: one folder is one model,
        asked in one way.
        """
        try:
            (self.path / _GENERATIONS).mkdir(parents=True, exist_ok=True)
            if (self.path / _SETTINGS).exists():
                _check_same(self.path, _read_object(self.path / _SETTINGS), settings)
            replace_file(self.path / _SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise folder_error("out", self.path, error) from None

    def settings(self) -> dict[str, Any]:
        """Raises UserError where there are none."""
        return _read_object(self.path / _SETTINGS)

    def results(self) -> dict[str, TaskResult]:
        """The tasks that are done, by name; none in a new folder."""
        if not self.has_results:
            return {}
        try:
            return {name: TaskResult.from_json(value) for name, value in _read_object(self.path / _RESULTS).items()}
        except (TypeError, AttributeError, KeyError) as error:
            raise UserError(f"{self.path / _RESULTS} must be what `psft evaluate` has written: {error}") from None

    def add_results(self, found: dict[str, TaskResult]) -> None:
        """Keeps results beside those there are, and writes the table anew."""
        results = dict(sorted({**self.results(), **found}.items()))
        content = {name: asdict(result) for name, result in results.items()}
        replace_file(self.path / _TABLE, results_table(results) + "\n")
        replace_file(self.path / _RESULTS, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_generations(self, task: str, generations: Iterable[Generation]) -> None:
        lines = (json.dumps(asdict(generation), ensure_ascii=False) + "\n" for generation in generations)
        replace_file(self._generations_file(task), "".join(lines))

    def read_generations(self, task: str) -> list[Generation]:
        """Empty where the task has none. Raises UserError for a line that is none."""
        path = self._generations_file(task)
        found: list[Generation] = []
        if not path.is_file():
            return found
        # Not splitlines(), which would cut at characters that JSON leaves as they are.
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            try:
                found += [Generation(**json.loads(line))] if line else []
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}:{number} must be a generation: {error}; remove the file") from None
        return found

    def _generations_file(self, task: str) -> Path:
        return self.path / _GENERATIONS / f"{task}.jsonl"


def results_table(results: dict[str, TaskResult]) -> str:
    """All tasks in Markdown: mean@n and pass@n of each, or the metrics of lm-evaluation-harness. The other pass@k are
    in results.json only."""
    rows = [["task", "questions", "metric", "value", "95 % interval", "unfinished", "mean tokens"]]
    for name, result in results.items():
        others = {f"pass@{k}" for k in known_ks(result.samples_per_question)[:-1]}
        rows += [
            [
                name,
                str(result.questions),
                metric,
                f"{found.value:.4f}",
                "" if found.low is None else f"{found.low:.4f} to {found.high:.4f}",
                "" if result.unfinished is None else f"{result.unfinished:.1%}",
                "" if result.mean_tokens is None else f"{result.mean_tokens:.0f}",
            ]
            for metric, found in result.metrics.items()
            if metric not in others
        ]
    note = (
        "Means over questions; 95 % intervals are normal ones of the questions' values (Wilson's where all are equal)."
    )
    return markdown_table(rows) + "\n\n" + note


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])


def _check_same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            raise UserError(
                f"out ({folder}) holds results with {name} {old.get(name)!r}, not {new.get(name)!r}; name another "
                "folder"
            )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} must be what `psft evaluate` has written: {reason_of(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must be what `psft evaluate` has written, found {type(value).__name__}")
    return value
