"""What a GPU does in a step, by torch.profiler's trace of it, and where the host waits for it."""

import json
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import ROOT
from torch.profiler import ProfilerActivity, profile

_NAME_LENGTH = 60
_NOISE = re.compile(r"\bvoid |at::native::|\(anonymous namespace\)::|<unnamed>::")
"""What most kernels' names begin with, and what says nothing of them."""
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace's events of what a GPU does; a run on the CPU has operators in their place."""
_OPERATOR = "cpu_op"
_WAITED = "called a synchronizing CUDA operation"
"""How torch's warning begins, of `torch.cuda.set_sync_debug_mode`."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Events of a kind."""

    name: str
    milliseconds: float
    count: int
    num_bytes: int
    """That copies move, 0 of anything else."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What ran from the first event to the last."""

    span_milliseconds: float
    idle_share: float
    """Of that time, in which nothing ran on any stream."""
    kernels: Sequence[Work]
    """By name, the longest in total first."""
    copies: Sequence[Work]
    """By direction and kind of host memory, as in `HtoD (Pageable -> Device)`."""


def profile_of(step: Callable[[], object]) -> Profile:
    """Profiles one call. Only what the GPU does is recorded, where there is one: to record operators takes the host's
    time, which the GPU would be seen to wait for."""
    is_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]) as running:
        step()
        if is_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        running.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"), strict=False)["traceEvents"]
    return read_trace(events, _DEVICE if is_gpu else (_OPERATOR,))


def read_trace(events: Sequence[dict[str, Any]], categories: Sequence[str] = _DEVICE) -> Profile:
    """Sums up the events of a trace, in microseconds. Raises ValueError where none is of the categories."""
    found = [event for event in events if event.get("ph") == "X" and event.get("cat") in categories]
    if not found:
        raise ValueError(f"the trace has no events of {', '.join(categories)}")
    start = min(event["ts"] for event in found)
    span = max(event["ts"] + event["dur"] for event in found) - start
    copies = [event for event in found if event["cat"] == "gpu_memcpy"]
    return Profile(
        span_milliseconds=span / 1000,
        idle_share=1 - _busy(found) / span,
        kernels=_by_name(event for event in found if event["cat"] not in ("gpu_memcpy", "gpu_memset")),
        copies=_by_name({**event, "name": event["name"].removeprefix("Memcpy ")} for event in copies),
    )


def _busy(events: Sequence[dict[str, Any]]) -> float:
    """Microseconds in which any of the events went on."""
    busy, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        end = event["ts"] + event["dur"]
        busy += max(0.0, end - max(until, event["ts"]))
        until = max(until, end)
    return busy


def _by_name(events: Iterator[dict[str, Any]]) -> list[Work]:
    times, counts, sizes = Counter[str](), Counter[str](), Counter[str]()
    for event in events:
        name = event["name"]
        times[name] += event["dur"]
        counts[name] += 1
        sizes[name] += int(event.get("args", {}).get("bytes", 0))
    return [
        Work(name=name, milliseconds=time / 1000, count=counts[name], num_bytes=sizes[name])
        for name, time in times.most_common()
    ]


def short_name(name: str) -> str:
    """A kernel's name without what most begin with, cut to 60 characters."""
    return _NOISE.sub("", name)[:_NAME_LENGTH]


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Counts, by line of source, the calls in this context in which the host waits for a GPU, as torch knows them.

    Those of the backward pass are counted where it is started. Calls that only wait, as `synchronize`, are not known.
    """
    waits: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits.update(
        f"{_short_path(warning.filename)}:{warning.lineno}"
        for warning in caught
        if str(warning.message).startswith(_WAITED)
    )


def _short_path(path: str) -> str:
    return path.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2]
