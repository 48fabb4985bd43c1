"""Products in fp8 through Transformer Engine: what they ask of the machine, the model and the rows.

The old policy is scored by the layers and in the recipe that train. What precision leaves between the two passes is
measured, see precision_noise.py.
"""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_psft.config.schema import Config, PrecisionConfig
from megatron_psft.distributed.device import Platform
from megatron_psft.errors import UserError
from megatron_psft.model.shape import ModelShape


@dataclass(frozen=True)
class _Recipe:
    multiple: int
    """Of every dimension of a product, so that a block of scaled numbers is whole."""
    capability: tuple[int, int]
    """The first GPUs that can, as compute capability."""
    engine: tuple[int, int]
    """The first version of Transformer Engine that Megatron-Core uses it with."""


_RECIPES = {
    "delayed": _Recipe(16, (8, 9), (1, 0)),  # Ada
    "tensorwise": _Recipe(16, (8, 9), (2, 2)),
    "blockwise": _Recipe(128, (9, 0), (2, 3)),  # Hopper
    "mxfp8": _Recipe(32, (10, 0), (2, 1)),  # Blackwell
}


def fp8_options(config: PrecisionConfig) -> dict[str, Any]:
    """Fields of `TransformerConfig`; none without fp8. Parameters stay in bf16, so that no pass finds stale copies."""
    if config.fp8_format is None:
        return {}
    return {"fp8": config.fp8_format, "fp8_recipe": config.fp8_recipe}


def row_multiple(config: PrecisionConfig) -> int:
    """What the tokens of a row on one rank must be a multiple of."""
    return 1 if config.fp8_format is None else _RECIPES[config.fp8_recipe].multiple


def check_machine(config: PrecisionConfig, platform: Platform) -> None:
    """Raises UserError where the machine cannot do what `config` asks for."""
    if config.fp8_format is None:
        return
    recipe, format_text = _RECIPES[config.fp8_recipe], f"fp8_format ({config.fp8_format})"
    if not platform.is_gpu:
        raise UserError(f"{format_text} needs a GPU, and there is none; remove it")
    version = platform.transformer_engine_version
    if not platform.has_transformer_engine or version is None:
        raise UserError(f"{format_text} needs Transformer Engine, which is not installed; install it, or remove it")
    if version < recipe.engine:
        raise UserError(
            f"fp8_recipe ({config.fp8_recipe}) needs Transformer Engine {_dotted(recipe.engine)} or later, and "
            f"{_dotted(version)} is installed; update it, or choose another recipe"
        )
    capability = torch.cuda.get_device_capability(platform.device)
    if capability < recipe.capability:
        raise UserError(
            f"fp8_recipe ({config.fp8_recipe}) needs a GPU of compute capability {_dotted(recipe.capability)} or "
            f"later, and {torch.cuda.get_device_name(platform.device)} has {_dotted(capability)}; choose another "
            "recipe, or leave fp8_format away"
        )


def check_dimensions(shape: ModelShape, config: Config) -> None:
    """Raises UserError where a rank's part of a matrix is no multiple of what the recipe scales at a time."""
    if config.precision.fp8_format is None:
        return
    recipe, tensor = config.precision.fp8_recipe, config.parallel.tensor_model_parallel_size
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    parts = {
        "hidden_size": shape.hidden_size,
        "head_dim * (num_attention_heads + 2 * num_query_groups)": (queries + 2 * keys) // tensor,
        "head_dim * num_attention_heads": queries // tensor,
    }
    if not all(shape.has_experts(layer) for layer in range(shape.num_layers)):
        parts["ffn_hidden_size"] = shape.ffn_hidden_size // tensor
    if shape.experts is not None:
        parts["ffn_hidden_size of an expert"] = shape.experts.ffn_hidden_size // config.parallel.expert_tensor_size
    for name, size in parts.items():
        if size % _RECIPES[recipe].multiple:
            raise UserError(
                f"{name} ({size} on each rank) must be a multiple of {_RECIPES[recipe].multiple} with fp8_recipe "
                f"{recipe}; choose other parallel sizes or another recipe, or leave fp8_format away"
            )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
