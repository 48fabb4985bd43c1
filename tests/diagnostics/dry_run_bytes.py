"""What the dry run of each recipe takes beside what its plan says: `python -m tests.diagnostics.dry_run_bytes` from the
repository measures it and writes docs/dry_run.csv, of which docs/scaling.md has a table."""

import csv
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

from megatron_psft.diagnostics.plan import GIB, Plan
from megatron_psft.progress import progress
from tests.diagnostics.dry_run import RankStep, cut, distinct_ranks, steps_of
from tests.support.cli import REPOSITORY
from tests.support.recipes import RECIPES, plan_of

STORED = REPOSITORY / "docs" / "dry_run.csv"
COLUMNS = ("states", "peak", "written")
"""Of the rank that has most, in GiB, each as it was found and as it is planned: weights, gradients and optimizer; these
and what a step keeps; what it writes of a checkpoint."""


def row_of(plan: Plan, steps: Sequence[RankStep]) -> dict[str, float]:
    """Found and planned, by `COLUMNS`; `plan` is the one that was cut."""
    memories = [plan.memory(step.place.pipeline_rank) for step in steps]
    planned = (
        max(memory.weights + memory.gradients + memory.optimizer for memory in memories),
        max(memory.total for memory in memories),
        plan.saved_bytes,
    )
    found = (
        max(step.state_bytes for step in steps),
        max(step.peak_bytes for step in steps),
        max(step.saved_bytes for step in steps),
    )
    pairs = zip(COLUMNS, found, planned, strict=True)
    return {
        f"{name}{kind}": value / GIB
        for name, *values in pairs
        for kind, value in zip(("", "_planned"), values, strict=True)
    }


def stored() -> dict[str, dict[str, float]]:
    """Rows of the file, by recipe."""
    with STORED.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {row.pop("recipe"): {name: float(value) for name, value in row.items()} for row in rows}


def dry_run_table() -> str:
    """A row per recipe."""
    titles = ("weights, gradients, optimizer", "peak of a step", "written of a checkpoint")
    header = " | ".join(["recipe", *(f"{title}: found | planned" for title in titles)])
    rows = [" | ".join([f"`{name}`", *(f"{value:.3f}" for value in row.values())]) for name, row in stored().items()]
    return "\n".join(f"| {row} |" for row in [header, " | ".join(["---"] * 7), *rows])


def _measured(path: Path) -> dict[str, float]:
    plan = cut(plan_of(path))
    return row_of(plan, steps_of(plan, distinct_ranks(plan)))


def main() -> None:
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:  # a fake group stays
        paths = progress(RECIPES, "dry run", unit="recipe", total=len(RECIPES))
        rows = [{"recipe": path.stem, **processes.apply(_measured, [path])} for path in paths]
    with STORED.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: f"{it:.4f}" if isinstance(it, float) else it for name, it in row.items()} for row in rows
        )


if __name__ == "__main__":
    main()
