"""What the sources of `--data` are called in metrics, of which some are of each source by itself."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

_UNFIT = re.compile(r"[^A-Za-z0-9_.-]+")


def source_names(paths: Sequence[str]) -> list[str]:
    """A name for each path, without weight: its last part without suffix, with as many parts before it as tell it from
    the others; letters, digits, `.`, `_` and `-`. A path that is given again has a number behind.
    """
    parts = [_parts(path) for path in paths]
    lengths = [1] * len(parts)
    while True:
        names = ["-".join(each[-length:]) for each, length in zip(parts, lengths, strict=True)]
        taken = Counter(map(str.lower, names))
        longer = [
            place for place, name in enumerate(names) if taken[name.lower()] > 1 and lengths[place] < len(parts[place])
        ]
        if not longer:
            return _numbered(names)
        for place in longer:
            lengths[place] += 1


def _parts(path: str) -> list[str]:
    whole = PurePath(path)
    cleaned = [_UNFIT.sub("-", part).strip("-.") for part in (*whole.parts[:-1], whole.stem)]
    return [part for part in cleaned if part] or ["data"]


def _numbered(names: Sequence[str]) -> list[str]:
    """Each name once: a later one of several that are the same has the lowest number that is free."""
    given: list[str] = []
    for name in names:
        number, chosen = 2, name
        while chosen.lower() in map(str.lower, given):
            number, chosen = number + 1, f"{name}-{number}"
        given.append(chosen)
    return given
