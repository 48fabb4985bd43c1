"""The recipes, and their plans without the models' folders."""

import re
from functools import cache
from pathlib import Path

import torch

from megatron_psft.config.schema import parse_config
from megatron_psft.diagnostics.plan import Plan
from megatron_psft.distributed.device import Platform
from megatron_psft.model.shape import shape_from_config
from tests.support.cli import REPOSITORY

RECIPES = sorted((REPOSITORY / "examples" / "recipes").glob("*.yaml"))

_DENSE = {"hidden_act": "silu", "tie_word_embeddings": False}
SHAPES = {
    "Qwen/Qwen2.5-7B-Instruct": {
        **_DENSE,
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        **_DENSE,
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "Qwen/Qwen3-4B-Base": {
        **_DENSE,
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-30B-A3B": {
        **_DENSE,
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}
"""What the models' config.json say of their sizes."""


def ranks_of(name: str) -> int:
    """A recipe's name says its GPUs; the paper's runs include a recipe for 8."""
    match = re.search(r"-(\d+)xh100\.yaml$", name)
    return int(match[1]) if match else 8 if name.startswith("examples/paper/") else 1


@cache
def plan_of(path: Path) -> Plan:
    """Of a recipe, on the GPUs of its name."""
    config = parse_config(["--data", "train.jsonl", "--save", "run", "--config", str(path)])
    return Plan(
        config=config,
        shape=shape_from_config(SHAPES[config.weights.load_hf], config.weights.load_hf),
        world_size=ranks_of(path.name),
        platform=Platform(device=torch.device("cuda"), backend="nccl", has_transformer_engine=True),
    )
