"""Model families: what a `model_type` of transformers says beyond its `config.json`, and what it calls its tensors.

The one place that knows a family by its name. All are the same decoder (RMSNorm, RoPE, grouped-query attention, SwiGLU;
`transformer_config` has it), and differ in what a `Family` says. A new one of that kind is an entry here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Names:
    """Of the tensors in a checkpoint, without `.weight` or `.bias`; `{}` is the number of a layer or of an expert."""

    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{}"
    """In front of all that follow."""
    attention_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    attention_output: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert_gate: str = "mlp.experts.{}.gate_proj"
    expert_up: str = "mlp.experts.{}.up_proj"
    expert_down: str = "mlp.experts.{}.down_proj"


@dataclass(frozen=True, kw_only=True)
class ExpertFields:
    """How a family's `config.json` speaks of experts."""

    count: str
    """Field of their number."""
    ffn_hidden_size: str
    """Field of an expert's inner size."""
    normalizes: bool | None
    """Whether the weights of a token's experts add up to 1; None where `norm_topk_prob` says, which defaults to no."""


@dataclass(frozen=True, kw_only=True)
class VisionTower:
    """Of a family whose models see: what of them is no language model. It is not trained, and passes through."""

    module: str
    """Its class, in transformers' module of the family."""
    prefix: str = "model.visual."
    """Of its tensors, by the names of transformers' modules."""
    published: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of tensors' names to how published files spell them, where they do it otherwise; either is read."""
    has_flat_config: bool = False
    """Whether a `config.json` without `text_config` has the language model's fields itself."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the models of one `model_type` have in common."""

    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have a bias. No other linear layer may have one."""
    qk_norm: bool = False
    """Whether the queries and keys of each head go through an RMSNorm."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes where the `config.json` lacks a field, for fields in which its classes differ."""
    experts: ExpertFields | None = None
    """None where every layer has a plain MLP."""
    only_supported: Mapping[str, Any] = field(default_factory=dict)
    """Fields that change the maths, with the only value that is computed, as in `ONLY_SUPPORTED`; of both, this one
    counts."""
    has_sliding_window: bool = False
    """Whether every layer has the window that `sliding_window` says. Of other families, transformers reads that field
    only where `use_sliding_window` is true."""
    vision: VisionTower | None = None
    """None for models of text."""
    names: Names = field(default_factory=Names)


_LANGUAGE_MODEL = Names(
    embedding="model.language_model.embed_tokens",
    final_norm="model.language_model.norm",
    layer="model.language_model.layers.{}",
)
"""Beside a vision tower."""

# Fields that change the maths in several families, with the only value that is computed. Fields that transformers' own
# classes do not read cannot change the maths, so they are not listed.
ONLY_SUPPORTED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "is_causal": True,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "qwen2": Family(qkv_bias=True, defaults={"num_key_value_heads": 32}),
    "qwen3": Family(qk_norm=True, defaults={"num_key_value_heads": 32, "head_dim": 128}),
    "qwen3_moe": Family(
        qk_norm=True,
        defaults={
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        experts=ExpertFields(count="num_experts", ffn_hidden_size="moe_intermediate_size", normalizes=None),
    ),
    "qwen2_5_vl": Family(
        qkv_bias=True,
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        vision=VisionTower(
            module="Qwen2_5_VisionTransformerPretrainedModel",
            published={"model.visual.": "visual.", "model.language_model.": "model."},
            has_flat_config=True,
        ),
        names=_LANGUAGE_MODEL,
    ),
    "qwen3_vl": Family(
        qk_norm=True,
        defaults={"num_key_value_heads": 32, "head_dim": 128, "rope_theta": 5e5},
        vision=VisionTower(module="Qwen3VLVisionModel"),
        names=_LANGUAGE_MODEL,
    ),
    "mistral": Family(has_sliding_window=True, defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "mixtral": Family(
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 14336,
        },
        experts=ExpertFields(count="num_local_experts", ffn_hidden_size="intermediate_size", normalizes=True),
        only_supported={"sliding_window": None, "router_jitter_noise": 0.0},
        names=Names(
            router="block_sparse_moe.gate",
            expert_gate="block_sparse_moe.experts.{}.w1",
            expert_up="block_sparse_moe.experts.{}.w3",
            expert_down="block_sparse_moe.experts.{}.w2",
        ),
    ),
}
