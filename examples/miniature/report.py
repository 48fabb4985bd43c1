"""Turns what the runs measured into tables and pictures."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev

import chains
import compare
import plan as plans
import points
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from plan import LRS, Method, Plan
from points import Key, Points, Result, mean_of

from megatron_psft.report import palette

COLOURS = (
    *(palette.SFT, palette.ORANGE, palette.PURPLE),  # SFT, SFT-KL, DFT
    *(palette.PSFT, palette.SKY, palette.GREEN, palette.BLACK, palette.GREY),  # PSFT and its variants
)
MARKERS = "osD^v<>X"
THOUGHT, OTHER = palette.VERMILION, palette.GREY
WINDOW = 8
SHOWN_TOKENS = 14
HEADER = ["method", "lr", "steps", "target, %", "general, %", "held-out entropy", "held-out NLL", "clipped"]


def write(plan: Plan, folder: Path, results: Sequence[Result], rl_results: Sequence[Result]) -> str:
    """Writes `report.md` and the pictures it shows into `folder`; returns the report."""
    found = points.points(results)
    base = [result for result in results if result["method"] == "base"]
    pictures = [
        frontier(plan, found, base, folder / "frontier.png"),
        over_steps(plan, folder, "entropy", "entropy, nats per label token", folder / "entropy.png"),
        over_steps(plan, folder, "clip_fraction", "share of label tokens clipped", folder / "clip_fraction.png"),
        clipped_tokens(plan, folder, folder / "clipped_tokens.png"),
        grpo_rounds(plan, rl_results, folder / "grpo.png"),
    ]
    counts = f"Mean ± standard deviation over {len(plan.seeds)} seeds." if len(plan.seeds) > 1 else "One seed."
    parts = [
        f"{counts} The bases answer {_cell(base, 'target')} % of the target's held-out questions and "
        f"{_cell(base, 'general')} % of the general ones. Entropy and NLL in nats per label token.",
        f"At {points.level(found):.0f} % of the target or more, each method where it keeps most general skills:",
        compared(plan, found),
        "GRPO from these models:",
        grpo_table(plan, rl_results),
        "All points:",
        everything(plan, found),
        *(f"![{picture.stem}]({picture.name})" for picture in pictures),
    ]
    text = "\n\n".join(parts)
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    return text


def compared(plan: Plan, found: Points) -> str:
    """A table of each method at the point `points.chosen` picks; one below the level is marked."""
    rows = [HEADER]
    for method in plan.methods:
        key, is_enough = points.chosen(found, method.name)
        rows.append(_row(method, key, found[key], "" if is_enough else " (below)"))
    return compare.markdown(rows)


def everything(plan: Plan, found: Points) -> str:
    """A table of all points."""
    return compare.markdown([HEADER, *(_row(method, key, found[key]) for method, key in _in_order(plan, found))])


def _in_order(plan: Plan, found: Points) -> Iterator[tuple[Method, Key]]:
    for method in plan.methods:
        keys = [(method.name, lr, length) for lr in method.lrs for length in plan.lengths]
        yield from ((method, key) for key in keys if key in found)


def _row(method: Method, key: Key, runs: Sequence[Result], mark: str = "") -> list[str]:
    specs = {"target": ".0f", "general": ".0f", "valid_entropy": ".3f", "valid_nll": ".3f"}
    cells = [_cell(runs, name, spec) for name, spec in specs.items()]
    clipped = _cell(runs, "clip_fraction", ".3f") if method.clips else ""
    return [method.label + mark, key[1], str(key[2]), *cells, clipped]


def _cell(runs: Sequence[Result], value: str, spec: str = ".0f") -> str:
    return plus_minus([run[value] for run in runs], spec)


def plus_minus(values: Sequence[float], spec: str = ".0f") -> str:
    """Mean ± standard deviation of a sample; the mean alone where there is one value."""
    return f"{mean(values):{spec}}" + (f" ± {stdev(values):{spec}}" if len(values) > 1 else "")


def grpo_table(plan: Plan, rl_results: Sequence[Result]) -> str:
    """What the short GRPO made of each start: of the first and the last round, and of greedy decoding after it."""
    header = ["start", "reward, first round, %", "last round, %", "entropy, first round", "last round"]
    rows = [[*header, "target after, %", "general after, %"]]
    for method in plan.methods:
        own = [result for result in rl_results if result["method"] == method.name]
        if not own:
            continue
        first, last = ([r for r in own if r["round"] == number] for number in (1, plan.rl.rounds))
        cells = [plus_minus([100 * result["reward"] for result in runs]) for runs in (first, last)]
        cells += [_cell(runs, "entropy", ".3f") for runs in (first, last)]
        rows.append([method.label, *cells, _cell(last, "target"), _cell(last, "general")])
    return compare.markdown(rows)


def frontier(plan: Plan, found: Points, base: Sequence[Result], path: Path) -> Path:
    """Draws general skills and entropy over target accuracy: all points, and per method the line of its best ones."""
    with _figure(path, columns=2, height=5.6) as axes:
        for axis, value in zip(axes, ("general", "valid_entropy"), strict=True):
            for method, colour, marker in _styles(plan):
                own = [runs for key, runs in found.items() if key[0] == method.name]
                spots = [(mean_of(runs, "target"), mean_of(runs, value)) for runs in own]
                axis.scatter(*zip(*spots, strict=True), s=22, alpha=0.4, color=colour, marker=marker, linewidths=0)
                line = zip(*points.best(spots), strict=True)
                axis.plot(*line, color=colour, marker=marker, markersize=5, linewidth=1.3, label=method.label)
            axis.set_xlabel("target: held-out questions right, %")
            axis.grid(alpha=0.3)
        star = (mean_of(base, "target"), mean_of(base, "general"))
        axes[0].plot(*star, "*", color="black", markersize=13, linewidth=0, label="base")
        axes[0].set(ylabel="general skills: held-out questions right, %", title="What is kept")
        axes[1].set(ylabel="nats per label token", title="Entropy on held-out demonstrations")
    return path


def over_steps(plan: Plan, folder: Path, value: str, label: str, path: Path) -> Path:
    """Draws a value of metrics.jsonl over the steps, a panel for each learning rate: mean over the seeds, and over the
    WINDOW steps before, as clipping begins anew in each window of the old policy."""
    with _figure(path, columns=len(LRS), height=4.6, sharey=True) as axes:
        for axis, lr in zip(axes, LRS, strict=True):
            for method, colour, _ in _styles(plan):
                if lr not in method.lrs or (value == "clip_fraction" and not method.clips):
                    continue
                saved = [folder / f"seed-{seed}" / f"{method.name}-{lr}" / "run" for seed in plan.seeds]
                curves = [compare.metrics(run)[value] for run in saved]
                means = [mean(values) for values in zip(*curves, strict=True)]
                smooth = [mean(means[end - WINDOW : end]) for end in range(WINDOW, len(means) + 1)]
                steps = range(WINDOW, len(means) + 1)
                axis.plot(steps, smooth, color=colour, linewidth=1.3, label=method.label)
            axis.set(title=f"learning rate {lr}", xlabel="optimizer step")
            axis.grid(alpha=0.3)
        # Only now: a limit that is set stops all panels from making room for what comes after.
        axes[0].set(ylabel=f"{label},\nmean of {WINDOW} steps", ylim=(0, None))
    return path


def clipped_tokens(plan: Plan, folder: Path, path: Path) -> Path:
    """Draws which tokens PSFT clips most, over all seeds, a panel for each learning rate."""
    lrs = plans.PSFT.lrs
    with _figure(path, columns=len(lrs), height=4.6) as axes:
        for axis, lr in zip(axes, lrs, strict=True):
            counts = Counter[str]()
            for seed in plan.seeds:
                run = folder / f"seed-{seed}" / f"{plans.PSFT.name}-{lr}" / "run"
                content = json.loads((run / "clipped_tokens.json").read_text(encoding="utf-8"))
                counts.update({token["text"].strip(): token["count"] for token in content["tokens"]})
            words, values = zip(*counts.most_common(SHOWN_TOKENS)[::-1], strict=True) if counts else ((), ())
            axis.barh(words, values, color=[THOUGHT if word in chains.THOUGHTS else OTHER for word in words])
            axis.set(title=f"learning rate {lr}", xlabel="times clipped")
            axis.grid(alpha=0.3, axis="x")
        for colour, label in ((THOUGHT, "thought word"), (OTHER, "other token")):
            axes[0].plot([], [], "s", color=colour, label=label)
    return path


def grpo_rounds(plan: Plan, rl_results: Sequence[Result], path: Path) -> Path:
    """Draws reward and entropy of GRPO's samples over its rounds: mean over the seeds, and their range."""
    with _figure(path, columns=2, height=4.4) as axes:
        for axis, (value, factor) in zip(axes, (("reward", 100), ("entropy", 1)), strict=True):
            for method, colour, marker in _styles(plan):
                rounds = range(1, plan.rl.rounds + 1)
                own = [result for result in rl_results if result["method"] == method.name]
                seeds = [[factor * result[value] for result in own if result["round"] == number] for number in rounds]
                if own:
                    axis.fill_between(rounds, list(map(min, seeds)), list(map(max, seeds)), color=colour, alpha=0.15)
                    axis.plot(rounds, list(map(mean, seeds)), color=colour, marker=marker, label=f"from {method.label}")
            axis.set(xlabel="round", xticks=list(rounds))
            axis.grid(alpha=0.3)
        axes[0].set(ylabel="sampled replies right, %", title="Reward before each round's training")
        axes[1].set(ylabel="nats per label token", title="Entropy on the samples")
    return path


def _styles(plan: Plan) -> Iterator[tuple[Method, str, str]]:
    """Each method with a colour and a marker of its own, the same in every plan."""
    styles = zip(plans.METHODS, COLOURS, MARKERS, strict=True)
    yield from (style for style in styles if style[0] in plan.methods)


@contextmanager
def _figure(path: Path, *, columns: int, height: float, sharey: bool = False) -> Iterator[Sequence[Axes]]:
    """Panels side by side, `height` inches high, saved with one legend below them."""
    figure, axes = plt.subplots(1, columns, figsize=(11, height), layout="constrained", squeeze=False, sharey=sharey)
    yield axes[0]
    shown = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
