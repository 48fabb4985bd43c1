"""Draws what runs have learned against how far they have gone, and says it in tables."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from megatron_psft.atomic import replace_file
from megatron_psft.errors import counted
from megatron_psft.report import palette

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Result = dict[str, Any]
Scores = Mapping[str, float]
TARGET, DRIFT = "valid_nll/target", "drift/general"
NEAR, KEEPS = 1.05, 0.9
"""Near the best is a target NLL of at most 1.05 times it; a model does no harm that keeps 0.9 of the base's score."""
COLOURS = (
    *(palette.SFT, palette.ORANGE, palette.PURPLE),  # SFT, SFT-KL, DFT
    *(palette.PSFT, palette.SKY, palette.GREEN, palette.BLACK, palette.GREY),
)
METHOD_COLUMNS = ("method", "best target NLL", "its rate and step", "its drift", "least drift near the best", "no harm")
RUN_COLUMNS = (
    "method", "rate", "seed", "best target NLL", "at step", "its drift",
    "last target NLL", "last drift", "entropy", "clipped", "kept", "target",
)  # fmt: skip
LEGEND = f"""Nats per token. Near the best is a target NLL of at most {NEAR} times the best of all runs.
Kept is the share of the general requests that are answered right, target that of the fields of held-out tickets. A rate
does no harm if its last model keeps at least {KEEPS} of what the initial model has right."""


def write(results: Sequence[Result], base: Mapping[str, Scores], out: Path) -> Path:
    """Writes `report.md` and a picture per set; returns the report.

    Args:
        results: of the runs, as `run.py` leaves them.
        base: by set, the scores of the initial model.
        out: the folder.
    """
    parts = [LEGEND]
    for data in dict.fromkeys(result["data"] for result in results):
        own = [result for result in results if result["data"] == data]
        draw(own, out / f"frontier_{data}.png")
        parts += [f"## {data}", f"The initial model: {_scores(base[data])}."]
        parts += [_table(METHOD_COLUMNS, _methods(own, base[data])), _table(RUN_COLUMNS, _runs(own))]
        parts.append(f"![Target NLL against drift, {data}](frontier_{data}.png)")
    path = out / "report.md"
    replace_file(path, "\n\n".join(parts) + "\n")
    return path


def _scores(scores: Scores) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in _named(scores).items())


def _named(scores: Scores) -> dict[str, float]:
    return {name: scores[key] for name, key in (("kept", "kept"), ("target", "fields")) if key in scores}


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _trained(result: Result) -> list[dict[str, float]]:
    return [point for point in result["points"] if point["step"] > 0]


def _best(result: Result) -> dict[str, float]:
    return min(_trained(result), key=lambda point: point[TARGET])


def _methods(results: Sequence[Result], base: Scores) -> list[Sequence[str]]:
    """Each method at its best, over its rates, seeds and evaluations; the best method first."""
    limit = NEAR * min(_best(result)[TARGET] for result in results)
    rows = []
    for method in dict.fromkeys(result["method"] for result in results):
        own = [result for result in results if result["method"] == method]
        winner = min(own, key=lambda result: _best(result)[TARGET])
        best = _best(winner)
        near = [point[DRIFT] for result in own for point in _trained(result) if point[TARGET] <= limit]
        harmless = [result for result in own if result["kept"] >= KEEPS * base["kept"]]
        cells = [method, f"{best[TARGET]:.3f}", f"{winner['lr']}, {best['step']}", f"{best[DRIFT]:.3f}"]
        cells += [f"{min(near):.3f}" if near else "none", f"{len(harmless)} of {counted(len(own), 'run')}"]
        rows.append((best[TARGET], cells))
    return [cells for _, cells in sorted(rows)]


def _runs(results: Sequence[Result]) -> list[Sequence[str]]:
    """Each run's best evaluation and its last one; the best run first."""
    return [_run(result) for result in sorted(results, key=lambda result: _best(result)[TARGET])]


def _run(result: Result) -> Sequence[str]:
    best, last, named = _best(result), _trained(result)[-1], _named(result)
    cells = [result["method"], result["lr"], str(result["seed"]), f"{best[TARGET]:.3f}", str(best["step"])]
    cells += [f"{best[DRIFT]:.3f}", f"{last[TARGET]:.3f}", f"{last[DRIFT]:.3f} ± {last['drift_stderr/general']:.3f}"]
    cells += [f"{last['valid_entropy/target']:.3f}", f"{last['clip_fraction']:.3f}" if "clip_fraction" in last else ""]
    return [*cells, *(f"{named[name]:.2f}" if name in named else "" for name in ("kept", "target"))]


def draw(results: Sequence[Result], path: Path) -> None:
    """A path per run, from the initial model to its last evaluation; runs of a method share a colour."""
    methods = list(dict.fromkeys(result["method"] for result in results))
    colours = dict(zip(methods, COLOURS, strict=False))
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    for result in results:
        drift, target = ([point[name] for point in result["points"]] for name in (DRIFT, TARGET))
        axis.plot(drift, target, marker=".", linewidth=1, alpha=0.7, color=colours[result["method"]])
        axis.annotate(result["lr"], (drift[-1], target[-1]), fontsize=7, color=colours[result["method"]])
    for method, colour in colours.items():
        axis.plot([], [], marker=".", color=colour, label=method)
    axis.set(xlabel="drift from the initial model, nats per token", ylabel="NLL of held-out records, nats per token")
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
