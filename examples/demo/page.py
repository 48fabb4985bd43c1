"""The demo's page, one file with the table, what follows from it, a picture and all answers; and the picture."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

import general
import matplotlib
import tickets
from findings import DRIFT, NAMES, NLL, table, verdicts
from measure import Answered, Measured

from megatron_psft.atomic import replace_file
from megatron_psft.report import palette

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"base": palette.GREY, "sft": palette.SFT, "psft": palette.PSFT}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
.answers td { font-size: 14px; white-space: pre-wrap; overflow-wrap: anywhere; width: 25% }
td.right::before { content: "\\2713 "; color: #070 }
td.wrong::before { content: "\\2717 "; color: #b00 }
img { max-width: 100% }
"""


def write(found: Sequence[Measured], folder: Path) -> Path:
    """Writes the page and its picture; returns the page's path."""
    picture = draw(found, folder / "demo.png")
    encoded = base64.b64encode(picture.read_bytes()).decode()
    header, *rows = table(found)
    parts = [
        "<h1>A real model, by SFT and by PSFT: what each has learned and lost</h1>",
        f"<table><tr>{''.join(map(_header, header))}</tr>{''.join(map(_row, rows))}</table>",
        "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in verdicts(found)) + "</ul>",
        f'<img alt="Scores of all models, and drift over held-out NLL" src="data:image/png;base64,{encoded}">',
        '<p>Curves of both runs: <a href="curves/report.html">curves/report.html</a></p>',
        "<h2>Answers to mails that were not trained on</h2>", _answers([model.tickets for model in found]),
        "<h2>Answers to general requests</h2>", _answers([model.general for model in found]),
    ]  # fmt: skip
    path = folder / "report.html"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>The demo</title><style>{STYLE}</style>'
    replace_file(path, f"{head}<body>{''.join(parts)}</body></html>")
    return path


def draw(found: Sequence[Measured], path: Path) -> Path:
    """Draws the scores of all models, and how far each run has gone for what it has learned; returns the path."""
    figure, (scores, course) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for place, model in enumerate(found):
        shares = [
            100 * model.right_fields / (len(model.tickets) * len(tickets.FIELDS)),
            100 * model.right_answers / len(general.REQUESTS),
        ]
        places = [group + (place - 1) * 0.27 for group in range(2)]
        bars = scores.bar(places, shares, width=0.25, color=COLOURS[model.name], label=NAMES[model.name])
        scores.bar_label(bars, fmt="%.0f", padding=2)
        if model.metrics:
            drift, nll = ([value for _, value in model.evaluated(name)] for name in (DRIFT, NLL))
            course.plot(drift, nll, marker="o", markersize=4, color=COLOURS[model.name], label=NAMES[model.name])
    scores.set(title="What each can do", ylabel="right, %", ylim=(0, 119), yticks=range(0, 101, 20), xticks=[0, 1])
    scores.set_xticklabels(["fields of tickets\n(trained)", "general requests\n(to be kept)"])
    scores.legend(frameon=False, ncols=3, loc="upper center")
    course.set(
        title="Learned against forgotten, every 8 steps", xlabel="drift from the base, nats per token",
        ylabel="NLL of held-out tickets, nats per token", yscale="log",
    )  # fmt: skip
    course.legend(frameon=False)
    course.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _answers(per_model: Sequence[Sequence[Answered]]) -> str:
    header = "".join(map(_header, ["", *NAMES.values()]))
    rows = zip(*per_model, strict=True)
    return f'<table class="answers"><tr>{header}</tr>{"".join(map(_answered_row, rows))}</table>'


def _answered_row(answers: Sequence[Answered]) -> str:
    is_ticket = answers[0].request.startswith(tickets.REQUEST)
    full, request = (len(tickets.FIELDS), answers[0].request) if is_ticket else (1, answers[0].request)
    shown = request.removeprefix(tickets.REQUEST).strip()
    cells = [
        f'<td class="{"right" if answered.points == full else "wrong"}">{html.escape(answered.answer)}</td>'
        for answered in answers
    ]
    return f"<tr><td>{html.escape(shown)}</td>{''.join(cells)}</tr>"


def _header(cell: str) -> str:
    return f"<th>{html.escape(cell)}</th>"


def _row(cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
