"""What a model of the demo can do: its answers, which of them are right, and what its training has measured."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import ask
import general
import tickets

from megatron_psft.atomic import replace_file
from megatron_psft.progress import progress

Line = dict[str, Any]


@dataclass(frozen=True)
class Answered:
    """A request with a model's answer, and how many of its points the answer has."""

    request: str
    answer: str
    points: int


@dataclass(frozen=True)
class Measured:
    """Of the base, or of a run from it. `metrics` are the lines of metrics.jsonl, of which the base has none."""

    name: str
    tickets: Sequence[Answered]
    general: Sequence[Answered]
    metrics: Sequence[Line]

    @property
    def whole_tickets(self) -> int:
        return sum(answered.points == len(tickets.FIELDS) for answered in self.tickets)

    @property
    def right_fields(self) -> int:
        return sum(answered.points for answered in self.tickets)

    @property
    def right_answers(self) -> int:
        return sum(answered.points for answered in self.general)

    def evaluated(self, metric: str) -> list[tuple[int, float]]:
        """Step and value of each evaluation, the one before the first step too."""
        return [(line["step"], line[metric]) for line in self.metrics if metric in line]

    def mean(self, metric: str) -> float | None:
        """Over the steps but the first, which is slower than the others; None if no step has it."""
        values = [line[metric] for line in self.metrics if line["step"] > 1 and metric in line]
        return mean(values) if values else None


def measured(name: str, folder: Path, base: str, trained: Sequence[tickets.Record]) -> Measured:
    """Of the model `name` in the demo's folder; its answers are kept there, and not asked for again.

    Args:
        name: `base` or a run's.
        folder: of the demo.
        base: the initial model.
        trained: the records that the runs have seen.
    """
    held_out, path = tickets.held_out(trained), folder / "answers" / f"{name}.json"
    mails = [record["prompt"] for record in held_out]
    questions = [request.prompt for request in general.REQUESTS]
    if not path.exists():
        model = ask.Model(base if name == "base" else folder / name / "hf")
        said = [*_said(model, name, mails, tickets.MAX_TOKENS), *_said(model, name, questions, general.MAX_TOKENS)]
        path.parent.mkdir(exist_ok=True)
        replace_file(path, json.dumps(said, indent=1))
    answers = json.loads(path.read_text(encoding="utf-8"))
    answers_to_mails, answers_to_questions = answers[: len(mails)], answers[len(mails) :]
    lines = [] if name == "base" else (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Measured(
        name=name,
        tickets=[
            Answered(record["prompt"], answer, tickets.right_fields(answer, record["completion"]))
            for record, answer in zip(held_out, answers_to_mails, strict=True)
        ],
        general=[
            Answered(request.prompt, answer, int(request.is_right(answer)))
            for request, answer in zip(general.REQUESTS, answers_to_questions, strict=True)
        ],
        metrics=[json.loads(line) for line in lines],
    )


def _said(model: ask.Model, name: str, requests: Sequence[str], max_new_tokens: int) -> Iterator[str]:
    chats = [[ask.user(request)] for request in requests]
    answers = model.answers(chats, max_new_tokens=max_new_tokens)
    return progress(answers, f"ask {name}", unit="answer", total=len(chats))
