"""Tables of docs/scaling.md: the lines of `psft plan --explain` for every recipe, and the speeds they follow from."""

from dataclasses import fields, replace
from functools import cache

from megatron_psft.cli.plan import ClusterConfig, PlanConfig, layout_of
from megatron_psft.config.flags import field_docs
from megatron_psft.config.schema import ParallelConfig
from megatron_psft.diagnostics.layouts import smallest_layout
from megatron_psft.diagnostics.plan import Plan
from megatron_psft.diagnostics.scaling import Scaling, explained
from megatron_psft.diagnostics.speeds import Speeds
from tests.support.recipes import RECIPES, SHAPES, plan_of

SMALL = (1, 2, 4)
"""Numbers of GPUs without a recipe: that for 8, in the smallest layout that fits."""


def speed_table() -> str:
    """A row per assumption."""
    docs = field_docs(PlanConfig)
    rows = [f"| `--{it.name.replace('_', '-')}` | {it.default:,g} | {docs[it.name]} |" for it in fields(Speeds)]
    return "\n".join(["| flag | assumed | what it is |", "| --- | --- | --- |", *rows])


@cache
def scaling_tables() -> str:
    """A table per model, with a column for each number of GPUs."""
    return "\n\n".join(f"### {model.split('/')[1]}\n\n{_table(_columns(model))}" for model in SHAPES)


def _columns(model: str) -> dict[int, dict[str, str]]:
    """The lines by number of GPUs."""
    plans = {plan.world_size: plan for plan in map(plan_of, RECIPES) if plan.config.weights.load_hf == model}
    small = {size: _smaller(plans[min(plans)], size) for size in SMALL}
    cluster = ClusterConfig(gpus=1)
    found = {}
    for size, plan in sorted((small | plans).items()):
        if plan is None:
            found[size] = {"layout": "none fits"}
        else:
            scaling = Scaling(plan=plan, speeds=Speeds(), gpus_per_node=cluster.gpus_per_node)
            found[size] = {"layout": layout_of(plan), **explained(scaling)}
    return found


def _smaller(plan: Plan, world_size: int) -> Plan | None:
    """The same run on fewer GPUs than its recipe is for."""
    cluster = ClusterConfig(gpus=world_size)
    one = ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True, use_distributed_optimizer=True)
    alone = replace(plan, config=replace(plan.config, parallel=one), world_size=world_size)
    return smallest_layout(alone, bytes_per_rank=cluster.room_bytes, ranks_per_node=cluster.gpus_per_node)


def _table(columns: dict[int, dict[str, str]]) -> str:
    # In the order of the column that has most, with what only others have behind.
    labels = dict.fromkeys(label for lines in sorted(columns.values(), key=len, reverse=True) for label in lines)
    rows = [
        ["GPUs", *map(str, columns)],
        ["---"] * (len(columns) + 1),
        *([label, *(lines.get(label, "") for lines in columns.values())] for label in labels),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
