"""Which split a file's name or a split's own name stands for, and which of those that there are is meant."""

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from megatron_psft.data.given import GivenPath
from megatron_psft.errors import UserError, nearest_name_hint

_KINDS = {
    "train": re.compile(r"(train|training)(set|data|split)?\d*"),
    "validation": re.compile(r"(valid|validation|val|dev|eval|evaluation|heldout|holdout)(set|data|split)?\d*"),
    "test": re.compile(r"(test|testing)(set|data|split)?\d*"),
}
"""The words that the hub finds in names, and a few more."""

_HUB_SHARD = re.compile(r"(.+?)-(\d{5})-of-(\d{5})(-[0-9a-f]{8,})?")  # older ones end with a hash
_NUMBER = re.compile(r"[-_.]?\d+([-_.]of[-_.]\d+)?$")

SplitUse = Literal["training", "other"]
"""What is read for. For training a training split is meant, unless another is named; else one of several is named."""


def label_of(name: str) -> str:
    """The split that a file or folder of that name belongs to, as the name spells it; empty where it tells none.

    The name comes without ending: `train-00000-of-00001` and `train_2` are of `train`, `test_sft` is `test_sft`. In a
    numbered file of the hub's form, `math-00000-of-00001`, any word is a split's.
    """
    if numbered := _HUB_SHARD.fullmatch(name):
        return numbered[1]
    while (shorter := _NUMBER.sub("", name)) != name:
        name = shorter
    return name if kind_of(name) else ""


def missing_shards(names: Iterable[str]) -> list[str]:
    """The shards that files in the hub's form say there are, and that are not among them; names without endings."""
    there: dict[tuple[str, str], set[int]] = {}
    for numbered in filter(None, map(_HUB_SHARD.fullmatch, names)):
        there.setdefault((numbered[1], numbered[3]), set()).add(int(numbered[2]))
    return [
        f"{label}-{number:05}-of-{total}"
        for (label, total), numbers in there.items()
        for number in range(int(total))
        if number not in numbers
    ]


def kind_of(label: str) -> str | None:
    """train, validation or test; None for any other split. Of several such words in a name the last one counts."""
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "-", label).lower())
    kinds = [kind for word in reversed(words) for kind, form in _KINDS.items() if form.fullmatch(word)]
    return kinds[0] if kinds else None


def choose(given: GivenPath, labels: Sequence[str], wanted: str | None, use: SplitUse) -> set[str]:
    """The labels that are read of those that there are; the empty one stands for files that tell no split.

    Args:
        given: the path or ID.
        labels: distinct ones.
        wanted: the split that the user has named.
        use: what for.

    Raises:
        UserError: none is of the wanted split, or it is not clear which is meant.
    """
    named = [label for label in labels if label]
    if wanted is not None:
        return {_find(given, named, wanted)}
    known = [label for label in named if kind_of(label)]
    if use == "other":
        if len(named) > 1 or (known and "" in labels):
            unnamed = " and files whose names tell none" if "" in labels else ""
            raise UserError(f"{given} has the splits {', '.join(named)}{unnamed}; {_say_which(given.path, named)}")
        return set(labels)
    training = [label for label in known if kind_of(label) == "train"]
    if len(training) > 1:
        there = ", ".join(training)
        raise UserError(f"{given} has several training splits, {there}; {_say_which(given.path, training)}")
    if training:
        # As the hub does: where names tell splits, what tells none is something else, such as a list of the files.
        return {*training} if len(known) > 1 else {*training, *({""} & {*labels})}
    others = [label for label in labels if label not in known]
    if not others:
        raise UserError(f"{given} has no training split, only {', '.join(known)}; {_say_which(given.path, known)}")
    if len(others) > 1:
        raise UserError(f"{given} has several splits, {', '.join(others)}; {_say_which(given.path, others)}")
    return {*others}


def _find(given: GivenPath, labels: Sequence[str], wanted: str) -> str:
    found = [label for label in labels if label.lower() == wanted.lower()]
    if not found and kind_of(wanted):  # such as validation, where it is called val
        found = [label for label in labels if kind_of(label) == kind_of(wanted)]
    if not found:
        there = f"has the splits {', '.join(labels)}" if labels else "has no splits in the names of its files"
        raise UserError(f"{given} names the split {wanted}, but it {there}{nearest_name_hint(wanted, labels)}")
    if len(found) > 1:
        raise UserError(f"{given} may mean {', '.join(found)}; {_say_which(given.path.rpartition('@')[0], found)}")
    return found[0]


def _say_which(where: str, labels: Sequence[str]) -> str:
    return f"say which by its name, as {' or '.join(f'{where}@{label}' for label in labels)}"
