"""Builds the chunks of a model, whatever they come from: ending in our head, on the device, for data parallelism."""

from typing import Protocol

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_psft.config.schema import Config
from megatron_psft.distributed.device import Platform
from megatron_psft.distributed.grid import Parallel
from megatron_psft.model.end import attach


class ChunkSource(Protocol):
    """What the chunks of a model are built by."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, without padding."""
        ...

    def transformer_config(self, config: Config, platform: Platform) -> TransformerConfig:
        """Megatron-Core's configuration of the model, its layout and its precision."""
        ...

    def build_chunk(
        self, config: Config, megatron_config: TransformerConfig, platform: Platform, parallel: Parallel, index: int
    ) -> MegatronModule:
        """One of this rank's model chunks, without data parallelism; its weights are still to be filled."""
        ...


def build_model(
    source: ChunkSource, config: Config, platform: Platform, parallel: Parallel
) -> list[DistributedDataParallel]:
    """Returns this rank's model chunks, one without interleaving; their weights are still to be filled."""
    megatron_config = source.transformer_config(config, platform)
    built: list[DistributedDataParallel] = []
    for index in range(parallel.virtual_size):
        model: torch.nn.Module = source.build_chunk(config, megatron_config, platform, parallel, index)
        attach(model, vocab_size=source.vocab_size, fused=config.objective.fused_head)
        model.to(platform.device)
        if config.precision.bf16:
            model = Float16Module(megatron_config, model)
        built.append(
            DistributedDataParallel(
                megatron_config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    average_in_collective=False,
                    use_distributed_optimizer=config.parallel.use_distributed_optimizer,
                    overlap_grad_reduce=config.parallel.overlap_grad_reduce,
                    overlap_param_gather=config.parallel.overlap_param_gather,
                ),
                model,
                # Only the chunk that is needed first is worth cutting into buckets; see Megatron-LM's get_model.
                disable_bucketing=index > 0,
            )
        )
    if config.parallel.overlap_grad_reduce:
        # The schedules hold the reduction back until the last micro-batch.
        syncs = [chunk.no_sync for chunk in built]
        megatron_config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    return built


def fuse_weight_gradients(model: torch.nn.Module) -> None:
    """Has Transformer Engine's products add to `main_grad` themselves, without a gradient in bf16 and a pass over it.

    Module by module, as Megatron-Core's own flag asks the same of its output layer, which needs Apex for it; there our
    head does so.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            setattr(module, "fuse_wgrad_accumulation", True)  # noqa: B010 (no attribute of every Module)


def mark_sharded_weights(model: torch.nn.Module) -> None:
    """Says which weights are cut over the tensor-parallel group, so that the gradient norm counts every shard.

    Megatron-Core does it along with its own draw of the weights, which is switched off here.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding, RowParallelLinear)):
            weight, dimension = module.weight, int(isinstance(module, RowParallelLinear))
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dimension, stride=1)
