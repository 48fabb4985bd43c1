"""The rules across fields of the configuration."""

import pytest

from megatron_psft.config.rules import validate, validate_advantages, validate_train_iters
from megatron_psft.errors import UserError
from tests.support.configs import parse


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (1, "--train-iters 10"),
        (1, "--epochs 3 --lr-warmup-iters 50 --sft-warmup-iters 50"),  # too long only if the data turns out short
        (1, "--train-iters 10 --objective sft"),
        (1, "--train-iters 10 --valid-data v.jsonl --eval-interval 5 --eval-iters 2"),
        (1, "--train-iters 10 --lr-decay-style constant --lr-warmup-iters 9 --sft-warmup-iters 9"),
        (1, "--train-iters 10 --lr 0"),
        (1, "--train-iters 10 --objective sft-kl --kl-coef 0.1 --loss-aggregation seq-mean-token-sum"),
        (1, "--train-iters 10 --objective iw-sft --iw-level token"),
        (1, "--train-iters 10 --clip-ratio-low 0.1 --log-clipped-tokens 20"),
        (1, "--train-iters 10 --lr-decay-style WSD --lr-warmup-iters 4 --lr-wsd-decay-iters 6"),
        (1, "--train-iters 10 --profile"),
        (1, "--train-iters 10 --lora-rank 2 --random-init"),
        (1, "--train-iters 10 --lora-rank 2 --random-init --export-hf x --lora-merge"),
        (1, "--train-iters 10 --lr-decay-iters 20 --lr-warmup-iters 12"),  # the run ends within the warm-up
        (1, "--train-iters 10 --lr-decay-iters 4 --lr-warmup-fraction 0.5"),
        (1, "--train-iters 10 --lr-decay-style constant --lr-decay-iters 20 --lr-warmup-fraction 0.1"),
        (1, "--train-iters 10 --lr-decay-style WSD --lr-decay-iters 20 --lr-warmup-iters 4 --lr-wsd-decay-iters 16"),
        (1, "--train-iters 10 --recompute-granularity selective"),
        (1, "--train-iters 10 --recompute-granularity selective --recompute-modules core_attn moe"),
        (1, "--train-iters 10 --recompute-granularity full --recompute-method block --recompute-num-layers 1"),
        (8, "--train-iters 10 --micro-batch-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
        (8, "--train-iters 10 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
        (1, "--train-iters 10 --bf16 --fp8-format e4m3 --fp8-recipe blockwise"),
        (8, "--train-iters 10 --tensor-model-parallel-size 4 --sequence-parallel --expert-model-parallel-size 2"),
        (
            4,
            "--train-iters 10 --tensor-model-parallel-size 4 --sequence-parallel --expert-model-parallel-size 4 "
            "--expert-tensor-parallel-size 1",
        ),
        (2, "--train-iters 10 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    ],
)
def test_a_sound_configuration_is_valid(world_size: int, flags: str) -> None:
    validate(parse(*flags.split()), world_size)


@pytest.mark.parametrize(
    ("world_size", "flags", "message"),
    [
        (
            6,
            "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
            "world_size (6) must be a multiple of tensor_model_parallel_size * pipeline_model_parallel_size * "
            "context_parallel_size (4); change one of them",
        ),
        (
            6,
            "--context-parallel-size 4",
            "world_size (6) must be a multiple of tensor_model_parallel_size * pipeline_model_parallel_size * "
            "context_parallel_size (4); change one of them",
        ),
        (
            6,
            "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2",
            "world_size (6) must be a multiple of expert_model_parallel_size * expert_tensor_parallel_size * "
            "pipeline_model_parallel_size (4); change one of them",
        ),
        (
            8,
            "--context-parallel-size 2 --global-batch-size 6",
            "global_batch_size (6) must be a multiple of micro_batch_size * data_parallel_size (4); change one of them",
        ),
        (
            32,
            "--global-batch-size 96 --micro-batch-size 2",
            "global_batch_size (96) must be a multiple of micro_batch_size * data_parallel_size (64); "
            "change one of them",
        ),
        (
            2,
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 3",
            "num_microbatches (3) must be a multiple of pipeline_model_parallel_size (2) where "
            "num_layers_per_virtual_pipeline_stage is set; change global_batch_size or micro_batch_size",
        ),
        (
            2,
            "--global-batch-size 12 --old-policy-micro-batch-size 4",
            "global_batch_size (12) must be a multiple of old_policy_micro_batch_size * data_parallel_size (8); "
            "change one of them",
        ),
        (
            2,
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 12 "
            "--old-policy-micro-batch-size 4",
            "num_microbatches (3) must be a multiple of pipeline_model_parallel_size (2) where "
            "num_layers_per_virtual_pipeline_stage is set; change global_batch_size or old_policy_micro_batch_size",
        ),
    ],
)
def test_a_batch_that_does_not_divide_over_the_ranks_is_refused(world_size: int, flags: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        validate(parse("--train-iters", "10", *flags.split()), world_size)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--valid-data v.jsonl", "valid_data (v.jsonl) needs eval_interval"),
        ("--export-interval 2", "export_interval (2) has no effect without save_interval"),
        ("--eval-interval 5", "eval_interval (5) has no effect without valid_data"),
        ("--eval-iters 5", "eval_iters (5) has no effect without valid_data"),
        ("--prompt-key text --completion-key text", "prompt_key (text) must differ from completion_key"),
        ("--objective sft --clip-ratio-high 0.2", "clip_ratio_high (0.2) has no effect with objective sft"),
        ("--objective sft --old-policy-interval 4", "old_policy_interval (4) has no effect with objective sft"),
        ("--objective sft --sft-warmup-iters 1", "sft_warmup_iters (1) has no effect with objective sft"),
        ("--objective dft --clip-ratio-low 0.1", "clip_ratio_low (0.1) has no effect with objective dft"),
        (
            "--objective eaft --old-policy-micro-batch-size 2",
            "old_policy_micro_batch_size (2) has no effect with obj",
        ),
        ("--objective sft-kl --kl-top-k 5 --no-fused-head", "kl_top_k (5) needs fused_head, which is off"),
        ("--objective dft --kl-top-k 5", "kl_top_k (5) has no effect with objective dft"),
        ("--kl-coef 0.1", "kl_coef (0.1) has no effect with objective psft"),
        ("--tv-threshold 0.1", "tv_threshold (0.1) has no effect with objective psft"),
        (
            "--objective dppo-tv --clip-ratio-high 0.2",
            "clip_ratio_high (0.2) has no effect with objective dppo-tv, which has another trust region",
        ),
        ("--objective asft --iw-level token", "iw_level (token) has no effect with objective asft"),
        ("--objective dft --p-power-q 2", "p_power_q (2.0) has no effect with objective dft"),
        ("--objective deft --eaft-alpha 2", "eaft_alpha (2.0) has no effect with objective deft"),
        ("--objective profit --trsft-alpha 0.2", "trsft_alpha (0.2) has no effect with objective profit"),
        ("--objective trsft --profit-threshold 0.2", "profit_threshold (0.2) has no effect with objective trsft"),
        ("--objective sft --log-clipped-tokens 9", "log_clipped_tokens (9) has no effect with objective sft"),
        ("--objective dft --check-scoring", "check_scoring (True) has no effect with objective dft"),
        ("--old-policy-interval 1 --check-scoring", "check_scoring (True) has no effect with old_policy_interval 1"),
        ("--old-policy-interval 1 --log-clipped-tokens 9", "log_clipped_tokens (9) has no effect with old_policy_inte"),
        ("--lr 1e-6 --min-lr 1e-5", "min_lr (1e-05) must be at most lr (1e-06)"),
        ("--lr-decay-style constant --min-lr 1e-7", "min_lr (1e-07) has no effect with lr_decay_style constant"),
        ("--lr-decay-style WSD", "lr_decay_style (WSD) needs lr_wsd_decay_iters"),
        ("--lr-wsd-decay-iters 5", "lr_wsd_decay_iters (5) has no effect with lr_decay_style cosine"),
        (
            "--lr-decay-style WSD --lr-warmup-iters 5 --lr-wsd-decay-iters 6",
            "lr_wsd_decay_iters (6) plus lr_warmup_iters (5) must be at most the number of training steps (10)",
        ),
        (
            "--lr-decay-style WSD --lr-warmup-iters 2 --lr-wsd-decay-iters 3 --lr-decay-iters 4",
            "lr_wsd_decay_iters (3) plus lr_warmup_iters (2) must be at most lr_decay_iters (4); change one",
        ),
        (
            "--lr-decay-style WSD --lr-warmup-fraction 0.25 --lr-wsd-decay-iters 8",
            "lr_wsd_decay_iters (8) plus the 2.5 steps of lr_warmup_fraction (0.25) must be at most the number of",
        ),
        ("--lr-warmup-iters 3 --lr-decay-iters 3", "lr_warmup_iters (3) must be below lr_decay_iters (3); change one"),
        ("--lr-warmup-iters 3 --lr-warmup-fraction 0.2", "lr_warmup_fraction (0.2) and lr_warmup_iters (3) are both s"),
        ("--lr-decay-style constant --lr-decay-iters 3", "lr_decay_iters (3) has no effect with lr_decay_style const"),
        ("--random-init --check-logits", "check_logits (True) has no effect with random_init, whose weights are not"),
        ("--init-from x --check-logits", "check_logits (True) has no effect with init_from, whose weights are not"),
        ("--bf16 --fp8-format e4m3 --check-logits", "check_logits (True) has no effect with fp8_format, for which"),
        ("--profile-step-start 2", "profile_step_start (2) has no effect without profile"),
        ("--profile-step-end 20", "profile_step_end (20) has no effect without profile"),
        (
            "--profile --profile-step-start 11",
            "profile_step_start (11) must be at most the number of training steps (",
        ),
        ("--lora-targets q_proj k_proj v_proj", "lora_targets (q_proj, k_proj and v_proj) has no effect without lora_"),
        (
            "--lora-rank 2 --lora-targets q_porj",
            "lora_targets (q_porj) must be linear layers that all families have, of",
        ),
        ("--lora-rank 2 --lora-targets q_proj,lm_head", "lora_targets (lm_head) must be linear layers that all fam"),
        ("--lora-rank 2 --random-init --export-hf x", "lora_rank with random_init exports an adapter of weights that"),
        (
            "--lora-rank 2 --random-init --save-interval 2 --export-interval 1",
            "lora_rank with random_init exports an adapter of weights that no folder has; add lora_merge to export the",
        ),
        ("--profile --profile-rank 1", "profile_rank (1) must be below the number of ranks (1)"),
        ("--lr-warmup-iters 10", "lr_warmup_iters (10) must be below the number of training steps (10)"),
        ("--sft-warmup-iters 10", "sft_warmup_iters (10) must be below the number of training steps (10)"),
        ("--no-bf16 --fp8-format hybrid", "fp8_format (hybrid) needs bf16; set it, or remove fp8_format"),
        ("--bf16 --fp8-recipe mxfp8", "fp8_recipe (mxfp8) has no effect without fp8_format"),
        ("--sequence-parallel", "sequence_parallel (True) has no effect with tensor_model_parallel_size 1"),
        (
            "--num-layers-per-virtual-pipeline-stage 1",
            "num_layers_per_virtual_pipeline_stage (1) has no effect with pipeline_model_parallel_size 1",
        ),
        ("--overlap-param-gather --overlap-grad-reduce", "overlap_param_gather (True) has no effect without use_dist"),
        ("--overlap-param-gather --use-distributed-optimizer", "overlap_param_gather (True) has no effect without"),
        (
            "--recompute-modules mlp",
            "recompute_modules (mlp) has no effect without recompute_granularity selective",
        ),
        (
            "--optimizer-cpu-offload --bf16",
            "optimizer_cpu_offload (True) needs bf16 and use_distributed_optimizer; set both, or remove it",
        ),
        (
            "--optimizer-offload-fraction 0.5",
            "optimizer_offload_fraction (0.5) has no effect without optimizer_cpu_offload",
        ),
        ("--recompute-method block", "recompute_method (block) has no effect without recompute_granularity full"),
        ("--recompute-granularity selective --recompute-num-layers 2", "recompute_num_layers (2) has no effect"),
        (
            "--recompute-granularity full --recompute-num-layers 2",
            "recompute_granularity (full) needs recompute_method",
        ),
        ("--recompute-granularity full --recompute-method block", "recompute_granularity (full) needs recompute_num_"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(flags: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        validate(parse("--train-iters", "10", *flags.split()), world_size=1)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [([], "neither is"), (["--train-iters", "10", "--epochs", "2"], r"train_iters \(10\) and epochs \(2\) are")],
)
def test_the_length_of_a_run_is_given_exactly_once(flags: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=f"exactly one of train_iters and epochs must be set, but {problem}; set one"):
        validate(parse(*flags), world_size=1)


def test_phases_are_checked_against_steps_that_the_data_told() -> None:
    config = parse("--epochs", "2", "--lr-warmup-iters", "50")
    validate_train_iters(config, train_iters=51)
    with pytest.raises(UserError, match=r"lr_warmup_iters \(50\) must be below the number of training steps \(50\)"):
        validate_train_iters(config, train_iters=50)


@pytest.mark.parametrize("flags", ["", "--clip-ratio-low 0.1", "--objective sft"])
def test_records_with_advantages_are_for_the_policy_gradient(flags: str) -> None:
    validate_advantages(parse(*flags.split()), has_advantages=True)


@pytest.mark.parametrize("objective", ["dft", "sft-kl", "iw-sft"])
def test_an_objective_without_advantages_refuses_records_that_have_them(objective: str) -> None:
    config = parse("--objective", objective)
    validate_advantages(config, has_advantages=False)
    with pytest.raises(UserError) as error:
        validate_advantages(config, has_advantages=True)
    assert str(error.value).startswith(f"objective ({objective}) takes no account of the advantages that records of")


def test_the_lower_clip_needs_advantages() -> None:
    with pytest.raises(UserError) as error:
        validate_advantages(parse("--clip-ratio-low", "0.1"), has_advantages=False)
    assert str(error.value).startswith("clip_ratio_low (0.1) has no effect where no record of data has an advantage")


@pytest.mark.parametrize(
    ("flag", "package"),
    [("--tensorboard-dir", "tensorboard"), ("--wandb-project", "wandb"), ("--mlflow-experiment", "mlflow")],
)
def test_a_tracker_without_its_package_names_it(monkeypatch, flag, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=rf"\(x\) needs the package {package}, which is not there; pip install {package}"
    ):
        validate(parse("--train-iters", "10", flag, "x"), world_size=1)
