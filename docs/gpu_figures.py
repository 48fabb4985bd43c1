"""Tables of docs/gpu.md, from what the acceptance of a GPU has printed: `gpu.jsonl` in `benchmarks/results`, and
`gpu-te.jsonl` with Transformer Engine."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from docs.figures import Figure, number, origin, stored, table

NAMES = ("environment", "training", "head_kernels", "head_choices", "head", "throughput", "checkpoint", "exits")
"""The benchmarks of a GPU, as the page has them."""
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
LAYERS = {"gpu.jsonl": "With the portable layers", "gpu-te.jsonl": "With Transformer Engine's layers"}
"""What each file is of."""
OF_A_FIGURE = ("benchmark", "name", "value", "unit", "does_not_run")
"""Keys that all figures have; others are details."""
LONGEST_CELL = 160


def gpu_figures_of(benchmark: str, folder: Path = RESULTS) -> str:
    """All that is stored of a benchmark, with and without Transformer Engine, and where it comes from."""
    parts = []
    for name, layers in LAYERS.items():
        if figures := stored(benchmark, folder / name):
            shown = TABLES.get(benchmark, any_figures)(figures[1:])
            parts.append(f"{layers}:\n\n{shown}\n\n{origin(figures[0])} It took {number(figures[0]['value'])} s.")
    return "\n\n".join(parts) or (
        f"No figures are stored: `python benchmarks/store.py --size gpu {benchmark}` measures them."
    )


def any_figures(figures: list[Figure]) -> str:
    """A table for each set of details that figures have: those that vary as columns, those that do not below it."""
    groups: dict[tuple[str, ...], list[Figure]] = {}
    for one in figures:
        groups.setdefault(tuple(_details(one)), []).append(one)
    return "\n\n".join(_group(list(details), group) for details, group in groups.items())


def _group(details: list[str], group: list[Figure]) -> str:
    columns = [name for name in details if any(one[name] != group[0][name] for one in group)]
    rows = [[_words(one["name"]), _quantity(one), *(_cell(one[name]) for name in columns)] for one in group]
    fixed = {name: _cell(group[0][name]) for name in details if name not in columns}
    shown = table(["figure", "value", *map(_words, columns)], *rows)
    below = ", ".join(f"{_words(name)} {value}" for name, value in fixed.items())
    return f"{shown}\n\nAll of these: {below}." if below else shown


def _details(figure: Figure) -> Iterable[str]:
    return (name for name in figure if name not in OF_A_FIGURE)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _quantity(figure: Figure) -> str:
    if figure["value"] is None:
        return f"does not run: {_cell(figure.get('does_not_run', ''))}"
    value = figure["value"]
    return f"{f'{value:,.0f}' if value == round(value) else number(value)} {figure['unit']}".rstrip()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    if isinstance(value, dict):
        return ", ".join(f"{_words(name)} {_cell(one)}" for name, one in value.items())
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]} ..."


def _environment(figures: list[Figure]) -> str:
    """What there is in one table, a line per detail, and what was timed in another."""
    described = [one for one in figures if one["name"] in ("settings", "devices", "toy_step_seconds", "problems")]
    rows = [[_words(name), _cell(one[name])] for one in described for name in _details(one)]
    rows += [[f"`{name}`", _cell(one[name])] for one in figures if one["name"] == "versions" for name in _details(one)]
    timed = [one for one in figures if one["name"] not in ("versions", "settings", "devices")]
    quantities = [[_words(one["name"]), _quantity(one), _cell(one.get("first", ""))] for one in timed]
    shown = table(["what is there and in use", ""], *rows) if rows else ""
    return f"{table(['figure', 'value', 'the first time'], *quantities)}\n\n{shown}"


def _training(figures: list[Figure]) -> str:
    """A line per test, with the numbers that it has recorded."""
    known = (*OF_A_FIGURE, "outcome", "reason", "setup_seconds")
    rows = []
    for one in figures:
        recorded = {name: value for name, value in one.items() if name not in known}
        outcome = ": ".join(filter(None, [one.get("outcome", ""), _cell(one.get("reason", ""))]))
        rows.append([f"`{one['name']}`", _quantity(one), outcome, _cell(recorded)])
    return table(["test", "took", "outcome", "recorded"], *rows)


TABLES: dict[str, Callable[[list[Figure]], str]] = {"environment": _environment, "training": _training}
"""Of benchmarks whose figures are better read in another form than `any_figures`."""
