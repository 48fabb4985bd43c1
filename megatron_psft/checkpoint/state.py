"""What a checkpoint holds of a run, as sharded tensors, and how a run in any layout is filled from it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

from megatron_psft import sealed
from megatron_psft.checkpoint import unpickle
from megatron_psft.checkpoint.optimizer_state import load_optimizer_state, sharded_optimizer_state
from megatron_psft.checkpoint.replicas import load_by_turns
from megatron_psft.checkpoint.window import sharded_window, window_state
from megatron_psft.data.loader import BatchLoader
from megatron_psft.distributed.grid import Parallel
from megatron_psft.errors import UserError
from megatron_psft.metrics.clipped_tokens import ClippedTokens
from megatron_psft.model.parameters import is_adapter
from megatron_psft.scoring.old_policy import OldPolicyWindow

log = logging.getLogger(__name__)

# The distributed optimizer's one format that any tensor, pipeline and data-parallel size can read.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything of a run that changes while it trains. The position in the data is the step: batches are a function of
    it."""

    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    window: OldPolicyWindow
    clipped_tokens: ClippedTokens | None = None
    """Where the run counts them."""


def load_checkpoint(checkpoint: Path, state: TrainState, loader: BatchLoader, parallel: Parallel) -> float:
    """Fills `state` from a step folder, and returns the learning rate that the next step would have had by the schedule
    of the run that wrote it; collective."""
    common = unpickle.load_common(checkpoint)
    others: dict[str, Any] = {}
    steps: list[int] = common["window_steps"]
    if parallel.is_last_stage:
        others["old_log_probs"] = sharded_window(steps, loader, parallel)
    is_same_layout = sealed.read_content(checkpoint)["layout"] == _layout(parallel)
    if is_same_layout:
        others["rng"] = _sharded_rng(parallel)
    content = _sharded_state(state, is_loading=True)
    loaded = load_by_turns(content, parallel, partial(unpickle.load, checkpoint), others=others)
    load_optimizer_state(state.optimizer, loaded["optimizer"])
    planned_lr: float = state.optimizer.param_groups[0]["lr"]
    for name, chunk in _named_chunks(state.chunks).items():
        _fill(chunk, loaded[name], checkpoint)
    state.scheduler.load_state_dict(common["scheduler"])
    if state.clipped_tokens is not None and "clipped_tokens" in common:  # else counting starts with this run
        state.clipped_tokens.load_state(common["clipped_tokens"])
    packs = loaded["old_log_probs"] if parallel.is_last_stage else None
    # A checkpoint of release 0.2 or earlier does not say where the window began.
    state.window.load_state(window_state(steps, packs, loader, parallel), start=common.get("window_start"))
    if is_same_layout:  # the generators of other ranks would mean nothing; nothing that trains draws from them today
        _set_rng(loaded["rng"], parallel.device)
    return planned_lr


def load_weights(checkpoint: Path, chunks: Sequence[DistributedDataParallel], parallel: Parallel) -> None:
    """Fills a model, without its adapters, from any checkpoint's weights, whatever layout and precision these were
    saved in; collective."""
    models = _named_chunks(chunks)
    content = {name: _base_weights(model) for name, model in models.items()}
    loaded = load_by_turns(content, parallel, partial(unpickle.load, checkpoint))
    log.info("weights from %s", checkpoint)
    for name, model in models.items():
        _fill(model, loaded[name], checkpoint)


def _fill(model: MegatronModule, loaded: Mapping[str, Any], checkpoint: Path) -> None:
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    # With adapters, these or the rest of the model are loaded, and the other part is from elsewhere.
    of_adapters = any(map(is_adapter, loaded))
    wanted = [key for key in missing if is_adapter(key) == of_adapters]
    other = [*unexpected, *(key for key in wanted if not key.endswith("_extra_state"))]
    if other:
        raise UserError(
            f"{checkpoint} must hold the weights of this model, and differs from it in {', '.join(other[:3])} "
            f"({len(other)} in all); use the config.json that it was trained with"
        )


def sharded_weights(model: MegatronModule) -> dict[str, ShardedBase]:
    """The parameters of a model chunk as a checkpoint has them, by their names in the chunk.

    Modules' extra state is not among them: only FP8 has any, and which modules do depends on their implementation.
    """
    state = model.sharded_state_dict(metadata=dict(_METADATA))
    return {name: value for name, value in state.items() if not isinstance(value, ShardedObject)}


def _named_chunks(chunks: Sequence[DistributedDataParallel]) -> dict[str, MegatronModule]:
    """Model chunks under the names that Megatron-Core's optimizers expect."""
    models = unwrap_model(list(chunks))
    return {"model": models[0]} if len(models) == 1 else {f"model{i}": model for i, model in enumerate(models)}


def _sharded_state(state: TrainState, *, is_loading: bool) -> dict[str, Any]:
    models = {name: _sharded_module(model) for name, model in _named_chunks(state.chunks).items()}
    own = models["model"] if len(models) == 1 else models
    optimizer = sharded_optimizer_state(state.optimizer, own, is_loading=is_loading, metadata=dict(_METADATA))
    return {**models, "optimizer": optimizer}


def _sharded_module(model: MegatronModule) -> dict[str, ShardedBase]:
    """Its parameters, of which adapters where there are any, and in fp8 the scales that modules keep."""
    state = model.sharded_state_dict(metadata=dict(_METADATA)) if model.config.fp8 else sharded_weights(model)
    if not any(map(is_adapter, state)):
        return state
    return {name: value for name, value in state.items() if is_adapter(name) or isinstance(value, ShardedObject)}


def _base_weights(model: MegatronModule) -> dict[str, ShardedBase]:
    """Its parameters without adapters."""
    return {name: value for name, value in sharded_weights(model).items() if not is_adapter(name)}


def _layout(parallel: Parallel) -> dict[str, int]:
    """Which rank does what."""
    names = ("tensor_size", "pipeline_size", "virtual_size", "context_size", "data_size")
    return {name: getattr(parallel, name) for name in names}


def _sharded_rng(parallel: Parallel) -> ShardedObject:
    """The states of this rank's random generators."""
    is_gpu = parallel.device.type == "cuda"
    states = {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(parallel.device) if is_gpu else torch.get_rng_state(),
        "tensor_parallel": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("rng", states, (parallel.world_size,), (parallel.rank,))


def _set_rng(states: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tensor_parallel"])
