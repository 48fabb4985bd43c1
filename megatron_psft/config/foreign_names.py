"""What other trainers call our settings: for hints in errors, and for the tables of docs/migration.md."""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Counterpart:
    """A row of a table, and the names in it that an error explains."""

    there: str
    here: str
    names: Mapping[str, str] = field(default_factory=dict)
    """Each with the field that it is here, or with a text where it is none."""


def _same(names: Mapping[str, str]) -> Counterpart:
    """Names alone, one of ours for each."""
    return Counterpart(
        there=", ".join(f"`{name}`" for name in names),
        here=", ".join(f"`--{name.replace('_', '-')}`" for name in names.values()),
        names=names,
    )


_FROM_MODEL = "the model's config.json says it"
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")

TRAINERS: dict[str, tuple[Counterpart, ...]] = {
    "verl": (
        Counterpart(
            there="`data.train_files=x.parquet` with `prompt` and `demonstration`",
            here="`--data x.parquet` (found by itself)",
            names={"train_files": "data", "val_files": "valid_data"},
        ),
        Counterpart(
            there="`data.train_batch_size=256`, `actor.ppo_mini_batch_size=32`",
            here="`--global-batch-size 32 --global-batch-unit records --old-policy-interval 8`: k is the quotient",
            names={
                "train_batch_size": "here global_batch_size and old_policy_interval: k is the quotient",
                "ppo_mini_batch_size": "global_batch_size",
                "ppo_micro_batch_size_per_gpu": "micro_batch_size",
            },
        ),
        Counterpart(there="`actor.clip_ratio_high=0.28`", here="`--clip-ratio-high 0.28`"),
        Counterpart(
            there="`actor.clip_ratio_low=0.2`", here="remove it: without advantages it has no effect, and is refused"
        ),
        Counterpart(
            there="`actor.optim.lr=1e-6`, `lr_warmup_steps=10`, `weight_decay=0.1`",
            here="`--lr 1e-6 --lr-warmup-iters 80 --weight-decay 0.1 --lr-decay-style constant`: its schedule is "
            "constant, and steps once per batch of 256, that is per 8 updates",
            names={"lr_warmup_steps": "lr_warmup_iters"},
        ),
        Counterpart(
            there="`actor.loss_agg_mode=token-mean`",
            here="`--loss-aggregation token-mean` (the default)",
            names={"loss_agg_mode": "loss_aggregation"},
        ),
        Counterpart(there="`trainer.total_epochs=10`", here="`--epochs 10`", names={"total_epochs": "epochs"}),
        Counterpart(
            there="`data.max_prompt_length=2048`, `max_response_length=6144`",
            here="`--seq-length 8192`, the sum",
            names={"max_prompt_length": "seq_length", "max_response_length": "seq_length"},
        ),
        Counterpart(
            there="`actor.ulysses_sequence_parallel_size=4`",
            here="`--context-parallel-size 4`",
            names={"ulysses_sequence_parallel_size": "context_parallel_size"},
        ),
        Counterpart(there="`ref_policy`, `rollout.*`, Ray", here="nothing: there is no rollout"),
    ),
    "TRL": (
        _same({"model_name_or_path": "load_hf", "dataset_name": "data", "eval_dataset": "valid_data"}),
        Counterpart(
            there="`per_device_train_batch_size=2, gradient_accumulation_steps=4`, 8 GPUs",
            here="`--micro-batch-size 2 --global-batch-size 64`",
            names={
                "per_device_train_batch_size": "micro_batch_size",
                "per_device_eval_batch_size": "micro_batch_size",
                "gradient_accumulation_steps": "here global_batch_size, of a step over all ranks, says it",
            },
        ),
        Counterpart(
            there="`max_length`, `packing=True` (`bfd`)",
            here="`--seq-length`, `--packing` (the default)",
            names={"max_length": "seq_length", "max_seq_length": "seq_length"},
        ),
        Counterpart(
            there="`assistant_only_loss`, `completion_only_loss`",
            here="always; `--loss-on all` for the whole text",
            names={"assistant_only_loss": "loss_on", "completion_only_loss": "loss_on"},
        ),
        Counterpart(
            there="`dataset_text_field`",
            here="plain texts have the key `text`, and `--loss-on all`",
            names={"dataset_text_field": "plain texts have the key text, and loss_on all"},
        ),
        _same({"num_train_epochs": "epochs", "max_steps": "train_iters"}),
        _same(
            {
                "learning_rate": "lr",
                "lr_scheduler_type": "lr_decay_style",
                "warmup_steps": "lr_warmup_iters",
                "max_grad_norm": "clip_grad",
                "adam_epsilon": "adam_eps",
            }
        ),
        _same({"warmup_ratio": "lr_warmup_fraction"}),
        Counterpart(
            there="`peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=...)`",
            here="`--lora-rank 16 --lora-alpha 32 --lora-targets ...`, without dropout: two passes of one policy would "
            "disagree",
            names={
                "lora_r": "lora_rank",
                "lora_dim": "lora_rank",
                "target_modules": "lora_targets",
                "lora_target_modules": "lora_targets",
                "lora_target": "lora_targets",
                "lora_dropout": "adapters have no dropout, as two passes of one policy would disagree: remove it",
                "use_rslora": "lora_rank_stabilized",
                "init_lora_weights": "lora_init",
                "adapter_name_or_path": "load_lora",
            },
        ),
        Counterpart(there='`loss_type="dft"`', here="`--objective dft`", names={"loss_type": "objective"}),
        Counterpart(
            there='`eval_strategy="steps", eval_steps`',
            here="`--valid-data`, `--eval-interval`",
            names={
                "eval_strategy": "eval_interval",
                "evaluation_strategy": "eval_interval",
                "eval_steps": "eval_interval",
            },
        ),
        _same({"output_dir": "save", "save_steps": "save_interval", "save_total_limit": "keep_last"}),
        Counterpart(
            there="`resume_from_checkpoint`",
            here="`--save`: the same command resumes by itself",
            names={"resume_from_checkpoint": "the same command with the same save resumes by itself"},
        ),
        Counterpart(
            there='`report_to="wandb"`',
            here="`--wandb-project NAME`",
            names={"report_to": "here wandb_project, tensorboard_dir or mlflow_experiment"},
        ),
        _same({"logging_steps": "log_interval", "logging_dir": "tensorboard_dir"}),
        _same({"gradient_checkpointing": "recompute_granularity", "dataset_num_proc": "data_workers"}),
        Counterpart(
            there="`DPOTrainer(beta=0.1)`", here="`--objective dpo --dpo-beta 0.1`", names={"beta": "dpo_beta"}
        ),
    ),
    "Megatron LM": (
        Counterpart(
            there="`--load` of a converted checkpoint, `--tokenizer-type SFTTokenizer`",
            here="`--load-hf DIR`: no conversion, the model's own template",
            names={"tokenizer_type": "tokenizer", "tokenizer_model": "tokenizer"},
        ),
        Counterpart(
            there="`--num-layers`, `--hidden-size`, ...",
            here="from the model's `config.json`",
            names=dict.fromkeys(_SIZES, _FROM_MODEL),
        ),
        _same({"data_path": "data", "train_data_path": "data", "valid_data_path": "valid_data"}),
        Counterpart(
            there="`--train-iters`, `--global-batch-size`, `--micro-batch-size`, `--lr`, `--min-lr`, "
            "`--lr-decay-style`, `--weight-decay`, `--clip-grad`",
            here="the same, but `--global-batch-size` counts packs, or records with `--global-batch-unit records`",
        ),
        Counterpart(
            there="`--tensor-model-parallel-size`, `--pipeline-model-parallel-size`, `--context-parallel-size`, "
            "`--sequence-parallel`, `--use-distributed-optimizer`, `--optimizer-cpu-offload`, "
            "`--optimizer-offload-fraction`, `--overlap-*`, `--recompute-*`",
            here="the same",
        ),
        Counterpart(
            there="`--calculate-per-token-loss`",
            here="always: without it the gradient depends on the layout",
            names={"calculate_per_token_loss": "here it is always so"},
        ),
        Counterpart(
            there="`--save`, `--save-interval`, `--load`, `--async-save`",
            here="the same; `--save` also resumes; `--load` of a run keeps its step and optimizer",
        ),
        Counterpart(
            there="`--finetune`, `--pretrained-checkpoint`",
            here="`--init-from DIR`: weights alone, from step 0",
            names={"finetune": "init_from", "pretrained_checkpoint": "init_from"},
        ),
        Counterpart(there="`--lr-warmup-iters`, `--lr-warmup-fraction`, `--lr-decay-iters`", here="the same"),
        Counterpart(
            there="`--profile`, `--profile-step-start`, `--profile-step-end`, `--profile-ranks`",
            here="the same with `--profile-rank`, of one; steps count from 1, and the last is profiled as well",
            names={"profile_ranks": "profile_rank", "use_pytorch_profiler": "profile"},
        ),
        Counterpart(there="`--exit-duration-in-mins`", here="the same"),
        Counterpart(there="`--eval-interval`, `--eval-iters`", here="the same, over all tokens of `--valid-data`"),
        Counterpart(
            there="masks by pad value, prompts trained on with the default prompt format",
            here="by position, assistant turns only",
        ),
    ),
    "SWIFT": (
        Counterpart(
            there="`--model`, `--dataset a.jsonl b.jsonl#1000`",
            here="`--load-hf`, `--data a.jsonl b.jsonl=0.3`",
            names={"model": "load_hf", "dataset": "data", "val_dataset": "valid_data"},
        ),
        Counterpart(there="`--max_length`, `--packing true`", here="`--seq-length`, `--packing`"),
        Counterpart(there="`--loss_scale last_round`", here="`--loss-on last`", names={"loss_scale": "loss_on"}),
        Counterpart(
            there="`--enable_dft_loss true`",
            here="`--objective dft`",
            names={"enable_dft_loss": "here objective dft"},
        ),
        Counterpart(there="`--finetune false` to resume", here="always, from `--save`"),
        Counterpart(
            there="order depends on micro-batch size and ranks, its seed is the epoch's number",
            here="order depends on `--seed` and epoch only",
        ),
    ),
    "others": (
        _same({"base_model": "load_hf", "model_id": "load_hf", "tokenizer_name_or_path": "tokenizer"}),
        _same({"datasets": "data", "dataset_path": "data", "train_file": "data", "validation_file": "valid_data"}),
        _same({"sequence_len": "seq_length", "cutoff_len": "seq_length", "model_max_length": "seq_length"}),
        _same({"num_epochs": "epochs", "micro_batch_size_per_gpu": "micro_batch_size"}),
        _same({"lr_scheduler": "lr_decay_style", "gradient_clipping": "clip_grad", "sample_packing": "packing"}),
        _same({"train_on_inputs": "loss_on"}),
        _same({"evals_per_epoch": "eval_interval", "saves_per_epoch": "save_interval"}),
        _same({"preprocessing_num_workers": "data_workers", "dataset_prepared_path": "data_cache_dir"}),
        _same({"tensor_parallel_size": "tensor_model_parallel_size", "tp_size": "tensor_model_parallel_size"}),
        _same({"pipeline_parallel_size": "pipeline_model_parallel_size", "pp_size": "pipeline_model_parallel_size"}),
        _same({"cp_size": "context_parallel_size", "ep_size": "expert_model_parallel_size"}),
    ),
}
"""By project; the last are names of several others, such as Axolotl and LLaMA-Factory."""

_FIELD = re.compile(r"[a-z]+(?:_[a-z]+)+")
_HINTS = {name: here for rows in TRAINERS.values() for row in rows for name, here in row.names.items()}


def foreign_name_hint(name: str, known: Container[str], *, as_flags: bool) -> str:
    """`; here it is --lr` for a name of another trainer's whose counterpart is one of `known`, or an empty string.

    Args:
        name: as given, a flag or a key, also with what stands before its last dot.
        known: fields of the command.
        as_flags: whether fields are spelled as flags.
    """
    here = _HINTS.get(name.lstrip("-").replace("-", "_").rpartition(".")[2].lower())
    if here is None or "load_hf" not in known:
        return ""
    text = here if " " in here else f"here it is {here}"
    ours = _FIELD.findall(here) if " " in here else [here]
    if not all(one in known for one in ours):
        return ""
    for one in ours if as_flags else ():
        text = text.replace(one, "--" + one.replace("_", "-"))
    return f"; {text}"


def table_of(trainer: str) -> str:
    """The project's rows as Markdown."""
    rows = [f"| {row.there} | {row.here} |" for row in TRAINERS[trainer]]
    return "\n".join(["| there | here |", "| --- | --- |", *rows])
