"""Parameters by their names in the whole model, and which ranks hold them. The one place that walks them."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megatron_psft.distributed.grid import Parallel


def is_expert(parameter: str) -> bool:
    """Whether a parameter is an expert's, and so is cut and spread as experts are."""
    return ".mlp.experts." in parameter


def is_adapter(parameter: str) -> bool:
    """Whether a parameter is an adapter's, beside a weight that is not trained."""
    return ".adapter." in parameter


def is_cut(parameter: str) -> bool:
    """Whether tensor parallelism splits a parameter; norms and routers every rank holds whole."""
    return "norm" not in parameter and not parameter.endswith("mlp.router.weight")


# One MLP for each expert of this rank, or all in one module of Transformer Engine's.
_LOCAL_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<one>\d+)\.)?(?P<linear>linear_fc[12])\.weight(?P<of_all>\d*)"
)


def named_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters under their names in the whole model."""
    for chunk in unwrap_model(list(chunks)):
        for name, parameter in chunk.named_parameters():
            yield whole_name(name, chunk), parameter


def own_parameters(chunks: Sequence[torch.nn.Module], parallel: Parallel) -> dict[str, torch.nn.Parameter]:
    """Those of `named_parameters` that this rank speaks for, where all ranks together speak once for each part of the
    model: what is written or counted."""
    return {name: value for name, value in named_parameters(chunks) if is_first_replica(name, parallel)}


def whole_name(name: str, chunk: torch.nn.Module) -> str:
    """What the whole model calls a parameter of a chunk: layers are counted from 0 over all pipeline stages, and
    experts over all expert-parallel ranks, as in `decoder.layers.3.mlp.experts.17.linear_fc1.weight`."""
    if not name.startswith("decoder.layers."):
        return name
    _, _, index, suffix = name.split(".", 3)
    layer: Any = chunk.decoder.layers[int(index)]  # type: ignore[index, union-attr]
    expert = _LOCAL_EXPERT.fullmatch(suffix)
    if expert is not None:
        number = layer.mlp.local_expert_indices[int(expert["one"] or expert["of_all"])]
        suffix = f"mlp.experts.{number}.{expert['linear']}.weight"
    return f"decoder.layers.{layer.layer_number - 1}.{suffix}"


def shard_place(parameter: str, parallel: Parallel) -> tuple[int, int]:
    """This rank's tensor-parallel rank and size in cutting `parameter`."""
    if is_expert(parameter):
        return parallel.expert_tensor_rank, parallel.expert_tensor_size
    return parallel.tensor_rank, parallel.tensor_size


def is_first_replica(parameter: str, parallel: Parallel) -> bool:
    """Whether this rank is in data-parallel replica 0 of `parameter`, which is another set of ranks for experts."""
    if is_expert(parameter):
        return parallel.expert_data_rank == 0
    return parallel.data_rank == parallel.context_rank == 0
