"""The values of a line of metrics.jsonl: in which order, and by which names now and before. Imports no torch."""

from collections.abc import Iterable, Mapping

from megatron_psft.metrics.set_names import split_name
from megatron_psft.metrics.table import METRICS

_PRESENT_NAMES = {metric.former_name: metric.name for metric in METRICS.values() if metric.former_name is not None}


def with_former_names(values: Mapping[str, float]) -> dict[str, float]:
    """The values by name, each that was renamed under its former name too; one of a named set has none. Raises
    KeyError for one without an entry."""
    line = {}
    for name, value in values.items():
        line[name] = value
        former_name = METRICS[split_name(name)[0]].former_name
        if former_name is not None:
            line[former_name] = value
    return line


def in_order(names: Iterable[str]) -> list[str]:
    """The names in the table's order, those of one metric as they come. Raises KeyError for one without an entry."""
    places = {name: place for place, name in enumerate(METRICS)}
    return sorted(names, key=lambda name: places[split_name(name)[0]])


def with_present_names(line: Mapping[str, float]) -> dict[str, float]:
    """A line of metrics.jsonl, of whatever release, with each value under its present name alone."""
    return {_PRESENT_NAMES.get(name, name): value for name, value in line.items()}
