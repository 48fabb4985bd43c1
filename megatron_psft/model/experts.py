"""Mixture-of-experts layers: their part of Megatron-Core's configuration, and what they ask of a layout."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

from megatron_psft.config.schema import Config
from megatron_psft.distributed.device import Platform
from megatron_psft.errors import UserError
from megatron_psft.model.parameters import is_expert
from megatron_psft.model.shape import ModelShape


def expert_options(shape: ModelShape, config: Config, platform: Platform) -> dict[str, Any]:
    """Fields of `TransformerConfig`; none for a model without experts.

    Nothing is dropped and nothing balances the load, so that padding, which no label sees, has no effect through the
    router either. A balancing loss would be no part of the objective: it moves the policy away from the old one where
    no ratio measures it and no clip stops it.
    """
    experts = shape.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_layer_freq": [int(shape.has_experts(layer)) for layer in range(shape.num_layers)],
        "moe_router_topk": experts.per_token,
        # Softmax over the chosen experts alone gives the weights that softmax over all gives once they are scaled to 1.
        "moe_router_pre_softmax": not experts.normalizes,
        "moe_router_load_balancing_type": "none",
        # A difference in rounding between two passes of one policy could choose other experts.
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": _dispatcher(config, platform),
        "moe_grouped_gemm": platform.has_transformer_engine,
        # Also for the ratio: PyTorch's way adds up the experts of a token in no fixed order on a GPU.
        "moe_permute_fusion": platform.has_transformer_engine,
        "expert_model_parallel_size": config.parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": config.parallel.expert_tensor_size,
    }


def _dispatcher(config: Config, platform: Platform) -> str:
    """Each token to the ranks of its experts; but where ranks share an expert, gloo cannot collect from them different
    numbers of tokens: there all ranks get all."""
    return "alltoall" if platform.is_gpu or config.parallel.expert_tensor_size == 1 else "allgather"


def check_expert_layout(shape: ModelShape, config: Config) -> None:
    """Raises UserError where the experts cannot be spread as `config.parallel` asks."""
    parallel, experts = config.parallel, shape.experts
    check_number_of_experts(None if experts is None else experts.count, shape.model_type, config)
    if experts is None:
        return
    if experts.ffn_hidden_size % parallel.expert_tensor_size:
        raise UserError(
            f"the ffn_hidden_size of an expert ({experts.ffn_hidden_size}) must be a multiple of "
            f"expert_tensor_parallel_size ({parallel.expert_tensor_size}); change the latter"
        )
    check_stages(shape.num_layers, shape.has_experts, config)


def check_number_of_experts(count: int | None, model_type: str, config: Config) -> None:
    """Raises UserError where a model of `model_type` with so many experts, or without any, cannot be laid out as
    `config.parallel` asks, whatever else it is like."""
    parallel = config.parallel
    if count is None:
        for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            if getattr(parallel, name) != getattr(type(parallel), name):
                raise UserError(
                    f"{name} ({getattr(parallel, name)}) has no effect, as a {model_type} model has no experts; "
                    "remove it"
                )
        return
    if count % parallel.expert_model_parallel_size:
        raise UserError(
            f"the number of experts ({count}) must be a multiple of expert_model_parallel_size "
            f"({parallel.expert_model_parallel_size}); change the latter"
        )
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise UserError(
            f"sequence_parallel (False) must be set where a model with experts has tensor_model_parallel_size "
            f"({parallel.tensor_model_parallel_size}), as Megatron-Core trains no other way"
        )


def check_stages(num_layers: int, has_experts: Callable[[int], bool], config: Config) -> None:
    """Raises UserError where a pipeline stage has no layer with experts. Each rank keeps an optimizer for its own,
    whose step Megatron-Core saves with those of rank 0: without any there, no run could go on from the checkpoint."""
    stages = config.parallel.pipeline_model_parallel_size
    per_chunk = config.parallel.num_layers_per_virtual_pipeline_stage or num_layers // stages
    for stage in range(stages):
        layers = [layer for layer in range(num_layers) if layer // per_chunk % stages == stage]
        if not any(map(has_experts, layers)):
            raise UserError(
                f"pipeline_model_parallel_size ({stages}) must leave each stage a layer with experts, and stage "
                f"{stage} has none; lower it"
            )


def mark_experts(model: torch.nn.Module) -> None:
    """Has Megatron-Core keep the experts' gradients and optimizer apart in every layout, and count all of them in the
    gradient norm.

    It does the former by itself only with expert parallelism. Here checkpoints move between layouts with and without
    it, and without it experts may still be replicated over other ranks than the rest of the model. For the latter
    Transformer Engine's layer is to say what is cut, which that of release 2.20 leaves out: of tensor-parallel ranks
    with experts of their own the first alone would count.
    """
    for name, parameter in model.named_parameters():
        if is_expert(name):
            setattr(parameter, "allreduce", False)  # noqa: B010 (no attribute of a Parameter)
            if not hasattr(parameter, "tensor_model_parallel"):
                dimension = int("linear_fc2" in name)
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dimension, stride=1)
