"""Reads what runs have left in their folders: metrics.jsonl, config.yaml, starts.jsonl and clipped_tokens.json."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from megatron_psft.errors import UserError
from megatron_psft.metrics.lines import with_present_names
from megatron_psft.metrics.provenance import STARTS_FILE
from megatron_psft.metrics.set_names import split_name

# The trainer's modules that write these files load torch, which takes seconds.
METRICS_FILE, CONFIG_FILE, CLIPPED_TOKENS_FILE = "metrics.jsonl", "config.yaml", "clipped_tokens.json"

_VERSION = re.compile(r"^# (\S+) (.+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as far as it has come, `n` steps of it."""

    folder: Path
    label: str
    """Tells it from the other runs."""
    steps: NDArray[np.int64]
    """`[n]`, ascending, from 1, or from 0 where something was evaluated before the first step."""
    metrics: Mapping[str, NDArray[np.float64]]
    """By name, `[n]`; nan where a step does not have it."""
    not_finite: Mapping[str, int]
    """How many values of a metric are nan or infinite in the file."""
    config: Mapping[str, object]
    """By field as of the last start, with the versions of libraries; empty where the run has no config.yaml."""
    clipped_tokens: Mapping[str, Any] | None
    """clipped_tokens.json; None where the run has none."""
    modified: float
    """When the last step was written, seconds since 1970."""
    changes: Mapping[str, Sequence[tuple[int, object]]] = field(default_factory=dict)
    """Of the settings that were not the same all the time: first step (from 1) and value, in order."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of which there is a line."""
        return int(np.count_nonzero(self.steps))

    def sets_of(self, metric: str) -> list[str]:
        """The named sets that the run has the metric of."""
        found = map(split_name, self.metrics)
        return [name for of_metric, name in found if of_metric == metric and name]

    @property
    def has_old_policy(self) -> bool:
        """Whether any step was trained against a policy other than the current one."""
        if self._window_steps is not None:
            return any(place > 0 for place in self._window_steps)
        return any(ratio != 1 for ratio in self._largest_ratios)

    @cached_property
    def syncs(self) -> list[int]:
        """Steps at which the old policy became the current one; none where windows are of one step each."""
        if self._window_steps is not None:
            starts = [step for step, place in zip(self.steps.tolist(), self._window_steps, strict=True) if place == 0]
            return starts if self.has_old_policy else []
        # Release 0.2 and earlier do not say. All ratios of such a step are 1, and those of the step after are not; the
        # step after a first one with a learning rate of 0 is taken for it.
        return [
            step
            for step, (ratio, next_ratio) in zip(self.steps.tolist(), pairwise(self._largest_ratios), strict=False)
            if ratio == 1 != next_ratio
        ]

    @property
    def _window_steps(self) -> list[float] | None:
        """Place of each step in its window, nan where there is none; None where the run does not say."""
        return self.metrics["window_step"].tolist() if "window_step" in self.metrics else None

    @property
    def _largest_ratios(self) -> list[float]:
        return self.metrics["ratio_max"].tolist() if "ratio_max" in self.metrics else []

    @property
    def interval(self) -> int:
        """Steps between the last two syncs; 1 where there are no two."""
        return self.syncs[-1] - self.syncs[-2] if len(self.syncs) > 1 else 1


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Reads all runs. Raises UserError, which names file and line, for what is missing, damaged or given twice."""
    paths = [Path(folder) for folder in folders]
    for folder, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            raise UserError(f"runs must differ, but {folder} is given {count} times; keep one")
    return [_read_run(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def _labels(folders: Sequence[Path]) -> list[str]:
    """The parts of the paths that differ, the run folder's name where there is one run."""
    parts = [list(folder.resolve().parts) for folder in folders]
    if len(parts) == 1:
        return [folder.resolve().name for folder in folders]
    for end in (0, -1):
        while min(map(len, parts)) > 1 and len({part[end] for part in parts}) == 1:
            for part in parts:
                part.pop(end)
    return ["/".join(part) for part in parts]


def _read_run(folder: Path, label: str) -> Run:
    path = folder / METRICS_FILE
    if not path.is_file():
        inner = sorted(str(found.parent) for found in folder.glob(f"*/{METRICS_FILE}"))
        hint = f"name its runs: {' '.join(inner)}" if inner else "name the folder that the run's --save names"
        raise UserError(f"runs ({folder}) must be folders that hold a {METRICS_FILE}; {hint}")
    rows = _read_rows(path)
    not_finite = Counter(name for row in rows for name, value in row.items() if not math.isfinite(value))
    names = dict.fromkeys(name for row in rows for name in row)
    changes = _read_changes(folder / STARTS_FILE)
    return Run(
        folder=folder,
        label=label,
        steps=np.array([row["step"] for row in rows], dtype=np.int64),
        metrics={name: np.array([row.get(name, math.nan) for row in rows], dtype=np.float64) for name in names},
        not_finite=not_finite,
        config={**_read_config(folder / CONFIG_FILE), **{name: course[-1][1] for name, course in changes.items()}},
        changes=changes,
        clipped_tokens=_read_clipped_tokens(folder / CLIPPED_TOKENS_FILE),
        modified=path.stat().st_mtime,
    )


def _read_rows(path: Path) -> list[dict[str, float]]:
    # What follows the last newline is a line that a live run is writing, or that a killed one did not finish.
    lines = path.read_bytes().split(b"\n")[:-1]
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{path}:{number} is not JSON; restore the file, or delete the line") from None
        if not isinstance(row, dict) or type(row.get("step")) is not int or not all(map(_is_number, row.values())):
            raise UserError(f"{path}:{number} must be an object of numbers with a whole number as step")
        if rows and row["step"] <= rows[-1]["step"]:
            raise UserError(f"{path}:{number}: step ({row['step']}) must be above the one before it")
        rows.append(with_present_names(row))
    if not rows:
        raise UserError(f"{path} has no step yet; wait for the run's first one")
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_config(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} must map names to values")
    versions = {f"version of {name}": number for name, number in _VERSION.findall(text)}
    return {**config, **versions}


def _read_changes(path: Path) -> dict[str, list[tuple[int, object]]]:
    """`Run.changes`; a start takes the place of what earlier ones made of its steps, as its lines of metrics do."""
    if not path.is_file():
        return {}
    starts: list[tuple[int, dict[str, object]]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            start = json.loads(line)
            step, settings = int(start["step"]), dict(start["settings"])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}:{number} is not a start of the run; restore the file, or delete the line"
            ) from None
        starts = [earlier for earlier in starts if earlier[0] < step] + [(step, settings)]
    courses: dict[str, list[tuple[int, object]]] = {}
    for step, settings in starts:
        for name, value in settings.items():
            course = courses.setdefault(name, [])
            if not course or course[-1][1] != value:
                course.append((step + 1, value))
    return {name: course for name, course in courses.items() if len(course) > 1}


def _read_clipped_tokens(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        rows = [(str(row["text"]), int(row["id"]), int(row["count"]), float(row["share"])) for row in content["tokens"]]
        return {
            **{name: int(content[name]) for name in ("first_step", "last_step", "clipped")},
            "tokens": [dict(zip(("text", "id", "count", "share"), row, strict=True)) for row in rows],
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); the run's next checkpoint writes it anew") from None
