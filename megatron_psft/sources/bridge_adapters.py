"""Adapters beside models from Megatron-Bridge, of families whose linear layers are those of this package's own."""

from collections.abc import Mapping
from typing import Any

from megatron_psft.config.lora import LoraConfig
from megatron_psft.errors import UserError
from megatron_psft.model.adapters import targeted
from megatron_psft.model.families import Family
from megatron_psft.model.shape import ExpertShape, ModelShape

_COMPARED = ("gemma3_text", "glm4_moe", "gpt_oss", "olmoe")


class _Sizes(ModelShape):
    """What adapters depend on: the sizes of linear layers, and their names, which are everybody's."""

    @property
    def family(self) -> Family:
        return Family()


def adapter_shape(fields: Mapping[str, Any], count: int | None) -> ModelShape:
    """Of the model of a `config.json` with `count` experts in a layer; the fields of a shape that no adapter depends on
    are those of no model."""
    heads = fields["num_attention_heads"]
    inner = fields["intermediate_size"]
    experts = None
    if count is not None:
        experts = ExpertShape(count=count, per_token=1, ffn_hidden_size=inner, normalizes=False, dense_layers=())
    return _Sizes(
        model_type=fields["model_type"],
        num_layers=fields["num_hidden_layers"],
        hidden_size=fields["hidden_size"],
        ffn_hidden_size=inner,
        num_attention_heads=heads,
        num_query_groups=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        vocab_size=fields["vocab_size"],
        norm_eps=0.0,
        rope_theta=0.0,
        rope_scaling=None,
        qkv_bias=False,
        qk_norm=True,
        tied_embeddings=False,
        initializer_range=0.0,
        dtype="float32",
        experts=experts,
    )


def check_adapters(fields: Mapping[str, Any], count: int | None, lora: LoraConfig) -> None:
    """Raises UserError for adapters that were not compared, or that the model has no place for."""
    if not lora.has_adapters:
        return
    if fields["model_type"] not in _COMPARED:
        raise UserError(
            f"lora_rank ({lora.lora_rank}) is not supported for a {fields['model_type']} model from Megatron-Bridge; "
            f"those that were compared are {', '.join(_COMPARED)}"
        )
    if lora.lora_merge:
        raise UserError(
            f"lora_merge (True) is not supported for a {fields['model_type']} model from Megatron-Bridge; export the "
            "adapter, and merge it with peft"
        )
    targeted(lora, adapter_shape(fields, count))
