"""Fine-tunes a tiny model that sees with Megatron-Bridge: `cpu.run("tests.nemo.run_vision", ["JOB.json"])`.

The recipe is the package's own, or Bridge's turned into one, on the tiny model in place of the published one.
"""

import json
import os
from pathlib import Path
from unittest import mock

from megatron.bridge import AutoBridge
from megatron.bridge.data.sources.hf import HFDatasetSourceConfig
from megatron.bridge.recipes.qwen_vl.h100 import qwen3_vl, qwen25_vl
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

from megatron_psft.nemo import recipes
from megatron_psft.nemo.config import PsftConfigContainer
from megatron_psft.nemo.train import finetune
from tests.nemo.run_bridge import FP32, FUSIONS, Recorder


def recipe_of(job: dict) -> PsftConfigContainer:
    """As it is for two GPUs, of a size and kind for this machine."""
    load = AutoBridge.from_hf_pretrained
    for_tiny = mock.Mock(from_hf_pretrained=lambda published: load(job["model"]))
    with mock.patch.object(qwen25_vl, "AutoBridge", for_tiny), mock.patch.object(qwen3_vl, "AutoBridge", for_tiny):
        if job["family"] == "qwen2_5_vl":
            recipe = recipes.qwen25_vl_7b_psft_config()
        else:
            recipe = recipes.psft_recipe(qwen3_vl.qwen3_vl_8b_sft_2gpu_h100_bf16_config())
    for name, value in {**FP32, **dict.fromkeys(FUSIONS, False)}.items():
        if hasattr(recipe.model, name):
            setattr(recipe.model, name, value)
    recipe.model.seq_length = recipe.dataset.seq_length = 256
    recipe.model.use_cpu_initialization, recipe.model.attention_backend = True, None
    recipe.model.batch_p2p_comm = recipe.model.cross_entropy_loss_fusion = False
    recipe.model.tensor_model_parallel_size = 1
    recipe.tokenizer.vocab_size = recipe.model.vocab_size  # of the recipe's stand-in for a tokenizer
    recipe.mixed_precision, recipe.optimizer.bf16 = None, False
    recipe.dist.distributed_backend = "gloo"
    recipe.scheduler.lr_warmup_iters = 0
    recipe.validation.eval_iters = 0
    recipe.logger.tensorboard_dir = job["save"]
    recipe.dataset.source = HFDatasetSourceConfig(
        path_or_dataset=job["data"], schema_adapter="raven", load_kwargs={"cache_dir": job["save"]}
    )
    recipe.dataset.hf_processor_path = job["processor"]
    recipe.dataset.num_workers, recipe.dataset.do_validation, recipe.dataset.do_test = 0, False, False
    recipe.checkpoint.save = recipe.checkpoint.load = job["save"]
    recipe.checkpoint.save_interval, recipe.checkpoint.pretrained_checkpoint = None, job["model"]
    return process_config_with_overrides(recipe, cli_overrides=job["overrides"])


class Export(Callback):
    """Writes the model's folder from within the run, at its end."""

    def __init__(self, job: dict) -> None:
        self._job = job

    def on_train_end(self, context) -> None:
        bridge = AutoBridge.from_hf_pretrained(self._job["model"])
        bridge.save_hf_pretrained(context.model, Path(self._job["save"]) / "exported")


def main(argv: list[str]) -> None:
    job = json.loads(Path(argv[0]).read_text())
    recorder = Recorder(Path(job["save"]) / f"bridge_{os.environ['RANK']}.jsonl")
    finetune(recipe_of(job), callbacks=[recorder, Export(job)])
