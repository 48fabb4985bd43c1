"""The rules that fields of the configuration keep among each other, and with the number of ranks. Imports no torch."""

import importlib.util

from megatron_psft.config.schema import Config, LoggingConfig, ObjectiveConfig, ParallelConfig
from megatron_psft.errors import UserError, counted, in_words
from megatron_psft.objectives.registry import OBJECTIVES, SETTINGS, find_objective

OLD_POLICY_FIELDS = (
    "clip_ratio_high",
    "clip_ratio_low",
    "old_policy_interval",
    "sft_warmup_iters",
    "old_policy_micro_batch_size",
)
"""Fields that have an effect with objectives that need the old policy."""

_OF_OLD_POLICY = ("log_clipped_tokens", "check_scoring")
"""Fields of logging that have an effect where a ratio may be another than 1."""

_PACKAGES = {"tensorboard_dir": "tensorboard", "wandb_project": "wandb", "mlflow_experiment": "mlflow"}
"""What a field needs that may not be installed."""


def validate(config: Config, world_size: int) -> None:
    """Raises UserError for the first rule across fields that `config` breaks on `world_size` ranks."""
    _validate_batch(config, world_size)
    _validate_needs(config)
    _validate_effects(config)
    _validate_packages(config.logging)
    _validate_profile(config.logging, world_size)
    if config.batch.train_iters is not None:
        validate_train_iters(config, config.batch.train_iters)


def validate_advantages(config: Config, *, has_advantages: bool) -> None:
    """Raises UserError where objective and records do not go together.

    Args:
        config: the run's.
        has_advantages: whether any training record has an advantage other than 1.
    """
    objective = config.objective
    if has_advantages and not find_objective(objective.objective).takes_advantages:
        choices = [name for name, declaration in OBJECTIVES.items() if declaration.takes_advantages]
        raise UserError(
            f"objective ({objective.objective}) takes no account of the advantages that records of data have; choose "
            f"{' or '.join(choices)}, or leave them away"
        )
    if not has_advantages:
        _refuse_if_set(objective, "where no record of data has an advantage", "clip_ratio_low")


def validate_precision(config: Config) -> None:
    """Raises UserError for a setting that needs bf16 without it. Where `bf16` is unset the device decides, after which
    the caller asks again."""
    precision, has_bf16 = config.precision, config.precision.bf16 is not False
    if precision.fp8_format is not None and not has_bf16:
        raise UserError(f"fp8_format ({precision.fp8_format}) needs bf16; set it, or remove fp8_format")
    if config.optimizer.optimizer_cpu_offload and not (has_bf16 and config.parallel.use_distributed_optimizer):
        raise UserError("optimizer_cpu_offload (True) needs bf16 and use_distributed_optimizer; set both, or remove it")


def validate_records(config: Config, records: int) -> None:
    """Raises UserError where the training set has fewer records than a step takes."""
    size = config.batch.global_batch_size
    if config.packs_each_step and records < size:
        raise UserError(
            f"global_batch_size ({size}) must be at most the {counted(records, 'record')} of data with "
            "global_batch_unit records; lower it"
        )


def validate_train_iters(config: Config, train_iters: int) -> None:
    """Raises UserError where a phase of the run does not fit into its steps.

    `validate` calls it where `train_iters` is set; with `epochs` the caller does, once the data has told the steps.
    """
    optimizer, sft_warmup = config.optimizer, config.objective.sft_warmup_iters
    end, all_steps = optimizer.decay_steps(train_iters), f"the number of training steps ({train_iters})"
    decay_end = all_steps if optimizer.lr_decay_iters is None else f"lr_decay_iters ({end})"
    if optimizer.lr_warmup_iters >= end:
        raise UserError(f"lr_warmup_iters ({optimizer.lr_warmup_iters}) must be below {decay_end}; change one")
    if sft_warmup >= train_iters:
        raise UserError(f"sft_warmup_iters ({sft_warmup}) must be below {all_steps}; change one")
    if config.logging.profile and config.logging.profile_step_start > train_iters:
        raise UserError(
            f"profile_step_start ({config.logging.profile_step_start}) must be at most {all_steps}; change one"
        )
    warmup, decay = optimizer.warmup_steps(train_iters), optimizer.lr_wsd_decay_iters
    if decay is not None and warmup + decay > end:
        fraction = optimizer.lr_warmup_fraction
        given = f"lr_warmup_iters ({warmup})"
        if fraction is not None:
            given = f"the {counted(warmup, 'step', 'g')} of lr_warmup_fraction ({fraction})"
        raise UserError(f"lr_wsd_decay_iters ({decay}) plus {given} must be at most {decay_end}; change one of them")


def _validate_packages(logging: LoggingConfig) -> None:
    for field, package in _PACKAGES.items():
        value = getattr(logging, field)
        if value is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"{field} ({value}) needs the package {package}, which is not there; pip install {package}")


def _validate_profile(logging: LoggingConfig, world_size: int) -> None:
    if not logging.profile:
        _refuse_if_set(logging, "without profile", "profile_step_start", "profile_step_end", "profile_rank")
    if logging.profile_rank >= world_size:
        raise UserError(f"profile_rank ({logging.profile_rank}) must be below the number of ranks ({world_size})")


