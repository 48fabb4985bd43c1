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
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig

from megatron_psft.model.shape import ModelShape, shape_from_config

CLASSES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "mistral": MistralConfig,
    "qwen2_5_vl": Qwen2_5_VLTextConfig,
    "qwen3_vl": Qwen3VLTextConfig,
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
    fields = {"model_type": model_type, **SMALL, **changes}
    if not model_type or not str(model_type).endswith("_vl"):
        return fields
    heads = fields["hidden_size"] // fields["num_attention_heads"]
    width = fields.get("head_dim", 128 if model_type == "qwen3_vl" else heads)
    sections = {"rope_parameters": {"mrope_section": [width // 2 - 2, 1, 1]}}
    return {"model_type": model_type, "text_config": {**sections, **fields, "model_type": f"{model_type}_text"}}


def read(**changes: object) -> ModelShape:
    return shape_from_config(make_config(**changes), "here")
