"""Configurations of Hugging Face models, and the shapes read from them."""

from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_psft.model.shape import ModelShape, shape_from_config

CLASSES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "mistral": MistralConfig,
    "mixtral": MixtralConfig,
}
FAMILIES = tuple(CLASSES)
SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 40,
    "intermediate_size": 24,
    "num_attention_heads": 5,
    "vocab_size": 17,
}


def make_config(model_type: str = "llama", **changes: object) -> dict:
    return {"model_type": model_type, **SMALL, **changes}


def read(**changes: object) -> ModelShape:
    return shape_from_config(make_config(**changes), "here")
