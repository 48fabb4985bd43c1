"""The tables of a report: what became of each run, how it was configured, and which tokens it clipped most."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_psft.metrics.set_names import metric_of_set, split_name
from megatron_psft.report.runs import Run

ABSENT = "—"
MAX_TOKENS = 20
"""Of the most clipped ones of a run."""
END_STEPS = 8
"""Of a run's last steps, over which a value at its end is a mean."""


@dataclass(frozen=True)
class Row:
    """Of a table that has a column per run."""

    name: str
    cells: Sequence[str]
    differs: bool = False
    """Whether it is marked, as a setting that is not the same in all runs."""


def summary_table(runs: Sequence[Run]) -> list[Row]:
    """What became of each run; a row that no run has is left out."""
    rows = [Row(title, [cell(run) for run in runs]) for title, cell in _summary_cells(runs)]
    return [row for row in rows if set(row.cells) != {ABSENT}]


def config_table(runs: Sequence[Run]) -> list[Row]:
    """The settings, those first that differ."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    settings = {name: [_setting(run, name) for run in runs] for name in names}
    rows = [Row(name, cells, differs=len(set(cells)) > 1) for name, cells in settings.items()]
    return sorted(rows, key=lambda row: not row.differs)


def differing(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Those of the fields that are not the same in all runs."""
    return [name for name in names if len({_setting(run, name) for run in runs}) > 1]


def clipped_tokens(run: Run) -> dict[str, Any]:
    """clipped_tokens.json with the run's label and `rows`, the first MAX_TOKENS tokens as texts: `text`, `id`, `count`,
    `percent` and, of the longest bar, `width`."""
    assert run.clipped_tokens is not None
    tokens = run.clipped_tokens["tokens"][:MAX_TOKENS]
    most = max((token["share"] for token in tokens), default=1.0)
    rows = [
        {
            "text": repr(token["text"]),
            "id": token["id"],
            "count": f"{token['count']:,}",
            "percent": f"{100 * token['share']:.1f}",
            "width": f"{100 * token['share'] / most:.1f}",
        }
        for token in tokens
    ]
    return {**run.clipped_tokens, "label": run.label, "rows": rows}


def number(value: float) -> str:
    """Four digits of a value."""
    return f"{value:.4g}"


def date(seconds: float) -> str:
    """A time since 1970 in words."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _setting(run: Run, name: str) -> str:
    """A value as text, on one line; with where it came to be another, if it did."""
    if name in run.changes:
        (_, first), *later = run.changes[name]
        return "; ".join([_text(first), *(f"from step {step} on {_text(value)}" for step, value in later)])
    return _text(run.config[name]) if name in run.config else ABSENT


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _steps(run: Run) -> str:
    planned = run.config.get("train_iters")
    return f"{run.steps[-1]}" + (f" of {planned}" if planned else "")


def _total(run: Run, name: str) -> float:
    return float(np.nansum(run.metrics[name])) if name in run.metrics else math.nan


def _labels(run: Run) -> str:
    total = _total(run, "label_tokens")
    return f"{total:,.0f}" if math.isfinite(total) else ABSENT


def _duration(run: Run) -> str:
    seconds = _total(run, "step_seconds")
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else ABSENT


def _rate(name: str, factor: float = 1.0, spec: str = ",.0f") -> Callable[[Run], str]:
    """A total over the run's step time."""

    def cell(run: Run) -> str:
        rate = factor * _total(run, name) / _total(run, "step_seconds")
        return format(rate, spec) if math.isfinite(rate) else ABSENT

    return cell


def _course(name: str, factor: float = 1.0) -> Callable[[Run], str]:
    """The first value, and the mean of the last END_STEPS."""

    def cell(run: Run) -> str:
        values = factor * _finite(run, name)
        return f"{number(values[0])} → {number(float(values[-END_STEPS:].mean()))}" if len(values) else ABSENT

    return cell


def _lowest_and_last(name: str) -> Callable[[Run], str]:
    def cell(run: Run) -> str:
        values = _finite(run, name)
        if not len(values):
            return ABSENT
        steps = run.steps[np.isfinite(run.metrics[name])]
        return f"{number(values.min())} (step {steps[values.argmin()]}), {number(values[-1])}"

    return cell


def _last_drift(name: str) -> Callable[[Run], str]:
    """The last value, with its standard error."""

    def cell(run: Run) -> str:
        values = _finite(run, name)
        errors = _finite(run, metric_of_set("drift_stderr", split_name(name)[1]))
        return f"{number(values[-1])} ± {number(errors[-1])}" if len(values) and len(errors) else ABSENT

    return cell


def _mean_clipped(run: Run) -> str:
    values = _finite(run, "clip_fraction")
    return f"{100 * values.mean():.1f}" if len(values) else ABSENT


def _largest_gap(run: Run) -> str:
    values = _finite(run, "scoring_gap_max")
    return number(float(values.max())) if len(values) else ABSENT


def _finite(run: Run, name: str) -> NDArray[np.float64]:
    values = run.metrics.get(name, np.empty(0))
    return values[np.isfinite(values)]


_SUMMARY: Mapping[str, Callable[[Run], str]] = {
    "objective": lambda run: str(run.config.get("objective", ABSENT)),
    "steps": _steps,
    "label tokens": _labels,
    "loss": _course("loss"),
    "NLL, nats": _course("nll"),
    "validation NLL, nats: lowest, last": _lowest_and_last("valid_nll"),
    "entropy, nats": _course("entropy"),
    "validation entropy, nats": _course("valid_entropy"),
    "drift from the initial model, nats per token": _last_drift("drift"),
    "clip fraction, mean, %": _mean_clipped,
    "scoring check, nats: largest difference": _largest_gap,
    "pairs with a margin above 0, %": _course("accuracy", 100),
    "time of all steps, h:min:s": _duration,
    "tokens per second": _rate("tokens"),
    "old policy's share of the time, %": _rate("old_policy_seconds", 100, ".1f"),
    "last step written": lambda run: date(run.modified),
}

_OF_SETS: Mapping[str, tuple[str, Callable[[str], Callable[[Run], str]]]] = {
    "validation NLL, nats: lowest, last": ("valid_nll", _lowest_and_last),
    "validation entropy, nats": ("valid_entropy", _course),
    "drift from the initial model, nats per token": ("drift", _last_drift),
}
"""Rows of the summary of which each named set has one, too: the metric and its cell."""


def _summary_cells(runs: Sequence[Run]) -> Iterator[tuple[str, Callable[[Run], str]]]:
    """The rows of the summary by their titles."""
    for title, cell in _SUMMARY.items():
        yield title, cell
        if title in _OF_SETS:
            metric, cell_of = _OF_SETS[title]
            for name in dict.fromkeys(name for run in runs for name in run.sets_of(metric)):
                yield f"{name}: {title}", cell_of(metric_of_set(metric, name))
