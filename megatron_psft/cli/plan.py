"""Prints what a run takes before it is started: memory of each GPU, operations, and the smallest layout that fits.

Takes the flags, or the YAML file, of the training run, and the cluster's; `--help` has examples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from megatron_psft.cli.output import configure_output
from megatron_psft.config.flags import require_at_least, require_positive, run_command
from megatron_psft.config.inputs import DataConfig, WeightsConfig
from megatron_psft.config.paths import PathText
from megatron_psft.config.schema import Config
from megatron_psft.diagnostics.speeds import Speeds
from megatron_psft.errors import counted

if TYPE_CHECKING:  # it takes seconds to import, and `--help` answers at once
    from megatron_psft.diagnostics.plan import Memory, Plan

EXAMPLES = """examples:
  a recipe, on the GPUs that it is made for:
    psft plan --config examples/recipes/qwen2.5-7b-instruct-8xh100.yaml --gpus 8
  the same with longer sequences, on GPUs with more memory:
    psft plan --config examples/recipes/qwen2.5-7b-instruct-8xh100.yaml --seq-length 65536 \\
        --gpus 8 --gpu-memory-gib 141
  with its time, told from assumptions, of which one is set:
    psft plan --config examples/recipes/qwen2.5-7b-instruct-8xh100.yaml --gpus 8 --explain --reached-share 0.5

Only config.json of the model is read. The sequences are taken to be full, and every token a label."""


@dataclass(frozen=True, kw_only=True)
class PlannedWeights(WeightsConfig):
    """Which model. No weights are read."""

    save: PathText = ""
    """Run folder of the training command; nothing is written here."""


@dataclass(frozen=True, kw_only=True)
class PlannedData(DataConfig):
    """How long the sequences are. No records are read."""

    data: tuple[PathText, ...] = ("",)
    """Records of the training command; they are not read."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the run is to take place."""

    gpus: int
    """GPUs of the run, over all nodes."""
    gpu_memory_gib: float = 79.6
    """Memory of each, in GiB; an H100 of 80 GB has 79.6."""
    reserve_gib: float = 6.0
    """Part of it, in GiB, that is kept free for what is not counted: CUDA's context, NCCL's buffers, workspaces of
    libraries, and memory that the allocator holds in pieces too small to use."""
    gpus_per_node: int = 8
    """GPUs with a fast connection to each other, within which tensor parallelism stays in the suggested layout."""
    transformer_engine: bool = True
    """Whether Transformer Engine is installed there; without it the layers are plain PyTorch and keep more."""
    explain: bool = False
    """Also print what follows from assumed speeds: communication, pipeline bubble, time of a step and its MFU, of the
    old policy's pass, of a save and of a restart. Nothing of it was measured (docs/scaling.md)."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "gpus", "gpus_per_node")
        require_positive(self, "gpu_memory_gib")
        require_at_least(0, self, "reserve_gib")

    @property
    def room_bytes(self) -> float:
        """What a run may take of each GPU."""
        return (self.gpu_memory_gib - self.reserve_gib) * 2**30


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Config):
    """The run's configuration, and the cluster's."""

    weights: PlannedWeights
    data: PlannedData = PlannedData()
    cluster: ClusterConfig
    speeds: Speeds = field(default_factory=Speeds)


def main(argv: Sequence[str]) -> int:
    """Prints to stdout and returns the exit code: 0, 1 where the run does not fit, or 2 after a user's mistake."""
    configure_output()
    return run_command(PlanConfig, plan, argv, prog="psft plan", epilog=EXAMPLES)


def plan(config: PlanConfig) -> int:
    """Prints the plan; returns 1 where it does not fit. Raises UserError for what training would refuse."""
    import torch

    from megatron_psft.distributed.megatron_import import import_megatron

    import_megatron()
    from megatron_psft.diagnostics.layouts import smallest_layout
    from megatron_psft.diagnostics.plan import Plan
    from megatron_psft.distributed.device import Platform
    from megatron_psft.hf import hub
    from megatron_psft.sources.choice import shape_of

    cluster = config.cluster
    if config.batch.train_iters is None and config.batch.epochs is None:  # nothing here depends on the run's length
        config = replace(config, batch=replace(config.batch, epochs=1))
    config = config.with_bf16(config.precision.bf16 is not False)  # as on the GPUs that it is planned for
    folder = hub.model_folder("load_hf", config.weights.load_hf, with_weights=False)
    shape = shape_of(folder, "load_hf", "only a run itself shows whether such a model fits")
    platform = Platform(device=torch.device("cuda"), backend="nccl", has_transformer_engine=cluster.transformer_engine)
    planned = Plan(config=config, shape=shape, world_size=cluster.gpus, platform=platform)
    fits = planned.peak.total <= cluster.room_bytes
    print("\n".join([*_layout_lines(planned), "", *_memory_lines(planned, planned.peak)]))
    print(f"of {cluster.gpu_memory_gib:g} GiB, {cluster.reserve_gib:g} kept free: {'fits' if fits else 'does not fit'}")
    print("\n".join(["", *_cost_lines(planned), saving_line(planned, cluster.gpus_per_node)]))
    smallest = smallest_layout(planned, bytes_per_rank=cluster.room_bytes, ranks_per_node=cluster.gpus_per_node)
    print(f"smallest layout that fits: {_suggestion(smallest)}")
    if cluster.explain:
        print("\n".join(["", *_scaling_lines(planned, config)]))
    return 0 if fits else 1


