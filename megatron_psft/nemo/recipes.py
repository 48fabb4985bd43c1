"""Bridge's recipes for full fine-tuning, with the settings of the paper (arXiv 2508.17784).

A batch counts packs where Bridge packs records offline: 32 then are more records than the paper's 32 a step.

A recipe is a function without arguments, as in Bridge; what it returns is overridden field by field. Parallelism,
precision and data are Bridge's, except where PSFT needs otherwise.
"""

from megatron.bridge.recipes.llama.llama3 import llama31_8b_sft_config
from megatron.bridge.recipes.qwen.h100.qwen3_moe import qwen3_30b_a3b_sft_8gpu_h100_bf16_config
from megatron.bridge.recipes.qwen.qwen2 import qwen25_7b_sft_config
from megatron.bridge.recipes.qwen.qwen3 import qwen3_4b_sft_config
from megatron.bridge.recipes.qwen_vl.qwen25_vl import qwen25_vl_7b_sft_config
from megatron.bridge.training.config import ConfigContainer

from megatron_psft.config.paper import RUNS
from megatron_psft.config.schema import OptimizerConfig
from megatron_psft.nemo.config import PsftConfigContainer

_PAPER = RUNS["psft"]


def qwen25_7b_psft_config() -> PsftConfigContainer:
    """Qwen2.5-7B-Instruct on two GPUs per replica (TP2)."""
    return psft_recipe(qwen25_7b_sft_config(), tokenizer="Qwen/Qwen2.5-7B-Instruct")


def llama31_8b_psft_config() -> PsftConfigContainer:
    """Llama-3.1-8B-Instruct on two GPUs per replica (TP2)."""
    return psft_recipe(llama31_8b_sft_config(), tokenizer="meta-llama/Llama-3.1-8B-Instruct")


def qwen3_4b_psft_config() -> PsftConfigContainer:
    """Qwen3-4B-Base on two GPUs per replica (TP2)."""
    return psft_recipe(qwen3_4b_sft_config(), tokenizer="Qwen/Qwen3-4B-Base")


def qwen25_vl_7b_psft_config() -> PsftConfigContainer:
    """Qwen2.5-VL-7B-Instruct on two GPUs per replica (TP2)."""
    recipe = psft_recipe(qwen25_vl_7b_sft_config())
    # Bridge's 300,000 steps are no length of a fine-tuning.
    recipe.train.train_iters = 1000
    return recipe


def qwen3_30b_a3b_psft_config() -> PsftConfigContainer:
    """Qwen3-30B-A3B on eight GPUs (TP4, PP2, EP4)."""
    recipe = psft_recipe(qwen3_30b_a3b_sft_8gpu_h100_bf16_config())
    # Bridge's recipe starts anew where a checkpoint lies.
    recipe.checkpoint.load = recipe.checkpoint.save
    return recipe


def psft_recipe(sft: ConfigContainer, tokenizer: str | None = None) -> PsftConfigContainer:
    """Turns a recipe of Bridge's into one for PSFT, with the optimizer's settings of the paper.

    Args:
        sft: what `megatron.bridge.recipes` returns for full fine-tuning, or for LoRA, which wants a higher
            `optimizer.lr` than the paper's.
        tokenizer: hub ID or folder of the tokenizer with the chat template; the recipe's if unset.
    """
    recipe = PsftConfigContainer.of(sft)
    if tokenizer is not None:
        recipe.tokenizer.tokenizer_model = tokenizer
    for name in ("lr", "weight_decay", "adam_beta1", "adam_beta2", "clip_grad"):
        setattr(recipe.optimizer, name, _PAPER[name])
    for name in ("min_lr", "adam_eps"):
        setattr(recipe.optimizer, name, getattr(OptimizerConfig(), name))
    scheduler = recipe.scheduler
    # Bridge's schedule has a weight decay of its own, which wins over the optimizer's.
    scheduler.start_weight_decay = scheduler.end_weight_decay = _PAPER["weight_decay"]
    scheduler.lr_decay_style = _PAPER["lr_decay_style"]
    scheduler.lr_warmup_iters = _PAPER["lr_warmup_iters"]
    scheduler.lr_decay_iters = None  # the length of the run
    recipe.train.global_batch_size = _PAPER["global_batch_size"]
    recipe.ddp.grad_reduce_in_fp32 = True
    # The auxiliary loss of experts is not clipped: it would go on to move the policy after PSFT has stopped.
    recipe.model.moe_aux_loss_coeff = 0.0
    return recipe
