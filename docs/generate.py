"""Writes the parts of these pages that follow from the code: `python -m docs.generate`, from the repository.

A part stands in its page between `<!-- generated: NAME -->` and `<!-- end -->`. A test fails where one is not current.
"""

import ast
import re
from collections.abc import Callable
from pathlib import Path

from docs.draw_rooms import draw
from docs.evidence_tables import evidence_tables, rl_tables
from docs.figures import TABLES, figures_of
from docs.gpu_figures import NAMES, gpu_figures_of
from docs.model_table import bridge_table, model_table
from docs.scaling_tables import scaling_tables, speed_table
from megatron_psft.config.foreign_names import TRAINERS, table_of
from megatron_psft.config.resume import FREE, SAME, TOLD
from megatron_psft.config.rules import OLD_POLICY_FIELDS
from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.data.formats import PAIR_FORMATS, RECORD_FORMATS, format_table
from megatron_psft.data.keys import key_table
from megatron_psft.metrics.metric import Metric, Over
from megatron_psft.metrics.table import METRICS
from megatron_psft.objectives.declare import Requirement
from megatron_psft.objectives.registry import OBJECTIVES
from tests.diagnostics.dry_run_bytes import dry_run_table
from tests.support.rooms import PACKAGE, SHARED, allowed_imports, imports_of

DOCS = Path(__file__).parent
PARTS: dict[str, Callable[[], str]] = {
    "record formats": lambda: format_table(RECORD_FORMATS),
    "pair formats": lambda: format_table(PAIR_FORMATS),
    "keys": key_table,
    "metrics": lambda: metric_table(),
    "resume": lambda: resume_table(),
    "files": lambda: file_tables(),
    "objectives": lambda: objective_table(),
    "models": model_table,
    "models of bridge": bridge_table,
    "speeds": speed_table,
    "scaling": scaling_tables,
    "dry run": dry_run_table,
    "evidence": evidence_tables,
    "rl": rl_tables,
    **{f"figures of {name}": (lambda name=name: figures_of(name)) for name in TABLES},
    **{f"gpu {name}": (lambda name=name: gpu_figures_of(name)) for name in NAMES},
    **{f"names of {trainer}": (lambda trainer=trainer: table_of(trainer)) for trainer in TRAINERS},
}
_PART = re.compile(r"(<!-- generated: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def generated() -> dict[Path, str]:
    """Every file that has generated parts, with its current text."""
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
    texts = {path: _PART.sub(_filled, text) for path, text in pages.items()}
    return {**texts, DOCS / "pictures" / "rooms.svg": draw(imports_of(PACKAGE), list(allowed_imports()))}


def _filled(part: re.Match[str]) -> str:
    return f"{part[1]}\n{PARTS[part[2]]()}\n\n{part[3]}"  # Markdown wants tables between blank lines


_OVER: dict[Over | None, str] = {
    "label_tokens": "label tokens",
    "denominator": "what `--loss-aggregation` says",
    "pairs": "pairs",
    None: "",
}

_RUNS: dict[Requirement | None, str] = {"old": "with an old policy: `psft`, `dppo-tv`", "pairs": "`dpo`", None: "all"}


def metric_table() -> str:
    """The keys of metrics.jsonl."""
    rows = [
        f"| {_name(metric)} | {metric.unit} | {metric.help} | {_OVER[metric.over]} | {_RUNS[metric.needs]} |"
        for metric in METRICS.values()
    ]
    return "\n".join(["| name | unit | what it is | mean over | runs |", "| --- | --- | --- | --- | --- |", *rows])


def _name(metric: Metric) -> str:
    return f"`{metric.name}`" + (f" (was `{metric.former_name}`)" if metric.former_name else "")


def resume_table() -> str:
    """Every setting by what happens where it is another on resume."""
    rows = [
        *(("refused", f"it decides {what}", names) for what, names in SAME.items()),
        *(("one line", meaning, names) for meaning, names in TOLD.items()),
        ("nothing said", "no number of training depends on it", FREE),
    ]
    lines = [f"| {outcome} | {why} | {' '.join(f'`{name}`' for name in names)} |" for outcome, why, names in rows]
    return "\n".join(["| changed on resume | why | settings |", "| --- | --- | --- |", *lines])


def objective_table() -> str:
    """A row per built-in objective."""
    rows = [
        ["name", "token loss", "settings", "source"],
        ["---"] * 4,
        *([f"`{name}`", it.formula, _settings_of(name), it.source] for name, it in OBJECTIVES.items()),
    ]
    return "\n".join(" ".join(["|", *(f"{cell} |".lstrip() for cell in row)]) for row in rows)


def _settings_of(objective: str) -> str:
    """The flags that have an effect with it, each with its choices or its default."""
    names = OLD_POLICY_FIELDS if ObjectiveConfig(objective=objective).needs_old_policy else ()
    if OBJECTIVES[objective].is_clipped is not None:
        names = tuple(name for name in names if not name.startswith("clip_ratio"))
    values = {name: getattr(ObjectiveConfig, name) for name in names}
    values |= {one.name: " or ".join(one.choices) or one.default for one in OBJECTIVES[objective].settings}
    return ", ".join(
        f"`--{name.replace('_', '-')}`" + ("" if value is None else f" {value}") for name, value in values.items()
    )


def file_tables() -> str:
    """A table per room, of its files and the first sentence of each."""
    shared = [PACKAGE / f"{name}.py" for name in SHARED]
    rooms = {room: sorted((PACKAGE / room).rglob("*.py")) for room in allowed_imports()}
    parts = [_file_table("megatron_psft/", shared)]
    return "\n\n".join([*(_file_table(f"megatron_psft/{room}/", files) for room, files in rooms.items()), *parts])


def _file_table(folder: str, files: list[Path]) -> str:
    rows = [
        f"| `{path.relative_to(PACKAGE.parent / folder)}` | {_first_sentence(path)} |"
        for path in files
        if path.name != "__init__.py"
    ]
    return "\n".join([f"| `{folder}` | |", "| --- | --- |", *rows])


def _first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.)\s", " ".join(docstring.split()), maxsplit=1)[0].rstrip(".")


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
