"""What of a configuration Megatron-Bridge would take wrongly is refused by its name, before Bridge is imported."""

import re

import pytest

from megatron_psft.errors import UserError
from megatron_psft.sources.bridge_rules import FAMILIES, check_config, is_passed_on

SIZES = {"num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 100}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192
PATTERN = ["sliding_attention"] * 5 + ["full_attention"]
SCALED = {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "linear", "factor": 8.0}}
YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 32.0}}
MIXED = {"hybrid_override_pattern": "M-M*-M"}

TAKEN = [
    ("llama", {"rope_scaling": LLAMA3}),
    ("llama", {"rope_scaling": None, "attention_bias": False}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
    ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("gemma3_text", {"layer_types": PATTERN, "rope_parameters": SCALED}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("olmoe", {"clip_qkv": None}),
    ("glm4_moe", {"n_group": 1, "attention_bias": True}),
    ("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": True}),
    ("mistral", {"sliding_window": 8}),
    ("deepseek_v3", {"q_lora_rank": 32, "rope_scaling": {"type": "yarn", "factor": 40}}),
    ("gpt_oss", {**YARN, "layer_types": ["sliding_attention", "full_attention"] * 3}),
    ("qwen3_next", {"mlp_only_layers": [], "partial_rotary_factor": 0.25, "rope_scaling": None}),
    ("nemotron_h", {**MIXED, "time_step_limit": [0.0, float("inf")], "rms_norm_eps": 1e-5}),
]
TRAPS = [
    ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": 2.0}}, "low_freq_factor (2.0)"),
    (
        "llama",
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
        "original_max_position_embeddings (64)",
    ),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type (yarn)"),
    ("llama", {"attention_bias": True}, "attention_bias (True)"),
    ("llama", {"mlp_bias": True}, "mlp_bias (True)"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window (True)"),
    ("qwen2", {"quantization_config": {"quant_method": "awq"}}, "quantization_config ({'quant_method': 'awq'})"),
    ("qwen2", {"attention_dropout": 0.1}, "attention_dropout (0.1)"),
    ("qwen3", {"attention_bias": True}, "attention_bias (True)"),
    ("qwen3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type (yarn)"),
    ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"] * 3}, "layer_types other than five"),
    (
        "gemma3_text",
        {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
        "rope_type (yarn) of full_attention",
    ),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping (30.0)"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv (8.0)"),
    ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob (True)"),
    ("glm4_moe", {"n_group": 2}, "n_group (2)"),
    ("qwen2", {"vocab_size": None}, "vocab_size (None)"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers ([1])"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step (2)"),
    ("mistral", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type (yarn)"),
    ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps (1e-05)"),
    ("deepseek_v3", {"q_lora_rank": None}, "q_lora_rank (None)"),
    ("gpt_oss", {"rope_scaling": None}, "rope_type (default)"),
    ("gpt_oss", {**YARN, "layer_types": ["full_attention"] * 6}, "layer_types other than sliding_attention"),
    ("gpt_oss", {**YARN, "hidden_size": 64, "intermediate_size": 32}, "hidden_size (64) of twice the"),
    ("qwen3_next", {"mlp_only_layers": [0]}, "mlp_only_layers ([0])"),
    ("qwen3_next", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type (yarn)"),
    ("qwen3_5_text", {"attention_bias": True}, "attention_bias (True)"),
    ("nemotron_h", {**MIXED, "layer_norm_epsilon": 1e-6}, "layer_norm_epsilon (1e-06)"),
    ("nemotron_h", {**MIXED, "mlp_hidden_act": "silu"}, "mlp_hidden_act (silu)"),
    ("nemotron_h", {**MIXED, "conv_kernel": 3}, "conv_kernel (3)"),
    ("nemotron_h", {"hybrid_override_pattern": "MG*M-M"}, "hybrid_override_pattern (MG*M-M) is not supported"),
    (
        "nemotron_h",
        {"layers_block_type": ["mamba"] * 6},
        "hybrid_override_pattern is missing; a folder that transformers 5",
    ),
    ("nemotron_h", {"hybrid_override_pattern": "M*"}, "hybrid_override_pattern (M*) must have a character"),
    ("gemma2", {}, "model_type (gemma2)"),
    (None, {}, "model_type (None)"),
]


@pytest.mark.parametrize(("family", "fields"), TAKEN)
def test_what_was_compared_is_taken(family, fields):
    assert check_config({"model_type": family, **SIZES, **fields}, "config.json") is None


@pytest.mark.parametrize(("family", "fields", "named"), TRAPS)
def test_a_trap_is_refused_by_name(family, fields, named):
    with pytest.raises(UserError, match=f"config.json: {re.escape(named)}"):
        check_config({"model_type": family, **SIZES, **fields}, "config.json")


def test_each_family_has_a_trap():
    assert {family for family, *_ in TRAPS} >= FAMILIES.keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.5.mlp.gate.weight", False),
        ("model.layers.6.eh_proj.weight", True),
        ("model.norm.weight", False),
        ("mtp.layers.0.input_layernorm.weight", True),
        ("other.layers.9.weight", False),
    ],
)
def test_layers_behind_the_models_own_pass_through(name, expected):
    assert is_passed_on(name, SIZES) is expected
