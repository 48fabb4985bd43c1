"""What rank 0 keeps and shows of a run: metrics.jsonl, trackers, the progress bar and printed lines."""

import json
import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from megatron_psft.atomic import replace_file
from megatron_psft.metrics.clip_watch import ClipWatch
from megatron_psft.metrics.lines import in_order, with_former_names
from megatron_psft.metrics.set_names import split_name
from megatron_psft.metrics.table import METRICS
from megatron_psft.metrics.trackers import Trackers
from megatron_psft.progress import is_on_terminal

METRICS_FILE = "metrics.jsonl"
ON_BAR = [metric.name for metric in METRICS.values() if metric.is_on_bar]
_OF_EVALUATION = ("valid_", "drift")


class RunLog:
    """What rank 0 shows and keeps of a run: metrics.jsonl, its trackers, lines now and then, on a terminal a bar."""

    def __init__(
        self,
        folder: Path,
        trackers: Trackers,
        *,
        first_step: int,
        train_iters: int,
        log_interval: int,
        clip_watch: ClipWatch | None = None,
    ) -> None:
        """Opens the file; lines of metrics.jsonl from `first_step` (from 1) on, left by a run that went further, are
        dropped, and that of step 0 where the run begins anew. `trackers` are closed with the log; what `clip_watch`
        says is printed."""
        self._path = folder / METRICS_FILE
        _drop_from(self._path, first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._trackers, self._clip_watch = trackers, clip_watch
        self._first_step, self._train_iters, self._log_interval = first_step, train_iters, log_interval
        self._first_recorded: float | None = None
        """When the first step was over; it is no measure of the others, as much is set up in it."""
        self._bar = tqdm(
            total=train_iters,
            initial=first_step - 1,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=not is_on_terminal(),
        )

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one step (from 1; 0 is before the first one), by the names of `METRICS`."""
        line = with_former_names(values)
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        self._trackers.log(step, line)
        if step > 0:
            self._bar.set_postfix({name: f"{values[name]:.4g}" for name in ON_BAR if name in values}, refresh=False)
            self._bar.update()
            self._first_recorded = self._first_recorded or time.monotonic()
        if self._is_printed(step, values):
            printed = in_order(filter(_has_place_in_line, values))
            shown = [f"{name} {values[name]:.4g}" for name in printed]
            self.say(f"step {step} of {self._train_iters}: " + ", ".join([*shown, *self._remaining(step)]))
        if self._clip_watch is not None and "clip_fraction" in values:
            warning = self._clip_watch.add(step - 1, values["clip_fraction"])
            if warning is not None:
                self.say(warning)

    def _is_printed(self, step: int, values: Mapping[str, float]) -> bool:
        """Every `log_interval` steps, after each evaluation, and at both ends, so that a short run shows something."""
        is_evaluated = any(name.startswith(_OF_EVALUATION) for name in values)
        return step % self._log_interval == 0 or is_evaluated or step in (self._first_step, self._train_iters)

    def _remaining(self, step: int) -> list[str]:
        """When the run will be over, at the pace of this process's steps with all that came between them."""
        num_timed, num_left = step - self._first_step, self._train_iters - step
        if self._first_recorded is None or not num_timed or not num_left:
            return []
        seconds = (time.monotonic() - self._first_recorded) / num_timed * num_left
        return [f"eta {timedelta(seconds=round(seconds))}"]

    def sync(self) -> None:
        """Has all lines reach the disk, so that no checkpoint is ahead of them."""
        os.fsync(self._file.fileno())

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        self._bar.write(text)
        sys.stdout.flush()  # a file or pipe would get it much later

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._bar.close()
        self._trackers.close(has_failed=error is not None)


def _has_place_in_line(name: str) -> bool:
    """Whether the printed line has a value; those of training's sources would make it too long to read."""
    metric, of_set = split_name(name)
    return METRICS[metric].is_printed and not (of_set and METRICS[metric].is_by_source)


def line_of_step(folder: Path, step: int) -> dict[str, float]:
    """The line of a step (from 1) in a run's metrics.jsonl; empty where it has none."""
    path = folder / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    found = (json.loads(line) for line in lines if line.endswith("\n"))
    return next((line for line in found if line["step"] == step), {})


def _drop_from(path: Path, first_step: int) -> None:
    """Keeps the lines of earlier steps, so that a resumed run repeats none; the file is replaced in one move."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # The last line of a killed run may be half a line; its step is trained again.
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["step"] < first_step] if first_step > 1 else []
    if len(kept) < len(lines):
        replace_file(path, "".join(kept))
