"""What the demo's models have learned and lost, for the terminal: a table, what follows from it, and some answers."""

from collections.abc import Sequence
from math import comb, hypot

import general
import tickets
from measure import Answered, Measured

NAMES = {"base": "base", "sft": "SFT", "psft": "PSFT"}
DRIFT, NLL = "drift/general", "valid_nll/target"
CHANCE = 0.01
"""Models are told apart where equal ones would differ as much with at most this probability. That is of the choice of
questions alone and not of another seed of training, which is why it is so low."""


def text(found: Sequence[Measured]) -> str:
    """The table, what follows from it, and some answers of all models."""
    rows = table(found)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    answers = [f"\n{_shortened(request)}\n{said}" for request, said in map(_for_terminal, chosen(found))]
    return "\n".join([*lines, "", *verdicts(found), *answers, ""])


def table(found: Sequence[Measured]) -> list[list[str]]:
    """Rows of cells, the first the header."""
    per_model = len(found[0].tickets)
    return [
        ["", *(NAMES[model.name] for model in found)],
        [f"tickets all right, of {per_model}", *(str(model.whole_tickets) for model in found)],
        [f"fields right, of {per_model * len(tickets.FIELDS)}", *(str(model.right_fields) for model in found)],
        [f"general requests right, of {len(general.REQUESTS)}", *(str(model.right_answers) for model in found)],
        ["drift, nats per token", *map(_drift, found)],
        ["NLL of held-out tickets, nats per token", *(_nll(model, found) for model in found)],
        ["tokens clipped, %", *(_mean(model, "clip_fraction", 100, ".1f") for model in found)],
        ["tokens per second", *(_mean(model, "tokens_per_second", 1, ".0f") for model in found)],
    ]


def verdicts(found: Sequence[Measured]) -> list[str]:
    """What the table says of PSFT against SFT, in sentences; where it says nothing, that."""
    _, sft, psft = found
    return [
        _compared("tickets", sft.tickets, psft.tickets),
        _compared("general requests", sft.general, psft.general),
        _drifts_compared(sft, psft),
        "One run each: another seed may turn a difference round. SFT with a smaller learning rate drifts less, too.",
    ]


def _drifts_compared(sft: Measured, psft: Measured) -> str:
    (of_sft, sft_error), (of_psft, psft_error) = map(_drift_with_error, (sft, psft))
    values = f"drift: PSFT {of_psft:.3f}, SFT {of_sft:.3f}"
    if abs(of_psft - of_sft) <= 2 * hypot(sft_error, psft_error):
        return f"{values}: no difference beyond twice its standard error."
    return f"{values}: {'PSFT' if of_psft < of_sft else 'SFT'} has stayed nearer to the base."


def _drift_with_error(model: Measured) -> tuple[float, float]:
    return model.evaluated(DRIFT)[-1][1], model.evaluated("drift_stderr/general")[-1][1]


def _compared(what: str, sft: Sequence[Answered], psft: Sequence[Answered]) -> str:
    better, worse = better_and_worse(sft, psft)
    if not better + worse:
        return f"{what}: PSFT and SFT are equal on every one."
    by_chance = probability_by_chance(better, worse)
    winner = "PSFT" if better > worse else "SFT"
    verdict = "no clear difference" if by_chance > CHANCE else f"{winner} is better here"
    return (
        f"{what}: PSFT better on {better}, worse on {worse} (probability {by_chance:.1g} if they are equal): {verdict}."
    )


def better_and_worse(sft: Sequence[Answered], psft: Sequence[Answered]) -> tuple[int, int]:
    """On how many requests the second has more points than the first, and on how many fewer."""
    pairs = [(one.points, other.points) for one, other in zip(sft, psft, strict=True)]
    return sum(one < other for one, other in pairs), sum(one > other for one, other in pairs)


def probability_by_chance(better: int, worse: int) -> float:
    """That equal models differ this unevenly or more (sign test, two-sided)."""
    count = better + worse
    tail = sum(comb(count, wins) for wins in range(min(better, worse) + 1)) / 2**count
    return min(1.0, 2 * tail)


def chosen(found: Sequence[Measured]) -> list[tuple[Answered, ...]]:
    """A mail and two general requests with every model's answer, those first on which the models differ most."""
    mails = list(zip(*(model.tickets for model in found), strict=True))
    requests = list(zip(*(model.general for model in found), strict=True))

    def spread(answers: tuple[Answered, ...]) -> int:
        points = [answered.points for answered in answers[1:]]
        return max(points) - min(points)

    return [*sorted(mails, key=spread, reverse=True)[:1], *sorted(requests, key=spread, reverse=True)[:2]]


def _drift(model: Measured) -> str:
    if not model.metrics:
        return "0"
    return "{:.3f} ± {:.3f}".format(*_drift_with_error(model))


def _nll(model: Measured, found: Sequence[Measured]) -> str:
    """The base's is what a run says of it before its first step."""
    return f"{model.evaluated(NLL)[-1][1] if model.metrics else found[-1].evaluated(NLL)[0][1]:.3f}"


def _mean(model: Measured, metric: str, factor: float, spec: str) -> str:
    value = model.mean(metric)
    return "" if value is None else format(factor * value, spec)


def _for_terminal(answers: tuple[Answered, ...]) -> tuple[str, str]:
    said = zip(NAMES.values(), answers, strict=True)
    return answers[0].request.removeprefix(tickets.REQUEST), "\n".join(
        f"  {name:<5} {_shortened(answered.answer)}" for name, answered in said
    )


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 110 else f"{line[:107]}..."
