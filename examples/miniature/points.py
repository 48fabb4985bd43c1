"""What was measured, grouped: a point is a method at a learning rate and a length, over all seeds."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

Result = Mapping[str, Any]
Key = tuple[str, str, int]
"""Method, learning rate, step."""
Points = dict[Key, list[Result]]

MARGIN = 5.0
"""Percentage points of target accuracy within which a method counts as having learned what SFT learns."""


def points(results: Sequence[Result]) -> Points:
    """All but the base's."""
    grouped: Points = defaultdict(list)
    for result in results:
        if result["method"] != "base":
            grouped[result["method"], result["lr"], result["step"]].append(result)
    return dict(grouped)


def mean_of(runs: Sequence[Result], value: str) -> float:
    """Over the seeds."""
    return mean(run[value] for run in runs)


def level(found: Points) -> float:
    """Target accuracy, in per cent, that counts as having learned the target: SFT's best point less MARGIN."""
    return max(mean_of(runs, "target") for (method, *_), runs in found.items() if method == "sft") - MARGIN


def chosen(found: Points, method: str) -> tuple[Key, bool]:
    """The point of a method to compare, and whether it reaches the level.

    Among points that do, that with most general skills kept; where none does, that with the highest target accuracy.
    """
    own = {key: runs for key, runs in found.items() if key[0] == method}
    enough = [key for key, runs in own.items() if mean_of(runs, "target") >= level(found)]
    if enough:
        return max(enough, key=lambda key: mean_of(own[key], "general")), True
    return max(own, key=lambda key: mean_of(own[key], "target")), False


def best(spots: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (x, y), those that no other exceeds in both, by rising x."""
    kept: list[tuple[float, float]] = []
    for spot in sorted(spots, reverse=True):
        if not kept or spot[1] > kept[-1][1]:
            kept.append(spot)
    return kept[::-1]
