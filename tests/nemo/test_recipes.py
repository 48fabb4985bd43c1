"""Every recipe builds on Bridge's own, is overridden as theirs, and passes Bridge's checks and ours."""

import json
import os
import subprocess
import sys

import pytest

from megatron_psft.config.paper import RUNS
from tests.nemo.bridge import needs_bridge
from tests.nemo.hub import write_hub_cache
from tests.support.cli import REPOSITORY

pytestmark = [needs_bridge, pytest.mark.slow, pytest.mark.both]

_PSFT = ("objective", "clip_ratio_high", "old_policy_interval", "sft_warmup_iters")
_OPTIMIZER = ("lr", "adam_beta1", "adam_beta2", "weight_decay", "clip_grad")
PAPER = {
    **{f"psft.{name}": RUNS["psft"][name] for name in _PSFT},
    "psft.fused_head": True,
    **{f"optimizer.{name}": RUNS["psft"][name] for name in _OPTIMIZER},
    "optimizer.min_lr": 0.0,
    "optimizer.adam_eps": 1e-8,
    "scheduler.start_weight_decay": RUNS["psft"]["weight_decay"],
    "scheduler.end_weight_decay": RUNS["psft"]["weight_decay"],
    "scheduler.lr_decay_style": RUNS["psft"]["lr_decay_style"],
    "scheduler.lr_decay_iters": None,
    "scheduler.lr_warmup_iters": RUNS["psft"]["lr_warmup_iters"],
    "train.global_batch_size": RUNS["psft"]["global_batch_size"],
    "model.calculate_per_token_loss": True,
    "model.hidden_dropout": 0.0,
    "model.attention_dropout": 0.0,
    "ddp.average_in_collective": False,
    "ddp.grad_reduce_in_fp32": True,
    "model.tensor_model_parallel_size": 2,
    "model.pipeline_model_parallel_size": 1,
}
TEXT = {**PAPER, "dataset.dataloader_type": "batch", "dataset.enable_offline_packing": True}
RECIPES = {
    "qwen25_7b_psft_config": {
        **TEXT,
        "model.num_layers": 28,
        "model.hidden_size": 3584,
        "model.vocab_size": 152064,
        "model.seq_length": 2048,
        "tokenizer.tokenizer_model": "Qwen/Qwen2.5-7B-Instruct",
    },
    "llama31_8b_psft_config": {
        **TEXT,
        "model.num_layers": 32,
        "model.hidden_size": 4096,
        "model.vocab_size": 128256,
        "model.seq_length": 4096,
        "tokenizer.tokenizer_model": "meta-llama/Llama-3.1-8B-Instruct",
    },
    "qwen3_4b_psft_config": {
        **TEXT,
        "model.num_layers": 36,
        "model.hidden_size": 2560,
        "model.vocab_size": 151936,
        "model.seq_length": 2048,
        "model.qk_layernorm": True,
        "tokenizer.tokenizer_model": "Qwen/Qwen3-4B-Base",
    },
    "qwen25_vl_7b_psft_config": {
        **PAPER,
        "model.num_layers": 28,
        "model.vocab_size": 152064,
        "train.train_iters": 1000,
        "dataset.dataloader_type": "cyclic",
        "dataset.hf_processor_path": "Qwen/Qwen2.5-VL-7B-Instruct",
    },
    "qwen3_30b_a3b_psft_config": {
        **TEXT,
        "model.num_layers": 48,
        "model.num_moe_experts": 128,
        "model.moe_aux_loss_coeff": 0.0,
        "model.tensor_model_parallel_size": 4,
        "model.pipeline_model_parallel_size": 2,
        "model.expert_model_parallel_size": 4,
        "model.sequence_parallel": True,
        "tokenizer.tokenizer_model": "Qwen/Qwen3-30B-A3B",
    },
}
WEIGHTS = str(REPOSITORY / "tests")  # a folder that is there
START = ["--recipe", "qwen25_7b", "--pretrained-checkpoint", WEIGHTS]
OVERRIDES = ["psft.old_policy_interval=4", "psft.clip_ratio_high=0.2", "train.train_iters=500", "optimizer.lr=2e-6"]
OWN = ["psft.objective=tests.objectives.own:sft_again", "psft.eaft_alpha=2"]
OVERRIDDEN = {
    "psft.old_policy_interval": 4,
    "psft.clip_ratio_high": 0.2,
    "train.train_iters": 500,
    "optimizer.lr": 2e-6,
    "checkpoint.pretrained_checkpoint": WEIGHTS,
    "checkpoint.save": "RUN",
    "checkpoint.load": "RUN",
    "dataset.dataset_root": "DATA",
    "dataset.hf_dataset": None,
}
MISTAKES = {
    "psft.objective=dpo": "must be one of psft, sft, deft, dft, dppo-tv, eaft, p-power, profit, trsft: any",
    "psft.objective=sft-kl": "psft.objective (sft-kl) must be one of psft, sft, deft, dft",
    "psft.objective=pfst": "objective ('pfst') must be one of psft, sft, asft",
    "psft.objective=tests.objectives.own:iw_sft_again": "psft.objective (tests.objectives.own:iw_sft_again) must be",
    "psft.p_power_q=0": "p_power_q (0) must be greater than 0",
    "psft.clip_ratio_high=0": "clip_ratio_high (0",
    "psft.old_policy_interval=always": "psft.old_policy_interval (always) must be an integer or fixed",
    "psft.old_policy_interval=0": "old_policy_interval (0) must be at least 1",
    "model.hidden_dropout=0.1": "model.hidden_dropout (0.1) must be 0.0: the two passes of one policy must agree",
    "ddp.average_in_collective=true": "ddp.average_in_collective (True) must be False",
    "model.calculate_per_token_loss=false": "model.calculate_per_token_loss (False) must be True",
    "train.rampup_batch_size=[16,8,1000]": "train.rampup_batch_size ([16, 8, 1000]) must be None",
    "dataset.dataloader_type=external": "dataset.dataloader_type (external) must be one of single, cyclic, batch",
}


@pytest.fixture(scope="module")
def answer(tmp_path_factory) -> dict:
    """Built once, in a process that takes the CPU for a GPU."""
    folder = tmp_path_factory.mktemp("recipes")
    commands = {
        "overridden": [[*START, "--save", "RUN", "--data", "DATA", "--overrides", *OVERRIDES], list(OVERRIDDEN)]
    }
    commands["own objective"] = [[*START, "--overrides", *OWN], ["psft.objective", "psft.eaft_alpha"]]
    commands |= {mistake: [[*START, "--overrides", mistake], []] for mistake in MISTAKES}
    question = {"recipes": {name: list(wanted) for name, wanted in RECIPES.items()}, "commands": commands}
    (folder / "question.json").write_text(json.dumps(question))
    command = [sys.executable, "-m", "tests.nemo.cpu", "tests.nemo.build_recipes", folder / "question.json"]
    environment = {**os.environ, "HF_HOME": str(write_hub_cache(folder)), "WORLD_SIZE": "8", "RANK": "0"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_settings_of_the_paper_and_of_its_model(answer, name):
    assert answer[name] == RECIPES[name]


def test_command_line_overrides_any_field(answer):
    assert answer["overridden"] == OVERRIDDEN


def test_an_own_objective_and_settings_of_objectives_are_fields(answer):
    assert answer["own objective"] == {"psft.objective": "tests.objectives.own:sft_again", "psft.eaft_alpha": 2}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_named(answer, mistake):
    assert MISTAKES[mistake] in answer[mistake]["error"]
