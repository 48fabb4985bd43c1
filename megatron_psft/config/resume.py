"""What may change of a run when it goes on from a checkpoint: the table of all settings, and how two starts differ.

Every field of `Config` is in exactly one of `SAME`, `TOLD` and `FREE`: a new field has to choose, or a test fails. The
table of docs/resume.md is made of them. Imports no torch.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, get_type_hints

from megatron_psft.config.lora import spelled_out
from megatron_psft.config.schema import Config
from megatron_psft.objectives.registry import SETTINGS

Settings = Mapping[str, Any]
"""The value of every field of a configuration by its name; JSON values."""

SAME: Mapping[str, tuple[str, ...]] = {
    "the loss": (
        "objective",
        "loss_aggregation",
        "clip_ratio_high",
        "clip_ratio_low",
        "old_policy_interval",
        "sft_warmup_iters",
        *SETTINGS,
    ),
    "the label tokens and how they are packed": (
        "seq_length",
        "packing",
        "overlong",
        "prompt_key",
        "completion_key",
        "system_prompt",
        "loss_on",
        "chat_template_kwargs",
        "keep_reasoning",
        "loss_on_empty_think",
        "split_special_tokens",
        "skip_bad_records",
    ),
    "the batches and their order": ("global_batch_size", "global_batch_unit", "seed", "shuffle"),
    "what is trained": ("lora_rank", "lora_alpha", "lora_targets", "lora_rank_stabilized"),
    "the form of the optimizer's state": ("bf16", "use_distributed_optimizer"),
}
"""Settings that must be the same, else the run is refused; by what they decide."""

TOLD: Mapping[str, tuple[str, ...]] = {
    "counts from the next step on": (
        "lr",
        "min_lr",
        "lr_decay_style",
        "lr_warmup_iters",
        "lr_warmup_fraction",
        "lr_decay_iters",
        "lr_wsd_decay_iters",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_eps",
        "clip_grad",
    ),
    "without lr_decay_iters the learning rate follows the schedule of the new length": ("train_iters", "epochs"),
    "another number format from the next step on": ("fp8_format", "fp8_recipe"),
    "equal up to rounding": (
        "device",
        "micro_batch_size",
        "old_policy_micro_batch_size",
        "fused_head",
        "tensor_model_parallel_size",
        "sequence_parallel",
        "pipeline_model_parallel_size",
        "num_layers_per_virtual_pipeline_stage",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "optimizer_cpu_offload",
        "optimizer_offload_fraction",
    ),
    "valid_nll is of other batches from here on": ("valid_data", "eval_iters"),
    "drift is of other answers from here on": ("drift_data",),
    "the training tokens are the same": ("data", "tokenizer", "chat_template", "ignore_keys"),
    "no effect: the weights are those of the checkpoint": ("load_hf", "random_init", "init_from"),
    "no effect: the adapters are those of the checkpoint": ("lora_init", "load_lora"),
}
"""Settings that may change, each named in a line when it does; by what the change means."""

FREE: tuple[str, ...] = (
    "model_source",
    "resize_vocab",
    "lora_merge",
    "save",
    "load",
    "export_hf",
    "export_interval",
    "save_interval",
    "keep_last",
    "async_save",
    "steal_lock",
    "exit_duration_in_mins",
    "eval_interval",
    "stop_at_drift",
    "data_cache_dir",
    "data_workers",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "distributed_timeout_minutes",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "log_interval",
    "tensorboard_dir",
    "wandb_project",
    "mlflow_experiment",
    "log_clipped_tokens",
    "check_scoring",
    "check_logits",
    "profile",
    "profile_step_start",
    "profile_step_end",
    "profile_rank",
)
"""Settings that may change without a word: they leave every number of training as it is."""

_FORMER_DEFAULTS: Settings = {"adam_beta2": 0.95}
"""Defaults of earlier releases: the same command has another value now."""

_MEANINGS: Mapping[str, Callable[[Any], Any]] = {
    "lora_targets": spelled_out,
    "chat_template_kwargs": lambda text: None if text is None else json.loads(text),
}
"""What the value of a setting says, where the same can be written in several ways."""

_SAME = {name for names in SAME.values() for name in names}
_MEANING = {name: meaning for meaning, names in TOLD.items() for name in names}


@dataclass(frozen=True, kw_only=True)
class Change:
    """A setting that is not what it was."""

    name: str
    before: Any
    now: Any

    @property
    def is_refused(self) -> bool:
        """Whether a run that has made steps cannot go on with it."""
        return self.name in _SAME

    def __str__(self) -> str:
        line = f"{self.name}: {shown(self.before)} -> {shown(self.now)} ({_MEANING[self.name]})"
        if self.before == _FORMER_DEFAULTS.get(self.name) and self.now == _defaults()[self.name]:
            line += f"; the default has changed: --{self.name.replace('_', '-')} {self.before} goes on as before"
        return line


def settings_of(config: Config) -> Settings:
    """The value of every field."""
    settings = {name: value for section in asdict(config).values() for name, value in section.items()}
    return json.loads(json.dumps(settings))  # type: ignore[no-any-return]


def changes_since(before: Settings, now: Settings) -> list[Change]:
    """The settings in which two starts of a run differ, those in `FREE` left out.

    Args:
        before: of the earlier start, which may be of another release. A field that it does not have had its default,
            and one that only it has is not compared.
        now: of this start, by `settings_of`.
    """
    values = {**_defaults(), **before}
    idle = set(FREE) | _without_effect(values, now)
    names = (name for name in now if name in values and name not in idle)
    return [
        Change(name=name, before=values[name], now=now[name])
        for name in names
        if _meaning(name, values[name]) != _meaning(name, now[name])
    ]


def _meaning(name: str, value: Any) -> Any:
    return _MEANINGS[name](value) if name in _MEANINGS else value


def _without_effect(before: Settings, now: Settings) -> set[str]:
    """Settings that count on one side alone, as another one, which has changed, says; or on none."""
    names: set[str] = set()
    if before["lora_rank"] != now["lora_rank"] and 0 in (before["lora_rank"], now["lora_rank"]):
        names |= {"lora_alpha", "lora_targets", "lora_rank_stabilized"}
    if before["objective"] != now["objective"]:
        names |= set(SAME["the loss"]) - {"objective", "loss_aggregation"}
    if not (before["packing"] or now["packing"]):
        names.add("global_batch_unit")
    return names


def listed(values: Iterable[tuple[str, Any]]) -> str:
    """Settings and their values, for a message."""
    return ", ".join(f"{name} {shown(value)}" for name, value in values)


def shown(value: Any) -> str:
    """A setting's value as a user writes it."""
    if value is None or value == []:
        return "unset"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _defaults() -> Settings:
    """The default of every field that has one."""
    known = (field for section in get_type_hints(Config).values() for field in fields(section))
    defaults = {field.name: field.default for field in known if field.default is not MISSING}
    return json.loads(json.dumps(defaults))  # type: ignore[no-any-return]
