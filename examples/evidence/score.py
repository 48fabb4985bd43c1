"""How many of the general requests a model answers right, and how many fields of the demo's tickets."""

import json
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


def drift(model: str | Path, own_answers: Path) -> float:
    """How far a model has gone from the one whose answers these are, as `psft train --drift-data` estimates it: the
    mean over their tokens of how much likelier each was to that model than it is to this one, in nats.

    Args:
        model: a Hugging Face folder or ID.
        own_answers: as `psft rollout --drift-set` writes them.
    """
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    differences: list[float] = []
    for text in own_answers.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        ids = torch.tensor([[*row["prompt_tokens"], *row["tokens"]]])
        with torch.no_grad():
            log_probs = network(ids).logits[0, len(row["prompt_tokens"]) - 1 : -1].log_softmax(dim=-1)
        now = log_probs.gather(1, torch.tensor(row["tokens"])[:, None])[:, 0]
        differences += (torch.tensor(row["log_probs"]) - now).tolist()
    return sum(differences) / len(differences)
