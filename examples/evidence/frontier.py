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
from matplotlib.ticker import LogFormatter

Result = dict[str, Any]
Scores = Mapping[str, float]
TARGET, DRIFT = "valid_nll/target", "drift/general"
NEAR, KEEPS = 0.95, 0.9
STYLES = {
    "SFT": (palette.SFT, "-"),
    "SFT-KL": (palette.ORANGE, "-"),
    "DFT": (palette.PURPLE, "-"),
    "PSFT, k = 4": (palette.PSFT, "-"),
    "PSFT, k = 8": (palette.SKY, "-"),
    "PSFT, fixed": (palette.GREEN, "-"),
    "warm-up, then PSFT, k = 4": (palette.BLACK, "-"),
    "warm-up, then PSFT, fixed": (palette.GREY, "-"),
    "SFT, LoRA": (palette.SFT, "--"),
    "PSFT, k = 4, LoRA": (palette.PSFT, "--"),
}
"""Colour and line of each method."""
METHOD_COLUMNS = (
    "method", "best target NLL", "its rate and step", "its drift",
    "least drift near the best", "most kept near the best", "no harm",
)  # fmt: skip
RUN_COLUMNS = (
    "method", "rate", "seed", "best target NLL", "at step", "its drift",
    "last target NLL", "last drift", "entropy", "clipped", "kept", "target",
)  # fmt: skip
LEGEND = f"""Nats per token. Near the best is what has gone {NEAR:.0%} of the way from the initial model's target NLL to
the best of all runs. Kept is the share of the general requests that are answered right, target that of the fields of
held-out tickets, both by the last model. A run does no harm if it keeps at least {KEEPS} of what the initial model has
right."""


def write(results: Sequence[Result], base: Mapping[str, Scores], out: Path) -> Path:
    """Writes `report.md` and a picture per set; returns the report.

    Args:
        results: of the runs, as `run.py` leaves them.
        base: by set, the scores of the initial model.
        out: the folder.
    """
    parts = [LEGEND]
    for data, own in by_set(results).items():
        draw(own, out / f"frontier_{data}.png")
        parts += [f"## {data}", tables(own, base[data])]
        parts.append(f"![Target NLL against drift and against what is kept, {data}](frontier_{data}.png)")
    path = out / "report.md"
    replace_file(path, "\n\n".join(parts) + "\n")
    return path


def by_set(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each set."""
    names = dict.fromkeys(result["data"] for result in results)
    return {name: [result for result in results if result["data"] == name] for name in names}


def tables(results: Sequence[Result], base: Scores) -> str:
    """What the methods, and what the runs on one set have come to.

    Args:
        results: on that set.
        base: the scores of the initial model.
    """
    parts = [f"The initial model: target NLL {results[0]['points'][0][TARGET]:.3f}, {_scores(base)}."]
    parts += [_table(METHOD_COLUMNS, _methods(results, base)), _table(RUN_COLUMNS, _runs(results))]
    return "\n\n".join(parts)


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
    start = results[0]["points"][0][TARGET]
    limit = start - NEAR * (start - min(_best(result)[TARGET] for result in results))
    rows = []
    for method in dict.fromkeys(result["method"] for result in results):
        own = [result for result in results if result["method"] == method]
        winner = min(own, key=lambda result: _best(result)[TARGET])
        best = _best(winner)
        near = [point[DRIFT] for result in own for point in _trained(result) if point[TARGET] <= limit]
        kept = [result["kept"] for result in own if _trained(result)[-1][TARGET] <= limit]
        harmless = [result for result in own if result["kept"] >= KEEPS * base["kept"]]
        cells = [method, f"{best[TARGET]:.3f}", f"{winner['lr']}, {best['step']}", f"{best[DRIFT]:.3f}"]
        cells += [f"{min(near):.3f}" if near else "none", f"{max(kept):.2f}" if kept else "none"]
        rows.append((best[TARGET], [*cells, f"{len(harmless)} of {counted(len(own), 'run')}"]))
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
    """A path per run, from the initial model to its last evaluation, and beside it a mark for what its last model has
    kept."""
    figure, (paths, marks) = plt.subplots(ncols=2, sharey=True, figsize=(12, 5.5), layout="constrained")
    for result in results:
        colour, line = STYLES[result["method"]]
        drift, target = ([point[name] for point in result["points"]] for name in (DRIFT, TARGET))
        paths.plot(drift, target, line, marker=".", linewidth=1, alpha=0.7, color=colour)
        marks.plot(result["kept"], target[-1], "o", color=colour, fillstyle="full" if line == "-" else "none")
        for axis, place in ((paths, drift[-1]), (marks, result["kept"])):
            axis.annotate(result["lr"], (place, target[-1]), fontsize=7, color=colour)
    made = {result["method"] for result in results}
    for method, (colour, line) in STYLES.items():
        if method in made:
            paths.plot([], [], line, marker=".", color=colour, label=method)
    paths.set(xlabel="drift from the initial model, nats per token", ylabel="NLL of held-out records, nats per token")
    paths.set(yscale="log")
    paths.yaxis.set_major_formatter("{x:g}")
    paths.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))  # no powers of ten between 1 and 2
    marks.set(xlabel="general requests that are answered right, share")
    paths.legend(frameon=False, fontsize=8)
    for axis in (paths, marks):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
