"""Draws what runs have learned against how far they have gone, and says it in tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from megatron_psft.atomic import replace_file
from megatron_psft.report import palette

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Result = dict[str, Any]
TARGET, DRIFT = "valid_nll/target", "drift/general"
COLOURS = (
    *(palette.SFT, palette.ORANGE, palette.PURPLE),  # SFT, SFT-KL, DFT
    *(palette.PSFT, palette.SKY, palette.GREEN, palette.BLACK, palette.GREY),
)
COLUMNS = (
    "method", "lr", "seed", "best target NLL", "at step", "its drift",
    "last target NLL", "last drift", "entropy", "clipped",
)  # fmt: skip


def write(results: Sequence[Result], out: Path) -> Path:
    """Writes `report.md` and a picture per set; returns the report."""
    parts = ["Of every run its best evaluation by target NLL, and its last one. Nats per token."]
    for data in dict.fromkeys(result["data"] for result in results):
        own = [result for result in results if result["data"] == data]
        draw(own, out / f"frontier_{data}.png")
        rows = sorted(map(_row, own), key=lambda row: row[1])
        header = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
        parts += [f"## {data}", "\n".join([*header, *(text for text, _ in rows)])]
        parts.append(f"![Target NLL against drift, {data}](frontier_{data}.png)")
    path = out / "report.md"
    replace_file(path, "\n\n".join(parts) + "\n")
    return path


def _row(result: Result) -> tuple[str, float]:
    """A line of the table, and what tables are sorted by."""
    trained = [point for point in result["points"] if point["step"] > 0]
    best, last = min(trained, key=lambda point: point[TARGET]), trained[-1]
    clipped = format(last["clip_fraction"], ".3f") if "clip_fraction" in last else ""
    cells = [result["method"], result["lr"], str(result["seed"]), f"{best[TARGET]:.3f}", str(best["step"])]
    cells += [f"{best[DRIFT]:.3f}", f"{last[TARGET]:.3f}", f"{last[DRIFT]:.3f} ± {last['drift_stderr/general']:.3f}"]
    return "| " + " | ".join([*cells, f"{last['valid_entropy/target']:.3f}", clipped]) + " |", best[TARGET]


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
