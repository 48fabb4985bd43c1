"""Profiles a few steps of one rank: a trace of all that runs, and a table of the operators that take longest."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_psft.config.schema import LoggingConfig

FOLDER = "profile"
"""In the run's folder."""

_TABLE_ROWS = 20

log = logging.getLogger(__name__)


class StepProfiler:
    """Within this context the steps that `config` names are profiled, on the rank that it names.

    What has been measured is written after the last of them, or at the end of the context where that comes first.
    """

    def __init__(self, config: LoggingConfig, save: Path, *, rank: int, device: torch.device) -> None:
        """`save` is the run's folder; `rank` and `device` are this rank's."""
        is_profiled = config.profile and rank == config.profile_rank
        self._steps = range(config.profile_step_start, config.profile_step_end + 1) if is_profiled else range(0)
        self._folder, self._rank, self._is_on_gpu = save / FOLDER, rank, device.type == "cuda"
        self._running: profile | None = None
        self._profiled: list[int] = []

    @contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """What happens in this context belongs to `step`, counted from 1."""
        if step in self._steps and self._running is None:
            self._running = profile(activities=self._activities)
            self._running.start()
        if self._running is not None:
            self._profiled.append(step)
        yield
        if step == self._steps.stop - 1:
            self._finish()

    @property
    def _activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_on_gpu else [])]

    def _finish(self) -> None:
        """Stops and writes, where anything runs."""
        running, self._running = self._running, None
        if running is None:
            return
        running.stop()
        self._folder.mkdir(exist_ok=True)
        first, last = self._profiled[0], self._profiled[-1]
        stem = self._folder / f"steps_{first}_to_{last}_rank_{self._rank}"
        running.export_chrome_trace(f"{stem}.json.gz")
        column = "self_cuda_time_total" if self._is_on_gpu else "self_cpu_time_total"
        table = running.key_averages().table(sort_by=column, row_limit=_TABLE_ROWS)
        Path(f"{stem}.txt").write_text(table, encoding="utf-8")
        log.info("profiled steps %d to %d: %s.json.gz and %s.txt", first, last, stem, stem)

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._running is not None:
            self._running.stop()
