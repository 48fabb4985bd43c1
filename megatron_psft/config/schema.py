"""The run's configuration: one frozen dataclass per section. Rules across sections are in rules.py.

Every field is a flag (`global_batch_size` is `--global-batch-size`) and a YAML key. The string below a field is its
documentation here and its `--help` text. Nothing is rewritten after parsing; derived values are methods and properties.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from megatron_psft.config.flags import as_given, parse_flags, require_at_least, require_positive, require_range
from megatron_psft.config.inputs import DataConfig, WeightsConfig
from megatron_psft.config.lora import LoraConfig
from megatron_psft.config.paths import PathText
from megatron_psft.config.yaml_files import dump
from megatron_psft.errors import UserError
from megatron_psft.objectives.declare import Requirement
from megatron_psft.objectives.registry import OBJECTIVES, SETTINGS, needs_of, with_settings


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How long to train, and on how many sequences at a time."""

    train_iters: int | None = None
    """Optimizer steps of the whole run. Give either this or `epochs`."""
    epochs: int | None = None
    """Passes over the training records. Give either this or `train_iters`."""
    exit_duration_in_mins: float | None = None
    """Minutes from the start of the process after which the run completes its step, writes a checkpoint and ends with
    exit code 0; the same command goes on from there. No limit if unset."""
    global_batch_size: int = 64
    """Sequences per optimizer step, over all ranks; a multiple of `micro_batch_size` times the data-parallel size. With
    packing a sequence is a pack of records, or with `global_batch_unit` records any number of records. Both sequences
    of a preference pair count as one."""
    global_batch_unit: Literal["packs", "records"] = "packs"
    """What `global_batch_size` counts with packing. packs: rows of `seq_length` tokens, whose records depend on lengths
    alone. records: those that a step has without packing, in the same order; they are packed among themselves, their
    tokens evened out over data-parallel replicas, in as many rows as it takes. Without packing each sequence is a
    record, and both mean the same."""
    micro_batch_size: int = 1
    """Sequences per forward pass of one model replica. With packing they are one after the other in a row, which with
    `global_batch_unit` records has room for `micro_batch_size` times `seq_length` tokens. Both sequences of a
    preference pair count as one."""
    seed: int = 1234
    """Seed of the order of records and of randomly drawn weights."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "train_iters", "epochs", "global_batch_size", "micro_batch_size")
        require_at_least(0, self, "seed")
        if self.exit_duration_in_mins is not None:
            require_positive(self, "exit_duration_in_mins")

    def steps(self, packs: int) -> int | None:
        """Optimizer steps of the run, of whose epochs each has so many packs; None where neither field is set."""
        if self.train_iters is not None or self.epochs is None:
            return self.train_iters
        return -(-self.epochs * packs // self.global_batch_size)


if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[tuple(OBJECTIVES)] | str
LossAggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]


_TITLES = "; ".join(f"{name}: {declaration.title}" for name, declaration in OBJECTIVES.items()) + "."


@dataclass(frozen=True, kw_only=True)
@with_settings(SETTINGS)
class ObjectiveConfig:
    """The loss of a label token, and how losses are averaged; docs/objectives.md has formulas and sources."""

    # Settings of single objectives are declared in their files under objectives/builtin.
    objective: ObjectiveName = field(default="psft", metadata={"help": _TITLES})
    """The loss of a label token: one of the names below, or MODULE:FUNCTION for a function of your own on PYTHONPATH
    (docs/extending.md)."""
    loss_aggregation: LossAggregation = "token-mean"
    """How token losses of a global batch are averaged. token-mean: over its label tokens. seq-mean-token-mean: over the
    label tokens of each record, then over records. seq-mean-token-sum: summed over those of each record, then averaged
    over records. Records without a label do not count."""
    clip_ratio_high: float = 0.28
    """PSFT: a token has no gradient once its probability exceeds the old policy's by more than this share."""
    clip_ratio_low: float = 0.2
    """PSFT: a token of negative advantage has no gradient once its probability is below the old policy's by more than
    this share. Needs records with an advantage."""
    old_policy_interval: int | Literal["fixed"] = 8
    """PSFT: optimizer steps between updates of the old policy. 1 has the gradient of SFT; `fixed` keeps the model as it
    is at the end of `sft_warmup_iters` for the whole run."""
    sft_warmup_iters: int = 0
    """PSFT: first optimizer steps, trained with plain SFT; windows of the old policy are counted after them."""
    old_policy_micro_batch_size: int | None = None
    """PSFT: sequences per forward pass of one model replica when the old policy scores a window; `micro_batch_size`
    if unset. Any other leaves the ratio after a sync equal to 1 only up to rounding, of bf16 with `bf16`."""
    fused_head: bool = True
    """Compute loss and gradient from the last hidden states in chunks of label tokens, and never all of the logits;
    otherwise from all logits."""

    def __post_init__(self) -> None:
        needs_of(self.objective, self)  # whether there is such an objective
        for setting in SETTINGS.values():
            require_range(setting.range, self, setting.name)
        require_positive(self, "clip_ratio_high", "clip_ratio_low")
        require_at_least(0, self, "sft_warmup_iters")
        require_at_least(1, self, "old_policy_micro_batch_size")
        if self.old_policy_interval != "fixed":
            require_at_least(1, self, "old_policy_interval")

    @property
    def needs(self) -> frozenset[Requirement]:
        """What the objective needs besides log-probability and entropy."""
        return needs_of(self.objective, self)

    @property
    def needs_old_policy(self) -> bool:
        """Whether the loss compares with the old policy."""
        return "old" in self.needs

    @property
    def needs_pairs(self) -> bool:
        """Whether records are preference pairs."""
        return "pairs" in self.needs

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the model that the run starts from."""
        return "reference" in self.needs

    @property
    def ref_top_k(self) -> int:
        """How many of the initial model's most probable tokens the loss compares with."""
        settings: Any = self  # no type checker sees the fields that declarations add
        return int(settings.kl_top_k) if "ref_top" in self.needs else 0


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the schedule of its learning rate."""

    lr: float = 1e-6
    """Highest learning rate, reached at the end of warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay. Cannot be set with lr_decay_style constant."""
    lr_decay_style: Literal["constant", "cosine", "linear", "WSD"] = "cosine"
    """Course of the learning rate after warm-up; WSD (warm-up, stable, decay) needs `lr_wsd_decay_iters`."""
    lr_warmup_iters: int = 0
    """Optimizer steps over which the learning rate rises linearly from 0. Give either this or `lr_warmup_fraction`."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a share of `lr_decay_iters`, or of all steps if that is unset. Give either this or
    `lr_warmup_iters`."""
    lr_decay_iters: int | None = None
    """Optimizer step, warm-up included, at which the learning rate reaches `min_lr` and stays; the run's last step if
    unset. Beyond the run's last step, the run ends on the way."""
    lr_wsd_decay_iters: int | None = None
    """Last optimizer steps before the end of the decay, over which WSD lets the learning rate fall exponentially. Needs
    lr_decay_style WSD."""
    weight_decay: float = 0.1
    """Decoupled weight decay; 1-D parameters (norms, biases) have none."""
    adam_beta1: float = 0.9
    """Decay per step of Adam's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay per step of Adam's mean of squared gradients."""
    adam_eps: float = 1e-8
    """Adam's epsilon, added to the denominator for numerical stability."""
    clip_grad: float = 1.0
    """Gradients are scaled down to this norm over all parameters where theirs is larger; 0 scales nothing."""
    optimizer_cpu_offload: bool = False
    """Keep Adam's averages and the fp32 weights in the host's memory, and update there. Needs bf16 and
    `use_distributed_optimizer`."""
    optimizer_offload_fraction: float = 1.0
    """Share of the parameters that `optimizer_cpu_offload` takes."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "lr", "min_lr", "lr_warmup_iters", "weight_decay", "clip_grad")
        require_at_least(1, self, "lr_wsd_decay_iters", "lr_decay_iters")
        require_positive(self, "adam_eps")
        for name in ("adam_beta1", "adam_beta2", "lr_warmup_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"{name} ({value}) must be at least 0 and below 1")
        if not 0 < self.optimizer_offload_fraction <= 1:
            raise UserError(
                f"optimizer_offload_fraction ({self.optimizer_offload_fraction}) must be above 0 and at most 1"
            )

    def decay_steps(self, train_iters: int) -> int:
        """Steps from the first one to the end of the decay, in a run of `train_iters`."""
        return train_iters if self.lr_decay_iters is None else self.lr_decay_iters

    def warmup_steps(self, train_iters: int) -> float:
        """Steps of warm-up in a run of `train_iters`; as in Megatron-LM, a share of the decay need not be whole."""
        if self.lr_warmup_fraction is None:
            return self.lr_warmup_iters
        return self.lr_warmup_fraction * self.decay_steps(train_iters)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and the optimizer's state are spread over ranks; ranks left over are data-parallel."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""
    sequence_parallel: bool = False
    """Also split the activations between the tensor-parallel parts along the sequence. Needs tensor parallelism."""
    pipeline_model_parallel_size: int = 1
    """Ranks over which the layers are spread in stages."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers per chunk of the interleaved pipeline schedule; plain schedule if unset. Needs several stages."""
    context_parallel_size: int = 1
    """Ranks that share each sequence. Every record is padded to a multiple of twice this number, which may make a row
    longer than `seq_length`: packs do not depend on the layout."""
    expert_model_parallel_size: int = 1
    """Groups into which the experts of a mixture-of-experts model are split, over ranks that elsewhere are data-,
    context- or tensor-parallel."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert; `tensor_model_parallel_size` if unset."""
    use_distributed_optimizer: bool = False
    """Spread the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the forward pass runs. Needs `use_distributed_optimizer` and
    `overlap_grad_reduce`."""
    distributed_timeout_minutes: float = 30.0
    """Minutes that a rank waits in a collective for the others before the run ends with an error."""

    def __post_init__(self) -> None:
        require_positive(self, "distributed_timeout_minutes")
        require_at_least(1, self, "tensor_model_parallel_size", "pipeline_model_parallel_size")
        require_at_least(1, self, "context_parallel_size")
        require_at_least(1, self, "num_layers_per_virtual_pipeline_stage")
        require_at_least(1, self, "expert_model_parallel_size", "expert_tensor_parallel_size")

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that share each expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Ranks that compute one micro-batch together."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // self.model_parallel_size


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """What is computed on, and in which number formats."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Compute on a GPU for each rank (cuda) or on the CPU (cpu). auto takes GPUs where all ranks have one, and the CPU
    where there is no sign of a GPU; it refuses a rank whose GPU does not work, or that torch cannot use."""
    bf16: bool | None = None
    """Compute in bfloat16 with fp32 master weights; if false, everything is fp32. If unset: as before where a run goes
    on, else true on GPUs and false on the CPU."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Multiply weights in fp8, by Transformer Engine on a GPU that can: e4m3 throughout, or e5m2 for gradients; the
    output layer and all log-probabilities keep their precision. Needs `bf16`; nothing is fp8 if unset."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """How tensors are scaled to fp8: by their own largest value, by that of earlier steps, in blocks of 128, or in
    blocks of 32 (Blackwell GPUs). With delayed the old policy's pass and training scale differently, so that ratios
    start off 1. Needs `fp8_format`."""


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """Activation recomputation: memory bought with a second forward pass."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers, or `recompute_modules` of each; nothing if unset."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Keep the input of each group of layers, or recompute only the first layers of each pipeline stage. Goes with
    recompute_granularity full."""
    recompute_num_layers: int | None = None
    """Layers per group (uniform), or recomputed layers per pipeline stage (block). Goes with recompute_granularity
    full."""

    recompute_modules: tuple[str, ...] = ("core_attn",)
    """What of a layer is recomputed: core_attn (attention itself), mlp (a plain MLP), moe (router and experts). Goes
    with recompute_granularity selective."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "recompute_num_layers")
        odd = [module for module in self.recompute_modules if module not in ("core_attn", "mlp", "moe")]
        if odd or not self.recompute_modules:
            raise UserError(f"recompute_modules ({' '.join(odd)}) must be some of core_attn, mlp, moe")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run reports besides metrics.jsonl, which has every step."""

    log_interval: int = 10
    """Steps between printed lines; one is printed after each evaluation, and at the first and last step, as well."""
    tensorboard_dir: PathText | None = None
    """Folder for TensorBoard event files; none are written if unset."""
    wandb_project: str | None = None
    """Weights & Biases project that gets a run of the name of `save`'s folder, followed on when the run resumes; needs
    the package wandb, and its login or WANDB_MODE=offline."""
    mlflow_experiment: str | None = None
    """MLflow experiment that gets a run of the name of `save`'s folder, followed on when the run resumes; needs the
    package mlflow, and MLFLOW_TRACKING_URI for a server."""
    log_clipped_tokens: int | None = None
    """PSFT: number of tokens, the most clipped ones of the run so far, that are written to clipped_tokens.json in
    `save` whenever a checkpoint is; nothing is counted if unset."""
    check_scoring: bool = False
    """PSFT: measure after every sync how far the old policy's pass and training differ on the same weights
    (`scoring_gap_max`), at the cost of a forward pass over one more global batch; if unset only after the first sync of
    each start, and in fp8 after every one."""
    check_logits: bool = False
    """Before the first step, compare what the model, spread over the ranks as it is, says of the first 64 tokens of the
    first record with transformers' model of `load_hf` in fp32, which rank 0 has in host memory for that; end the run
    where they differ by more than rounding. That is 1e-4 in fp32; in bf16 the mean difference may be 4 times what bf16
    makes of transformers' own model, which finds parts that are missing or wrong, but no small error. No effect on a
    start that goes on from a checkpoint of a whole model."""
    profile: bool = False
    """Measure steps `profile_step_start` to `profile_step_end` on rank `profile_rank` with torch.profiler: into the
    folder `profile` of `save` go a trace for chrome://tracing or Perfetto, and a table of the 20 operators that take
    most time themselves, of the GPU where there is one."""
    profile_step_start: int = 10
    """First step to profile, counted from 1. Needs `profile`."""
    profile_step_end: int = 12
    """Last step to profile; the run's last where that comes first. Needs `profile`."""
    profile_rank: int = 0
    """Rank to profile. Needs `profile`."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "log_interval", "log_clipped_tokens", "profile_step_start")
        require_at_least(0, self, "profile_rank")
        if self.profile_step_end < self.profile_step_start:
            raise UserError(
                f"profile_step_end ({self.profile_step_end}) must not be below profile_step_start "
                f"({self.profile_step_start}); change one of them"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole run. Field names are unique over all sections."""

    weights: WeightsConfig
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    logging: LoggingConfig = LoggingConfig()

    def with_bf16(self, bf16: bool) -> Self:
        """The same with `bf16` set, for a device that is known."""
        return replace(self, precision=replace(self.precision, bf16=bf16))

    @property
    def batch_unit(self) -> Literal["pack", "record"]:
        """What a global batch is counted in."""
        return "pack" if self.data.packing and self.batch.global_batch_unit == "packs" else "record"

    @property
    def packs_each_step(self) -> bool:
        """Whether the records of a step are packed among themselves, and not those of an epoch."""
        return self.data.packing and self.batch_unit == "record"


def parse_config(argv: Sequence[str]) -> Config:
    """Builds the configuration from command-line flags and, below them in rank, the YAML file they name with --config.

    Raises UserError for unknown names, wrong types and values out of range. Rules across fields are in rules.py.
    """
    return parse_flags(Config, argv)


def config_to_yaml(config: Config) -> str:
    """Writes every field, section by section, in the form that --config reads."""
    texts = []
    for section in fields(config):
        values = getattr(config, section.name)
        given = {item.name: as_given(item, getattr(values, item.name)) for item in fields(values)}
        texts.append(f"# {section.name}\n{dump(given)}")
    return "\n".join(texts)
