"""Runs benchmarks and keeps what they print, which is where every figure of the documentation comes from.

    python benchmarks/store.py [NAME ...] [--size cpu|gpu] [--target benchmarks/results/cpu.jsonl]

A line of the target is a figure as its benchmark has printed it, with the benchmark's name. The first line of each
benchmark says when, on what and by which command and commit it ran. `python -m docs.generate` then writes the tables of
docs/performance.md and docs/gpu.md.

In `--size cpu` a benchmark that ends well replaces its earlier lines, and one that fails leaves them. In `--size gpu`,
the acceptance of a machine, each benchmark has its time. One that fails or takes longer keeps what it has printed, with
a line `failed` that says why, and the next one follows. The checkout is enough: the package need not be installed.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from common import ROOT, importing

from megatron_psft.metrics.provenance import commit, installed_version

Figure = dict[str, Any]

NAMES = ("head", "psft_overhead", "scaling", "vs_trl", "real_model", "lora", "plan", "checkpoint", "convert")
"""What is stored of a CPU."""
GPU_SECONDS = {
    "environment": 40,
    "head_kernels": 100,  # transformers takes a module called kernels for a package of that name
    "head_choices": 60,
    "head": 90,
    "training": 150,
    "throughput": 150,
    "checkpoint": 60,
    "exits": 40,
}
"""What is stored of a GPU, what tells most first, and how long each may take. All of it is meant to take 8 minutes."""
LIBRARIES = ("torch", "triton", "megatron-core", "transformer-engine", "transformers", "trl")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks, without .py; all of the size if unset")
    parser.add_argument("--size", choices=("cpu", "gpu", "tiny"), default="cpu")
    parser.add_argument("--target", type=Path, help="file of the figures; if unset results/SIZE.jsonl, or gpu-te.jsonl")
    options = parser.parse_args()
    all_names = names_of(options.size)
    if unknown := sorted(set(options.names) - set(all_names)):
        parser.error(f"no such benchmark: {', '.join(unknown)}; choose from {', '.join(all_names)}")
    target = options.target or default_target(options.size)
    code = commit()  # before the target changes
    failed = []
    for name in options.names or all_names:
        result = run(name, options.size, code)
        if result.failure is not None:
            failed.append(name)
        if result.failure is None or options.size == "gpu":
            replace(target, name, result.lines(), all_names)
    if failed:
        stored = "failed" if options.size == "gpu" else "not stored, as they failed"
        print(f"error: {stored}: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def names_of(size: str) -> tuple[str, ...]:
    """The benchmarks of a size, in order."""
    sizes = {"cpu": NAMES, "gpu": tuple(GPU_SECONDS), "tiny": tuple(dict.fromkeys((*NAMES, *GPU_SECONDS)))}
    return sizes[size]


def default_target(size: str) -> Path:
    """The file of this machine's figures; those of Transformer Engine's layers have their own."""
    layers = "-te" if size == "gpu" and installed_version("transformer-engine") else ""
    return ROOT / "benchmarks" / "results" / f"{size}{layers}.jsonl"


@dataclass(kw_only=True)
class Result:
    """What became of a benchmark."""

    name: str
    facts: Figure
    """When, on what and by which command it ran."""
    figures: list[Figure] = field(default_factory=list)
    seconds: int = 0
    failure: str | None = None
    """Why it did not end well."""

    def lines(self) -> list[Figure]:
        """The lines to keep."""
        first = {"name": "run", "value": self.seconds, "unit": "s", **self.facts}
        failed = {"name": "failed", "value": None, "unit": "", "does_not_run": self.failure}
        last = [] if self.failure is None else [failed]
        kept = [first, *(one for one in self.figures if one["name"] != "machine"), *last]
        return [{"benchmark": self.name, **one} for one in kept]


def run(name: str, size: str, code: str | None) -> Result:
    """Runs a benchmark to its end or the end of its time; its figures are printed as they come."""
    words = [f"benchmarks/{name}.py", "--size", size]
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", *words]),
        "commit": code,
        "size": size,
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{one: installed_version(one) for one in LIBRARIES}},
    }
    result = Result(name=name, facts=facts)
    started = time.perf_counter()
    result.failure = follow(words, result.figures, GPU_SECONDS[name] if size == "gpu" else None)
    result.seconds = round(time.perf_counter() - started)
    return result


def follow(words: Sequence[str], figures: list[Figure], limit: float | None) -> str | None:
    """Runs a script, kills it with all it has started after `limit` seconds, and prints what it prints; its figures are
    added to `figures`. Returns why it failed, if it did."""
    environment = importing(ROOT)
    environment.pop("OMP_NUM_THREADS", None)  # each benchmark says itself how many threads it takes
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    errors, is_over = [""], threading.Event()
    reader = threading.Thread(target=_pass_on_errors, args=(process, errors), daemon=True)
    reader.start()
    timer = None if limit is None else threading.Timer(limit, lambda: (is_over.set(), kill(process)))
    try:
        if timer is not None:
            timer.start()
        for line in process.stdout or ():
            print(line, end="", flush=True)
            with suppress(ValueError):  # a line that was cut off, or of a library
                figures.extend([json.loads(line)] if line.startswith("{") else [])
        process.wait()
    except BaseException:  # Ctrl-C does not reach a session of its own
        kill(process)
        raise
    finally:
        if timer is not None:
            timer.cancel()
    if is_over.is_set():
        return f"killed after {limit:g} s"
    reader.join(timeout=5)
    return (errors[-1] or f"ended with {process.returncode}") if process.returncode else None


def _pass_on_errors(process: subprocess.Popen[str], last: list[str]) -> None:
    """Prints what the process prints to stderr, and keeps the last line in `last`."""
    for line in process.stderr or ():
        sys.stderr.write(line)
        last[:] = [line.strip()[:300] or last[0]]


def kill(process: subprocess.Popen[str]) -> None:
    """Kills the process and all that it has started; torchrun's ranks have sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        for descendant in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                descendant.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def machine() -> Figure:
    """What the figures depend on, with the load of other programs just before."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = round(os.getloadavg()[0], 1)
    found = {"cpu": model, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(gib), "load_before": load}
    return {**found, "gpus": gpus()}


def gpus() -> list[Figure]:
    """Each GPU's name, memory and driver, as the driver's own program tells; none without it."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    rows = [line.split(", ") for line in text.splitlines()]
    return [{"name": name, "memory_gib": round(int(mib) / 1024, 1), "driver": driver} for name, mib, driver in rows]


def replace(target: Path, name: str, lines: list[Figure], order: Sequence[str]) -> None:
    """Puts a benchmark's lines in the place of its earlier ones, in the order given."""
    kept = target.read_text(encoding="utf-8").splitlines() if target.is_file() else []
    figures = [one for one in map(json.loads, kept) if one["benchmark"] != name] + lines
    figures.sort(key=lambda one: order.index(one["benchmark"]))  # a benchmark's own lines keep their order
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(one) + "\n" for one in figures), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
