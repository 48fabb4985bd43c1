"""The tables of evidence.md, from what `examples/evidence/run.py` has measured: `docs/evidence.jsonl`."""

import json
import runpy
from pathlib import Path

RESULTS = Path(__file__).parent / "evidence.jsonl"
"""A copy of the sweep's `results.jsonl`."""
_FRONTIER = Path(__file__).parents[1] / "examples" / "evidence" / "frontier.py"


def evidence_tables(path: Path = RESULTS) -> str:
    """The methods' and the runs' tables of each set."""
    frontier = runpy.run_path(str(_FRONTIER))
    base, *results = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    parts = [frontier["LEGEND"]]
    for name, own in frontier["by_set"](results).items():
        parts += [f"### {name.capitalize()}", frontier["tables"](own, base["base"][name])]
    return "\n\n".join(parts)
