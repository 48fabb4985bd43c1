"""Tiny random models of families that only Megatron-Bridge builds, as published folders are."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GptOssConfig,
    NemotronHConfig,
    OlmoeConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)
from transformers.utils import logging as transformers_logging

from tests.support import tiny

VOCAB_SIZE = 212  # Bridge pads no vocabulary: two ranks must divide it

FAMILIES = ("gemma3_text", "olmoe", "glm4_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "qwen3_5_text", "nemotron_h")

_YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_YARN |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
_SCALED = {"full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0}}
_SCALED |= {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
_NEMOTRON_EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_NEMOTRON_EXPERTS |= {"moe_shared_expert_intermediate_size": 40, "routed_scaling_factor": 1.5}

VARIANTS = {
    "gemma3_text-scaled": {"rope_parameters": _SCALED},  # as those from 4B on are
    "glm4_moe-air": {"use_qk_norm": False},
    "deepseek_v3-yarn": {"rope_parameters": _YARN},
    "nemotron_h-experts": {"hybrid_override_pattern": "ME*E", **_NEMOTRON_EXPERTS},
}
"""What published models of a family have besides, by the family and a name."""

_SHAPE = tiny.SHAPE | {"vocab_size": VOCAB_SIZE, "pad_token_id": None}
_ROPE = {"rope_type": "default", "rope_theta": 1000.0}
_GATED_DELTA_NET = {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 12}
_GATED_DELTA_NET |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}


def config_of(family: str, **changes):
    """The configuration of transformers' class; of a family or one of `VARIANTS`."""
    if family in VARIANTS:
        return config_of(family.partition("-")[0], **VARIANTS[family], **changes)
    if family == "gemma3_text":
        own = {"num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
        return Gemma3TextConfig(**{**_SHAPE, **own, **changes})
    if family == "olmoe":
        own = {"num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False}
        return OlmoeConfig(**{**_SHAPE, **own, "rope_parameters": _ROPE, **changes})
    if family == "gpt_oss":
        own = {"intermediate_size": 48, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
        return GptOssConfig(**{**_SHAPE, **own, "sliding_window": 8, **changes})
    if family == "qwen3_5_text":
        sections = {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
        own = {
            "rope_parameters": {**_ROPE, **sections},
            "head_dim": 32,
            "full_attention_interval": 2,
            **_GATED_DELTA_NET,
        }
        return Qwen3_5TextConfig(**{**_SHAPE, **own, **changes})
    if family == "qwen3_next":
        own = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
        own |= {"shared_expert_intermediate_size": 40, "head_dim": 32, "full_attention_interval": 2, **_GATED_DELTA_NET}
        own |= {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.25}}
        return Qwen3NextConfig(**{**_SHAPE, **own, **changes})
    if family == "nemotron_h":
        own = {"hybrid_override_pattern": "M-*M", "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 16}
        # transformers 5.12 is right within a chunk alone: logits at positions behind differ with its size, by 6e-3.
        own |= {"n_groups": 2, "ssm_state_size": 8, "chunk_size": 192}
        without = ("num_hidden_layers", "rms_norm_eps")  # what the class makes of others
        return NemotronHConfig(**{name: it for name, it in {**_SHAPE, **own, **changes}.items() if name not in without})
    own = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    own |= {"first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5, "topk_group": 1}
    if family == "deepseek_v3":
        own |= {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "n_group": 2}
        own |= {"qk_nope_head_dim": 16, "v_head_dim": 16, "rms_norm_eps": 1e-6, "rope_parameters": _ROPE}
        return DeepseekV3Config(**{**_SHAPE, **own, **changes})
    assert family == "glm4_moe", family
    own |= {"head_dim": 16, "use_qk_norm": True, "attention_bias": True, "n_group": 1}
    own |= {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}}
    return Glm4MoeConfig(**{**_SHAPE, **own, **changes})


_SEEDS = {"glm4_moe": 2, "nemotron_h": 1}
"""Where 0 makes a model in which rounding alone gives a token another expert, or, of nemotron_h, moves the oracle's own
gradient norm in the fourth step by 3e-4 to 8e-4."""


def build_model(folder: Path, family: str, **changes) -> Path:
    """Writes a checkpoint in fp32 whose every parameter is random, so that one that is dropped or swapped shows."""
    model = AutoModelForCausalLM.from_config(config_of(family, **changes))
    _randomize(model, _SEEDS.get(family, 0))
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    if family.startswith("nemotron_h"):
        _respell_nemotron(Path(folder))
    return Path(folder)


def build_in_bf16(folder: Path, family: str, **changes) -> Path:
    """The same in bf16, but for the biases by which routers choose, as published files have it."""
    build_model(folder, family, **changes)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: it if name.endswith("e_score_correction_bias") else it.bfloat16() for name, it in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _respell_nemotron(folder: Path) -> None:
    """transformers writes other names than published folders have, and reads these."""
    config = json.loads((folder / "config.json").read_text())
    kinds = {"mamba": "M", "mlp": "-", "attention": "*", "moe": "E"}
    pattern = "".join(kinds[kind] for kind in config.pop("layers_block_type"))
    config |= {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.replace("backbone.embedding.", "backbone.embeddings."): it for name, it in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def _randomize(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    stored = model.state_dict()
    buffers = {name: it for name, it in model.named_buffers() if name in stored}  # as the experts' biases
    for name, tensor in {**dict(model.named_parameters()), **buffers}.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("A_log"):
            tensor.copy_(0.3 * noise - 2)  # a memory of tens of tokens, which would show in the next record of a row
        elif name.endswith(("norm.weight", "norm_f.weight")):
            is_centred = not tensor.any()  # Gemma's, stored with one taken off
            tensor.copy_((0 if is_centred else 1) + 0.2 * noise)
        elif tensor.dim() == 1:
            tensor.copy_(0.2 * noise)
        else:
            gain = 1.6 if "embed" in name or "lm_head" in name else 1.0
            tensor.copy_(gain / math.sqrt(tensor.shape[-1]) * noise)
