"""The tables of evidence.md, from what was measured by `examples/evidence/run.py`, `docs/evidence.jsonl`, and by
`rl.py` beside it, `docs/evidence_rl.jsonl`."""

import json
import runpy
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "evidence.jsonl"
"""A copy of the sweep's `results.jsonl`."""
RL_RESULTS = RESULTS.with_name("evidence_rl.jsonl")
"""A copy of `results.jsonl` of `rl.py`."""
_FRONTIER = Path(__file__).parents[1] / "examples" / "evidence" / "frontier.py"


def evidence_tables(path: Path = RESULTS) -> str:
    """The methods' and the runs' tables of each set."""
    frontier = runpy.run_path(str(_FRONTIER))
    base, *results = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    parts = [frontier["LEGEND"]]
    for name, own in frontier["by_set"](results).items():
        parts += [f"### {name.capitalize()}", frontier["tables"](own, base["base"][name])]
    return "\n\n".join(parts)


def rl_tables(path: Path = RL_RESULTS) -> str:
    """A table of each training that came after, a row per model from which it began."""
    results = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    before = {result["start"]: result for result in results if result["training"] == "none"}
    trainings = dict.fromkeys(result["training"] for result in results if result["training"] != "none")
    return "\n\n".join(
        "\n".join(_rl_table(training, before, [result for result in results if result["training"] == training]))
        for training in trainings
    )


def _rl_table(training: str, before: dict[str, Any], results: list[dict[str, Any]]) -> Iterator[str]:
    of_steps = [name for name, value in results[0].items() if isinstance(value, list)]
    shares = {"fields": 2, "kept": 2, "drift": 3}
    yield f"| {training.upper()} from | {' | '.join([*shares, *of_steps])} |"
    yield "| --- " * (1 + len(shares) + len(of_steps)) + "|"
    for result in results:
        start = before[result["start"]]
        cells = [f"{start[name]:.{digits}f} to {result[name]:.{digits}f}" for name, digits in shares.items()]
        for name in of_steps:
            steps = result[name]
            halves = (steps[: len(steps) // 2], steps[len(steps) // 2 :])
            cells.append(" to ".join(f"{statistics.mean(half):.3f}" for half in halves))
        yield f"| {result['start'].upper()} | {' | '.join(cells)} |"