def _validate_batch(config: Config, world_size: int) -> None:
    parallel, batch = config.parallel, config.batch
    if (batch.train_iters is None) == (batch.epochs is None):
        found = (
            "neither is"
            if batch.epochs is None
            else f"train_iters ({batch.train_iters}) and epochs ({batch.epochs}) are"
        )
        raise UserError(f"exactly one of train_iters and epochs must be set, but {found}; set one")
    if world_size % parallel.model_parallel_size:
        raise UserError(
            f"world_size ({world_size}) must be a multiple of tensor_model_parallel_size * "
            f"pipeline_model_parallel_size * context_parallel_size ({parallel.model_parallel_size}); change one of them"
        )
    expert_sizes = parallel.expert_model_parallel_size * parallel.expert_tensor_size
    if world_size % (expert_sizes * parallel.pipeline_model_parallel_size):
        raise UserError(
            f"world_size ({world_size}) must be a multiple of expert_model_parallel_size * expert_tensor_parallel_size "
            f"* pipeline_model_parallel_size ({expert_sizes * parallel.pipeline_model_parallel_size}); "
            "change one of them"
        )
    _validate_micro_batches(config, world_size, "micro_batch_size", batch.micro_batch_size)
    if config.objective.old_policy_micro_batch_size is not None:
        name = "old_policy_micro_batch_size"
        _validate_micro_batches(config, world_size, name, config.objective.old_policy_micro_batch_size)


def _validate_micro_batches(config: Config, world_size: int, name: str, micro_batch_size: int) -> None:
    """Whether a global batch can be cut into passes of `micro_batch_size`, which is field `name`."""
    if config.packs_each_step:
        return  # into as many as its records take, and empty ones
    parallel, global_batch_size = config.parallel, config.batch.global_batch_size
    sequences_per_pass = micro_batch_size * parallel.data_parallel_size(world_size)
    if global_batch_size % sequences_per_pass:
        raise UserError(
            f"global_batch_size ({global_batch_size}) must be a multiple of {name} * "
            f"data_parallel_size ({sequences_per_pass}); change one of them"
        )
    stages, passes = parallel.pipeline_model_parallel_size, global_batch_size // sequences_per_pass
    if parallel.num_layers_per_virtual_pipeline_stage is not None and passes % stages:
        raise UserError(
            f"num_microbatches ({passes}) must be a multiple of pipeline_model_parallel_size ({stages}) "
            f"where num_layers_per_virtual_pipeline_stage is set; change global_batch_size or {name}"
        )


def _validate_needs(config: Config) -> None:
    """Refuses fields that lack another one, or contradict it."""
    data, optimizer, recompute = config.data, config.optimizer, config.recompute
    _validate_evaluation(config)
    if data.prompt_key == data.completion_key:
        raise UserError(f"prompt_key ({data.prompt_key}) must differ from completion_key; change one of them")
    if optimizer.min_lr > optimizer.lr:
        raise UserError(f"min_lr ({optimizer.min_lr}) must be at most lr ({optimizer.lr}); change one of them")
    if optimizer.lr_decay_style == "WSD" and optimizer.lr_wsd_decay_iters is None:
        raise UserError("lr_decay_style (WSD) needs lr_wsd_decay_iters; set it or choose another style")
    if optimizer.lr_warmup_fraction is not None and optimizer.lr_warmup_iters:
        raise UserError(
            f"lr_warmup_fraction ({optimizer.lr_warmup_fraction}) and lr_warmup_iters ({optimizer.lr_warmup_iters}) "
            "are both set; remove one"
        )
    validate_precision(config)
    if recompute.recompute_granularity == "full":
        for name in ("recompute_method", "recompute_num_layers"):
            if getattr(recompute, name) is None:
                raise UserError(f"recompute_granularity (full) needs {name}; set it or choose selective")


def _validate_evaluation(config: Config) -> None:
    data = config.data
    for name in ("valid_data", "drift_data"):
        paths = getattr(data, name)
        if paths and data.eval_interval is None:
            raise UserError(f"{name} ({' '.join(paths)}) needs eval_interval; set both or neither")
    if data.valid_data and config.objective.needs_pairs:
        raise UserError(
            f"valid_data ({' '.join(data.valid_data)}) cannot be evaluated with objective "
            f"{config.objective.objective}, as its likelihood would count rejected sequences as good; remove it"
        )


def _validate_intervals(config: Config) -> None:
    if not config.data.valid_data:
        _refuse_if_set(config.data, "without valid_data", "eval_iters")
    if not config.data.drift_data:
        _refuse_if_set(config.data, "without drift_data", "stop_at_drift")
    if not (config.data.valid_data or config.data.drift_data):
        _refuse_if_set(config.data, "without valid_data or drift_data", "eval_interval")
    if config.weights.save_interval is None:
        _refuse_if_set(config.weights, "without save_interval", "export_interval")


