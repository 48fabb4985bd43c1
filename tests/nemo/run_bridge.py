"""Fine-tunes a tiny model with Megatron-Bridge: `cpu.run("tests.nemo.run_bridge", ["JOB.json"])`.

The job names the model, the tokenizer, the data and the overrides. Rank by rank, what Bridge reports of each step goes
to `<save>/bridge_<rank>.jsonl`.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.data.builders import GPTSFTDatasetConfig
from megatron.bridge.data.sft_processing import ChatSFTPreprocessingConfig
from megatron.bridge.peft import utils as peft_utils
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.recipes.common import _peft_common, _sft_common
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
from safetensors.torch import load_file

from megatron_psft.nemo.config import PsftConfigContainer
from megatron_psft.nemo.recipes import psft_recipe
from megatron_psft.nemo.train import finetune

peft_utils.HAVE_TE = False  # Transformer Engine's layers are stand-ins here, and no classes

FP32 = {"bf16": False, "params_dtype": torch.float32, "pipeline_dtype": torch.float32, "autocast_dtype": torch.float32}
FUSIONS = ("apply_rope_fusion", "bias_activation_fusion", "bias_dropout_fusion", "gradient_accumulation_fusion")
FUSIONS += ("cross_entropy_loss_fusion", "masked_softmax_fusion", "persist_layer_norm")
FUSIONS += ("moe_permute_fusion", "moe_grouped_gemm")


class Recorder(Callback):
    """Writes what the end of a step, and of an evaluation, reports."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_step_end(self, context) -> None:
        step = {"step": context.state.train_state.step + 1, "grad_norm": float(context.grad_norm)}
        self._write({**step, **context.loss_dict})

    def on_eval_end(self, context) -> None:
        sums = dict(context.total_loss_dict)
        self._write({"valid": sums.pop("lm loss"), **sums})

    def _write(self, values) -> None:
        line = {name: float(value) for name, value in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


@dataclass
class LoadedLoRA(LoRA):
    """Bridge's own, of the layers that Megatron-Core does not fuse, from a `peft` adapter."""

    folder: str = ""

    def __call__(self, model, training=True):
        model = super().__call__(model, training)
        tensors = load_file(Path(self.folder) / "adapter_model.safetensors")
        hf_names = {"self_attention.linear_proj": "self_attn.o_proj", "mlp.linear_fc2": "mlp.down_proj"}
        matrices = {"linear_in": "lora_A", "linear_out": "lora_B"}
        for chunk in model:
            for name, parameter in chunk.named_parameters():
                module, _, matrix = name.removeprefix("decoder.").removesuffix(".weight").partition(".adapter.")
                if matrix:
                    _, layer, module = module.split(".", 2)
                    hf_name = f"base_model.model.model.layers.{layer}.{hf_names[module]}.{matrices[matrix]}.weight"
                    parameter.data.copy_(tensors.pop(hf_name))
        assert not tensors
        return model


def portable_model(model_folder: Path, seq_length: int):
    """Bridge's provider of the model, in fp32."""
    provider = AutoBridge.from_hf_pretrained(str(model_folder)).to_megatron_provider(load_weights=False)
    for name, value in {**FP32, **dict.fromkeys(FUSIONS, False)}.items():
        setattr(provider, name, value)
    provider.use_cpu_initialization, provider.attention_backend, provider.seq_length = True, None, seq_length
    provider.batch_p2p_comm = False
    return provider


def build_config(job: dict) -> PsftConfigContainer:
    """What a user would get from a recipe, of a size and kind for this machine."""
    recipe = _peft_common() if "adapter" in job else _sft_common()
    if "adapter" in job:
        settings = {"target_modules": ["linear_proj", "linear_fc2"], "dim": 4, "alpha": 8}
        recipe.peft = LoadedLoRA(folder=job["adapter"], dropout=job.get("dropout", 0.0), **settings)
    recipe.model = portable_model(Path(job["model"]), job["seq_length"])
    recipe = psft_recipe(recipe, tokenizer=job["tokenizer"])
    recipe.mixed_precision, recipe.optimizer.bf16 = None, False
    recipe.optimizer.use_distributed_optimizer = recipe.ddp.use_distributed_optimizer = False
    recipe.dist.distributed_backend = "gloo"
    recipe.scheduler.lr_decay_style, recipe.scheduler.lr_warmup_iters = "constant", 0
    recipe.validation.eval_iters = 0
    recipe.logger.tensorboard_dir = None
    recipe.dataset = GPTSFTDatasetConfig(
        dataset_root=job["data"],
        seq_length=job["seq_length"],
        preprocessing=ChatSFTPreprocessingConfig(),
        dataset_kwargs={"pad_to_max_length": False},
        dataloader_type="single",
        num_workers=0,
        do_validation=False,
        do_test=False,
    )
    recipe.checkpoint.save = recipe.checkpoint.load = job["save"]
    recipe.checkpoint.save_interval, recipe.checkpoint.pretrained_checkpoint = None, job["model"]
    return process_config_with_overrides(recipe, cli_overrides=job["overrides"])


def _scale_attention(factor: float) -> None:
    """Multiplies attention scores where no gradient is wanted, as a pass with another kernel would."""
    from megatron_psft.model.layers import Attention

    forward = Attention.forward

    def scaled(self, query, *args, **kwargs):
        return forward(self, query if torch.is_grad_enabled() else query * factor, *args, **kwargs)

    Attention.forward = scaled


def main(argv: list[str]) -> None:
    job = json.loads(Path(argv[0]).read_text())
    if "attention" in job:
        _scale_attention(job["attention"])
    recorder = Recorder(Path(job["save"]) / f"bridge_{os.environ['RANK']}.jsonl")
    finetune(build_config(job), callbacks=[recorder])
