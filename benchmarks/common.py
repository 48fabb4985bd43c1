"""What all benchmarks share: fresh processes for every measurement, and one JSON line per figure."""

import argparse
import ctypes
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]
_RESULT = "result "
"""Begins the line that says what a function has returned in a process of its own."""
sys.path.insert(0, str(ROOT))  # the tests' tiny models, and the package of this checkout


def emit(name: str, value: float | None, unit: str, **details: Any) -> None:
    """Prints one figure; `value` None where something does not run here, with the reason among the details."""
    rounded = None if value is None else float(f"{value:.5g}")
    line = json.dumps({"name": name, "value": rounded, "unit": unit, **details})
    print(f"{line}\n", end="", flush=True)  # whole, whichever thread prints


@contextmanager
def reporting(name: str, unit: str, **details: Any) -> Iterator[None]:
    """Prints what fails in this context as a figure that could not be measured, so that others can be."""
    try:
        yield
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        emit(name, None, unit, does_not_run=f"{type(error).__name__}: {first}"[:300], **details)


def emit_machine() -> None:
    """Prints what the figures were measured on, as a figure of its own."""
    if torch.cuda.is_available():
        emit("machine", torch.cuda.device_count(), "GPUs", device=torch.cuda.get_device_name(), torch=torch.__version__)
    else:
        threads = torch.get_num_threads()
        emit("machine", threads, "threads", device=platform.processor() or platform.machine(), torch=torch.__version__)


def parse_size(description: str | None, sizes: Sequence[str] = ("cpu", "gpu", "tiny")) -> str:
    """The one flag of a benchmark: `cpu` sizes take a minute or some on two cores, `gpu` sizes need a GPU, and `tiny`
    ones only show that the benchmark runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sizes, default="cpu")
    return parser.parse_args().size


def importing(*folders: Path) -> dict[str, str]:
    """The environment of a process that imports from these folders first, and then from where this one does."""
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


class FailedError(Exception):
    """A measurement that could not be made; the text is the last line of its error."""


def in_fresh_process(
    function: Callable[[dict[str, Any]], Any], spec: dict[str, Any], *, ranks: int = 1, seconds: float | None = None
) -> Any:
    """Calls `function(spec)`, of a script of this folder, in new processes joined as torchrun would; rank 0's result.

    Figures that rank 0 prints are passed on at once. The threads of this machine are shared out among the ranks. After
    `seconds`, if given, the processes are killed. Raises FailedError where any of them fails.
    """
    call = [sys.executable, "-W", "ignore", __file__, Path(sys.modules[function.__module__].__file__ or "").stem]
    call += [function.__name__, json.dumps(spec)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, torch.get_num_threads() // ranks)
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    with ExitStack() as files:
        errors = [files.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(ranks)]
        processes = [
            subprocess.Popen(
                call,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(threads)},
                stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
                stderr=error,
                text=True,
            )
            for rank, error in enumerate(errors)
        ]
        result = _result_of(processes, seconds)
        for process, error in zip(processes, errors, strict=True):
            if process.returncode:
                error.seek(0)
                late = f"killed after {seconds:.0f} s; " if seconds and process.returncode == -signal.SIGKILL else ""
                raise FailedError((late + last_error(error.read().splitlines()))[:300])
    return json.loads(result)


def _result_of(processes: Sequence["subprocess.Popen[str]"], seconds: float | None) -> str:
    """What the first process says that its function returned; other lines of JSON are printed as they come."""
    timer = threading.Timer(seconds or threading.TIMEOUT_MAX, lambda: [process.kill() for process in processes])
    timer.daemon = True
    timer.start()
    result = ""
    for line in processes[0].stdout or ():
        if line.startswith(_RESULT):
            result = line.removeprefix(_RESULT)
        elif line.startswith("{"):
            print(line, end="", flush=True)
    for process in processes:
        process.wait()
    timer.cancel()
    return result


def last_error(lines: Sequence[str]) -> str:
    """Of what a process has printed, the line that names its last exception, which libraries' warnings may follow; else
    its last line."""
    said = [line.removeprefix("[rank0]: ") for line in lines if line.strip()] or ["nothing"]
    return next((line for line in reversed(said) if re.match(r"[\w.]+(Error|Exception)\b", line)), said[-1])


class Meter:
    """Seconds of a block, and by how much it raised the peak of this process's memory.

    On the CPU the growth of the peak resident set, kept by the kernel; on CUDA the growth of the allocator's peak.
    """

    seconds = peak_bytes = 0.0

    def __enter__(self) -> "Meter":
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts over at what is resident now
            self._before = _status_bytes("VmRSS")
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._started
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status_bytes("VmHWM")
        self.peak_bytes = peak - self._before


def give_memory_back_at_once() -> None:
    """Has large tensors go back to the system when they are freed, and not lie about as glibc would have it."""
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    libc = ctypes.CDLL(None)
    for option in (trim_threshold, mmap_threshold):
        libc.mallopt(option, 64 * 2**10)


class Clock:
    """Seconds from its making to `stop`, of a GPU's stream where there is one."""

    def __init__(self) -> None:
        self._marks = [self._mark()]

    def stop(self) -> None:
        self._marks.append(self._mark())

    @property
    def seconds(self) -> float:
        first, last = self._marks
        if isinstance(first, float):
            return last - first
        last.synchronize()
        return first.elapsed_time(last) / 1000

    @staticmethod
    def _mark() -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _serve() -> None:
    import importlib

    module, function, spec = sys.argv[1:]
    result = getattr(importlib.import_module(module), function)(json.loads(spec))
    print(f"\n{_RESULT}{json.dumps(result)}")


if __name__ == "__main__":
    _serve()
