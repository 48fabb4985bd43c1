"""How many of the general requests a model answers right, and how many fields of the demo's tickets."""

from collections.abc import Sequence
from pathlib import Path

import ask
import general
import tickets


def scores(model: str | Path, held_out: Sequence[tickets.Record]) -> dict[str, float]:
    """Shares of right answers, greedily decoded.

    Args:
        model: a Hugging Face folder or ID.
        held_out: tickets that were not trained on; none where another set is the target.

    Returns:
        `kept`, of the general requests; `fields`, of the fields of the tickets, where there are any.
    """
    asked = ask.Model(model)
    found = {"kept": _kept(asked)}
    return found | ({"fields": _fields(asked, held_out)} if held_out else {})


def _kept(model: ask.Model) -> float:
    chats = [[ask.user(request.prompt)] for request in general.REQUESTS]
    answers = model.answers(chats, max_new_tokens=general.MAX_TOKENS)
    right = [request.is_right(answer) for request, answer in zip(general.REQUESTS, answers, strict=True)]
    return sum(right) / len(right)


def _fields(model: ask.Model, held_out: Sequence[tickets.Record]) -> float:
    answers = model.answers([[ask.user(record["prompt"])] for record in held_out], max_new_tokens=tickets.MAX_TOKENS)
    right = [
        tickets.right_fields(answer, record["completion"]) for record, answer in zip(held_out, answers, strict=True)
    ]
    return sum(right) / (len(right) * len(tickets.FIELDS))
