"""Runs benchmarks and keeps what they print, which is where every figure of the documentation comes from.

    python benchmarks/store.py [NAME ...] [--size cpu] [--target benchmarks/results/cpu.jsonl]

A line of the target is a figure as its benchmark has printed it, with the benchmark's name. The first line of each
benchmark says when, on what and by which command and commit it ran. A benchmark that ends well replaces its earlier
lines, and the other lines stay. `python -m docs.generate` then writes the tables of docs/performance.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import ROOT

from megatron_psft.metrics.provenance import commit, installed_version

NAMES = ("head", "psft_overhead", "scaling", "vs_trl", "plan", "checkpoint", "convert")
TARGET = ROOT / "benchmarks" / "results" / "cpu.jsonl"
LIBRARIES = ("torch", "megatron-core", "transformers", "trl")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all if unset")
    parser.add_argument("--size", choices=("cpu", "tiny"), default="cpu")
    parser.add_argument("--target", type=Path, default=TARGET, help="file of the figures")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(NAMES)):
        parser.error(f"no such benchmark: {', '.join(unknown)}")
    code = commit()  # before the target changes
    failed = []
    for name in options.names or NAMES:
        lines = run(name, options.size, code)
        if lines is None:
            failed.append(name)
        else:
            replace(options.target, name, lines)
    if failed:
        print(f"error: not stored, as they failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, size: str, code: str | None) -> list[dict[str, Any]] | None:
    """The lines to keep of a benchmark, or None where it fails; its figures are printed as they come."""
    words = [f"benchmarks/{name}.py", "--size", size]
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", *words]),
        "commit": code,
        "size": size,
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{one: installed_version(one) for one in LIBRARIES}},
    }
    started, figures = time.perf_counter(), []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)  # each benchmark says itself how many threads it takes
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if line.startswith("{"):
                figures.append(json.loads(line))
    if process.returncode:
        return None
    seconds = round(time.perf_counter() - started)
    first = {"benchmark": name, "name": "run", "value": seconds, "unit": "s", **facts}
    return [first, *({"benchmark": name, **one} for one in figures if one["name"] != "machine")]


def machine() -> dict[str, Any]:
    """What the figures depend on, with the load of other programs just before."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = round(os.getloadavg()[0], 1)
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(gib), "load_before": load}


def replace(target: Path, name: str, lines: list[dict[str, Any]]) -> None:
    """Puts a benchmark's lines in the place of its earlier ones, in the order of `NAMES`."""
    kept = target.read_text(encoding="utf-8").splitlines() if target.is_file() else []
    figures = [one for one in map(json.loads, kept) if one["benchmark"] != name] + lines
    figures.sort(key=lambda one: NAMES.index(one["benchmark"]))  # a benchmark's own lines keep their order
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(one) + "\n" for one in figures), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