def _validate_effects(config: Config) -> None:
    """Refuses fields that were set although another one leaves them without effect."""
    optimizer, parallel, recompute = config.optimizer, config.parallel, config.recompute
    _validate_objective(config.objective)
    if not config.objective.needs_old_policy:
        _refuse_if_set(config.logging, f"with objective {config.objective.objective}", *_OF_OLD_POLICY)
    if config.objective.old_policy_interval == 1:
        _refuse_if_set(config.logging, "with old_policy_interval 1", *_OF_OLD_POLICY)
    _validate_intervals(config)
    if optimizer.lr_decay_style == "constant":
        _refuse_if_set(optimizer, "with lr_decay_style constant", "min_lr")
        if optimizer.lr_warmup_fraction is None:
            _refuse_if_set(optimizer, "with lr_decay_style constant and no lr_warmup_fraction", "lr_decay_iters")
    if optimizer.lr_decay_style != "WSD":
        _refuse_if_set(optimizer, f"with lr_decay_style {optimizer.lr_decay_style}", "lr_wsd_decay_iters")
    if not optimizer.optimizer_cpu_offload:
        _refuse_if_set(optimizer, "without optimizer_cpu_offload", "optimizer_offload_fraction")
    _validate_parallel(parallel)
    _validate_lora(config)
    _validate_logits_check(config)
    if config.precision.fp8_format is None:
        _refuse_if_set(config.precision, "without fp8_format", "fp8_recipe")
    if recompute.recompute_granularity != "full":
        reason = "without recompute_granularity full"
        _refuse_if_set(recompute, reason, "recompute_method", "recompute_num_layers")
    if recompute.recompute_granularity != "selective":
        _refuse_if_set(recompute, "without recompute_granularity selective", "recompute_modules")


def _validate_parallel(parallel: ParallelConfig) -> None:
    if parallel.tensor_model_parallel_size == 1:
        _refuse_if_set(parallel, "with tensor_model_parallel_size 1", "sequence_parallel")
    if parallel.pipeline_model_parallel_size == 1:
        _refuse_if_set(parallel, "with pipeline_model_parallel_size 1", "num_layers_per_virtual_pipeline_stage")
    if not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        reason = "without use_distributed_optimizer and overlap_grad_reduce"
        _refuse_if_set(parallel, reason, "overlap_param_gather")


def _validate_lora(config: Config) -> None:
    lora = config.lora
    if lora.load_lora is not None and not lora.has_adapters:
        raise UserError(
            f"load_lora ({lora.load_lora}) needs lora_rank, lora_alpha and lora_targets as its adapter_config.json has "
            "them; set them"
        )
    if lora.has_adapters and config.weights.resize_vocab:
        raise UserError("resize_vocab (True) adds rows that are not trained with lora_rank; remove one of them")
    if lora.has_adapters and config.weights.random_init and config.weights.exports and not lora.lora_merge:
        raise UserError(
            "lora_rank with random_init exports an adapter of weights that no folder has; add lora_merge to export the "
            "model with it, or start from weights (load_hf without random_init)"
        )
    if not lora.has_adapters:
        names = ("lora_alpha", "lora_targets", "lora_rank_stabilized", "lora_init", "lora_merge")
        _refuse_if_set(lora, "without lora_rank", *names)
    elif not config.weights.exports:
        _refuse_if_set(lora, "without export_hf or export_interval", "lora_merge")
    if lora.load_lora is not None:
        _refuse_if_set(lora, "with load_lora", "lora_init")


def _validate_logits_check(config: Config) -> None:
    if not config.weights.reads_hf_weights:
        name = "random_init" if config.weights.random_init else "init_from"
        _refuse_if_set(config.logging, f"with {name}, whose weights are not those of load_hf", "check_logits")
    if config.precision.fp8_format is not None:
        _refuse_if_set(config.logging, "with fp8_format, for which no bound was found", "check_logits")


def _validate_objective(objective: ObjectiveConfig) -> None:
    reason = f"with objective {objective.objective}"
    if not objective.needs_old_policy:
        _refuse_if_set(objective, reason, *OLD_POLICY_FIELDS)
    declaration = find_objective(objective.objective)
    if declaration.is_clipped is not None:
        _refuse_if_set(objective, f"{reason}, which has another trust region", "clip_ratio_high", "clip_ratio_low")
    own = declaration.settings
    _refuse_if_set(objective, reason, *(name for name, setting in SETTINGS.items() if setting not in own))
    if objective.old_policy_interval == 1:
        _refuse_if_set(objective, "with old_policy_interval 1", "old_policy_micro_batch_size")
    if "ref_top" in objective.needs and not objective.ref_top_k:
        raise UserError(f"objective ({objective.objective}) needs kl_top_k; set it")
    if objective.ref_top_k and not objective.fused_head:
        raise UserError(f"kl_top_k ({objective.ref_top_k}) needs fused_head, which is off; change one of them")
    if objective.needs_pairs:
        _refuse_if_set(objective, f"{reason}, which takes the mean over pairs", "loss_aggregation")


def _refuse_if_set(section: object, reason: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value != getattr(type(section), name):  # a dataclass keeps its defaults as class attributes
            text = in_words(value) if isinstance(value, tuple) else value
            raise UserError(f"{name} ({text}) has no effect {reason}; change one of them")
