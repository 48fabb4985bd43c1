"""What a run's settings are to Megatron-Bridge's provider of a model, and what of them is refused."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads

from megatron_psft.config.schema import Config
from megatron_psft.distributed.device import Platform
from megatron_psft.errors import UserError
from megatron_psft.model.experts import check_number_of_experts, check_stages
from megatron_psft.sources.bridge_adapters import check_adapters

_CUT = (
    *("num_attention_heads", "num_key_value_heads", "vocab_size"),
    *("linear_num_key_heads", "linear_num_value_heads", "mamba_num_heads", "n_groups"),
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def num_experts(fields: Mapping[str, Any]) -> int | None:
    """Routed experts of a layer; None for a dense model."""
    if "E" not in fields.get("hybrid_override_pattern", "E"):
        return None  # whatever the file says of experts
    return next((fields[name] for name in _EXPERTS if fields.get(name)), None)


def has_experts(fields: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer of a model that has experts at all is one of them."""
    pattern = fields.get("hybrid_override_pattern")
    return pattern[layer] == "E" if pattern else layer >= fields.get("first_k_dense_replace", 0)


def check_layout(fields: Mapping[str, Any], config: Config) -> None:
    """Raises UserError for what was not tried on models from Megatron-Bridge, and where the model cannot be cut as
    `config.parallel` asks."""
    parallel, weights = config.parallel, config.weights
    not_tried = {
        "random_init": weights.random_init or None,
        "fp8_format": config.precision.fp8_format,
        "context_parallel_size": None if parallel.context_parallel_size == 1 else parallel.context_parallel_size,
        "num_layers_per_virtual_pipeline_stage": parallel.num_layers_per_virtual_pipeline_stage,
    }
    for name, value in not_tried.items():
        if value is not None:
            raise UserError(
                f"{name} ({value}) is not supported for a {fields['model_type']} model from Megatron-Bridge; remove it"
            )
    check_adapters(fields, num_experts(fields), config.lora)
    cut = {name: ("tensor", parallel.tensor_model_parallel_size) for name in _CUT if fields.get(name)}
    cut["num_hidden_layers"] = ("pipeline", parallel.pipeline_model_parallel_size)
    for name, (kind, ranks) in cut.items():
        if fields[name] % ranks:
            raise UserError(
                f"{name} ({fields[name]}) must be a multiple of {kind}_model_parallel_size ({ranks}) for a model from "
                "Megatron-Bridge; change the latter"
            )
    if fields.get("linear_num_value_heads") and parallel.tensor_model_parallel_size > 1:
        _require_sequence_parallel(fields, config)
    _check_experts(fields, config)


def _require_sequence_parallel(fields: Mapping[str, Any], config: Config) -> None:
    """The norm in a gated delta net is one weight for the heads of all ranks, and without sequence parallelism
    Megatron-Core leaves each rank with the gradient from its own."""
    if not config.parallel.sequence_parallel:
        raise UserError(
            f"sequence_parallel (False) must be set where a {fields['model_type']} model has "
            f"tensor_model_parallel_size ({config.parallel.tensor_model_parallel_size}), as a norm's gradient would be "
            "that of one rank"
        )


def _check_experts(fields: Mapping[str, Any], config: Config) -> None:
    size, count = config.parallel.expert_tensor_size, num_experts(fields)
    check_number_of_experts(count, fields["model_type"], config)
    if count is not None and size > 1:
        raise UserError(
            f"expert_tensor_parallel_size ({size}) must be 1 for a model from Megatron-Bridge: no other was tried; "
            "change it"
        )
    if count is not None:
        check_stages(fields["num_hidden_layers"], partial(has_experts, fields), config)


def settings_of(fields: Mapping[str, Any], config: Config, platform: Platform) -> dict[str, Any]:
    """Fields of Bridge's provider by their names; it has those of its own class only."""
    parallel, recompute = config.parallel, config.recompute
    dtype = torch.bfloat16 if config.precision.bf16 else torch.float32
    is_gpu = platform.is_gpu
    return {
        **dict.fromkeys(("params_dtype", "pipeline_dtype", "autocast_dtype"), dtype),
        "bf16": config.precision.bf16,
        "fp16": False,
        "seq_length": config.data.seq_length,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "batch_p2p_comm": is_gpu,
        "deallocate_pipeline_outputs": False,
        "recompute_granularity": recompute.recompute_granularity,
        "recompute_method": recompute.recompute_method,
        "recompute_num_layers": recompute.recompute_num_layers,
        "recompute_modules": list(recompute.recompute_modules),
        # Every weight is read; a draw would be thrown away.
        "perform_initialization": False,
        "use_cpu_initialization": not is_gpu,
        # One denominator for the whole global batch; any other setting makes the gradient depend on the layout.
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": finalize_model_grads,
        # Bridge exports rows that pad the vocabulary as if they were tokens.
        "should_pad_vocab": False,
        **dict.fromkeys(("mtp_num_layers", "mtp_hybrid_override_pattern")),
        # Two passes of one policy must agree, and nothing but the objective move the policy.
        **dict.fromkeys(("hidden_dropout", "attention_dropout", "moe_aux_loss_coeff"), 0.0),
        "moe_z_loss_coeff": None,
        "moe_router_load_balancing_type": "none",
        "moe_router_bias_update_rate": 0.0,
        # A difference in rounding between two passes of one policy could choose other experts.
        "moe_router_dtype": "fp32" if num_experts(fields) else None,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": num_experts(fields) is not None,
        **_fusions(is_gpu),
    }


def _fusions(is_gpu: bool) -> dict[str, Any]:
    """The head has its own cross-entropy, and a CPU none of the others."""
    always_off = ("cross_entropy_loss_fusion", "masked_softmax_fusion", "gradient_accumulation_fusion")
    of_gpus = (
        *("apply_rope_fusion", "bias_activation_fusion", "bias_dropout_fusion", "persist_layer_norm"),
        *("moe_permute_fusion", "moe_router_fusion", "moe_shared_expert_overlap"),
    )
    found: dict[str, Any] = dict.fromkeys(always_off, False)
    return found if is_gpu else found | dict.fromkeys(of_gpus, False) | {"attention_backend": None}