def _layout_lines(plan: "Plan") -> Iterator[str]:
    yield f"{plan.shape.model_type}, {layout_of(plan)} on {counted(plan.world_size, 'GPU')}"
    batch = plan.config.batch
    replicas, passes = counted(plan.data_size, "replica"), counted(plan.num_microbatches, "micro-batch")
    cut = f"{replicas} x {passes} x {batch.micro_batch_size}"
    if plan.config.packs_each_step:
        row = batch.micro_batch_size * plan.tokens_per_sequence
        yield (
            f"a step: {counted(batch.global_batch_size, 'record')} of at most {plan.tokens_per_sequence:,} tokens, "
            f"evened out over {replicas}, in at most {counted(plan.num_microbatches, 'row')} of {row:,} each"
        )
        return
    yield f"a step: {counted(batch.global_batch_size, 'sequence')} of {plan.tokens_per_sequence:,} tokens = {cut}"


def layout_of(plan: "Plan") -> str:
    """The grid of ranks; experts are split over ranks of it."""
    parallel = plan.config.parallel
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "DP": plan.data_size,
    }
    experts = "" if plan.shape.experts is None else f", EP {parallel.expert_model_parallel_size}"
    return " x ".join(f"{name} {size}" for name, size in sizes.items()) + experts


def _memory_lines(plan: "Plan", memory: "Memory") -> Iterator[str]:
    from megatron_psft.diagnostics.plan import GIB

    where = f", stage {memory.stage + 1} of {plan.stages}" if plan.stages > 1 else ""
    yield f"GiB of the fullest GPU at its peak ({memory.moment}{where})"
    rows = {
        f"weights ({plan.num_parameters(memory.stage) / 1e9:.3g}e9)": memory.weights,
        "gradients, fp32": memory.gradients,
        "optimizer's states": memory.optimizer,
        "activations kept": memory.activations,
        "working memory": memory.working,
        "sum": memory.total,
    }
    for name, size in rows.items():
        yield f"  {name:<24}{size / GIB:8.2f}"


def _cost_lines(plan: "Plan") -> Iterator[str]:
    from megatron_psft.diagnostics.plan import GIB
    from megatron_psft.scoring.top_tokens import num_columns

    flops = plan.flops_per_step
    yield f"operations of a step: {flops / 1e15:.4g}e15, {flops / plan.world_size / 1e12:.4g}e12 per GPU"
    objective = plan.config.objective
    if "nll_z" in objective.needs:
        yield f"a pass over each batch before its step: {1 + 1 / plan.passes:.3f} times the operations"
    if objective.needs_reference:
        each = 4 * num_columns(objective.ref_top_k)
        size = f"{each} bytes on disk for each token of the data, {each * 1e6 / GIB:.3g} GiB for a million"
        yield f"reference: a pass over the data before the first step, and {size}"
    if plan.scored_steps == 0:
        return
    yield f"PSFT over SFT: {plan.overhead_bound:.3f} times the operations at most"
    kept, steps = plan.old_log_prob_bytes / 2**20, plan.scored_steps
    if steps is None:
        yield f"old log-probabilities: {kept:.3g} MiB of host memory per GPU of the last stage for each step of the run"
    else:
        where = f"of the last stage ({counted(steps, 'step')})"
        yield f"old log-probabilities: {kept * steps:.3g} MiB of host memory per GPU {where}"


def saving_line(plan: "Plan", gpus_per_node: int) -> str:
    """What a save writes, and what it takes of host memory."""
    from megatron_psft.diagnostics.plan import GIB

    each, writers = plan.saved_bytes / GIB, min(gpus_per_node, plan.world_size)
    node = f"{each * writers:.3g} GiB of a node's host memory"
    return f"a checkpoint: each GPU's process writes {each:.3g} GiB, copied to {node} before"


def _scaling_lines(plan: "Plan", config: PlanConfig) -> Iterator[str]:
    from megatron_psft.diagnostics.scaling import Scaling, explained

    yield "expected of the assumed speeds (docs/scaling.md), not measured:"
    for label, value in explained(
        Scaling(plan=plan, speeds=config.speeds, gpus_per_node=config.cluster.gpus_per_node)
    ).items():
        yield f"  {label:<42}{value}"


def _suggestion(smallest: "Plan | None") -> str:
    from megatron_psft.diagnostics.plan import GIB

    if smallest is None:
        return "none; recompute activations, shorten seq_length or take more GPUs"
    flags = "with sequence parallelism and the distributed optimizer"
    return f"{layout_of(smallest)}, {flags}, {smallest.peak.total / GIB:.1f} GiB"
