"""A path of records together with the setting that has named it: what every error about the path begins with."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_psft.config.inputs import DataConfig
from megatron_psft.errors import UserError


@dataclass(frozen=True)
class GivenPath:
    """A path, or an ID of the hub. `str()` is how an error about it begins, as `valid_data (held_out.jsonl)`."""

    field: str
    """The setting, as the configuration calls it."""
    path: str
    """As the user has written it; of one of the files that this stands for, that file's."""

    def __str__(self) -> str:
        return f"{self.field} ({self.path})"

    def at(self, file: Path) -> "GivenPath":
        """A file that the same setting has led to."""
        return GivenPath(self.field, str(file))


@dataclass(frozen=True, kw_only=True)
class WeightedPath:
    """A value of `--data`, `PATH` or `PATH=WEIGHT`. `weight` is in passes over the source per epoch."""

    given: GivenPath
    weight: float


def parse_weighted_path(text: str, *, field: str) -> WeightedPath:
    """`PATH=WEIGHT`, or `PATH` with weight 1, of the setting `field`. A file or folder whose whole name is `text` is
    meant by it.

    Raises UserError where the weight is not positive and finite.
    """
    given = GivenPath(field, text)
    path, equals, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        return WeightedPath(given=given, weight=1.0)
    if not equals or os.path.exists(os.path.expanduser(text)):
        return WeightedPath(given=given, weight=1.0)
    if not (weight > 0 and math.isfinite(weight)):
        raise UserError(f"{given} must have a weight above 0, in passes per epoch; change or leave out ={number}")
    return WeightedPath(given=GivenPath(field, path), weight=weight)


def given_paths(config: DataConfig) -> Iterator[GivenPath]:
    """All that a run reads records from, without weights and names of sets. Raises UserError as `parse_weighted_path`
    does."""
    sets = {"data": {"": config.data}, "valid_data": config.valid_sets, "drift_data": config.drift_sets}
    for field, by_name in sets.items():
        for text in (text for texts in by_name.values() for text in texts):
            yield parse_weighted_path(text, field=field).given
