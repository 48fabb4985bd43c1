"""Draws what runs have left in their folders: one HTML page that needs nothing else, and a PNG of each chart.

A run may still be going on: the same command again draws its new steps, and the open page is reloaded.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from megatron_psft.cli.output import configure_output
from megatron_psft.config.flags import require_at_least, run_command
from megatron_psft.config.paths import PathText
from megatron_psft.errors import UserError, counted, folder_error

EXAMPLES = """examples:
  one run, while it trains or after it:
    psft plot runs/first --out runs/first/report
  several runs in the same charts, each step's value without an average:
    psft plot runs/sft runs/psft runs/psft-k4 --out report --smooth 1

DIR gets report.html, to open in a browser, and loss.png, nll.png, entropy.png and so on. The page shows curves over the
optimizer steps, the most clipped tokens (--log-clipped-tokens of the run) and where the configurations differ."""


@dataclass(frozen=True, kw_only=True)
class RunsConfig:
    """What is drawn."""

    runs: tuple[PathText, ...]
    """Run folders, those that `--save` named in training. First on the command line they need no `--runs`."""
    smooth: int | None = None
    """Steps around its own that a curve's value is the mean of, while a pale line has each step's value; 1 draws these
    alone. A 50th of the longest run, in whole windows of the old policy, if unset."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "smooth")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is written."""

    out: PathText
    """Folder for report.html and the PNGs; it is made where it does not exist, and files of these names in it are
    replaced."""


@dataclass(frozen=True, kw_only=True)
class PlotRunConfig:
    """The whole command."""

    drawn: RunsConfig
    output: OutputConfig


def main(argv: Sequence[str]) -> int:
    """Writes the report and returns the exit code: 0, or 2 after a user's mistake."""
    configure_output()
    runs = list(takewhile(lambda word: not word.startswith("-"), argv))
    argv = ["--runs", *runs, *argv[len(runs) :]] if runs else argv
    return run_command(PlotRunConfig, plot_run, argv, prog="psft plot", epilog=EXAMPLES)


def plot_run(config: PlotRunConfig) -> None:
    """Reads, draws and writes. Raises UserError for runs that cannot be read or an `out` that cannot be written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib, which draws the charts, is not installed; pip install matplotlib")
    from megatron_psft.report.drawing import MAX_RUNS
    from megatron_psft.report.page import write_report
    from megatron_psft.report.runs import read_runs

    if len(config.drawn.runs) > MAX_RUNS:
        raise UserError(f"runs ({len(config.drawn.runs)}) must be at most {MAX_RUNS}, as many as can be told apart")
    runs = read_runs(config.drawn.runs)
    folder = Path(config.output.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        page = write_report(runs, folder, smooth=config.drawn.smooth)
    except OSError as error:
        raise folder_error("out", folder, error) from None
    print(f"{counted(len(runs), 'run')}, {counted(sum(run.num_steps for run in runs), 'step')}: {page}")
