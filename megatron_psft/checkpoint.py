"""Saves and resumes a run through Megatron-Core's distributed checkpoints, in the same or another parallel layout."""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_psft.data.loader import BatchLoader
from megatron_psft.errors import UserError
from megatron_psft.old_policy import OldPolicyWindow
from megatron_psft.optimizer import load_optimizer_state
from megatron_psft.parallel import Parallel

VERSION = 1
# Written last: a folder without it is no checkpoint.
MARKER = "complete.json"
_STEP_FOLDER = re.compile(r"step_\d+")  # and no copy that somebody keeps beside, such as step_0000012_good

# The distributed optimizer's one format that any tensor, pipeline and data-parallel size can read.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

Identity = Mapping[str, Any]
"""What a run must share with the checkpoint it resumes from, field by field; JSON values."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything of a run that changes while it trains. The position in the data is the step: batches are a function of
    it."""

    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    window: OldPolicyWindow


def step_folder(folder: Path, step: int) -> Path:
    """`step` counts completed optimizer steps."""
    return folder / f"step_{step:07d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete step folders of a run, oldest first."""
    found = (path.parent for path in folder.glob(f"step_*/{MARKER}"))
    return sorted((path for path in found if _STEP_FOLDER.fullmatch(path.name)), key=_step_of)


def find_checkpoint(save: Path, load: Path | None) -> Path | None:
    """The step folder to resume from: the newest complete one of `save`, else of `load`, else `load` itself.

    Raises:
        UserError: `load` is given, needed, and holds no complete checkpoint.
    """
    saved = complete_checkpoints(save)
    if saved or load is None:
        return saved[-1] if saved else None
    if (load / MARKER).is_file():
        return load
    loaded = complete_checkpoints(load)
    if not loaded:
        raise UserError(f"load ({load}) must be a complete step folder or a run folder that holds one; check the path")
    return loaded[-1]


def read_step(checkpoint: Path, identity: Identity) -> int:
    """Returns the completed steps of a checkpoint.

    Raises:
        UserError: it was written by another version, or by a run that differs in a field of `identity`; names the
        field.
    """
    marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    if marker["version"] != VERSION:
        raise UserError(f"{checkpoint}: version ({marker['version']}) must be {VERSION}; use the release that wrote it")
    for field, wanted in identity.items():
        found = marker["identity"].get(field)
        if found != wanted:
            raise UserError(
                f"{checkpoint}: the run that wrote it had {field} ({found}), this one has ({wanted}); "
                "use its settings, or another save folder to start anew"
            )
    return marker["step"]


def save_checkpoint(
    folder: Path,
    step: int,
    state: TrainState,
    identity: Identity,
    loader: BatchLoader,
    parallel: Parallel,
    keep_last: int | None,
) -> Path:
    """Writes the step folder and removes what `keep_last` makes superfluous; collective."""
    target = step_folder(folder, step)
    if parallel.is_main:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    dist.barrier()
    tensors = _sharded_state(state, is_loading=False)
    tensors["old_log_probs"] = {
        str(later): _sharded_old_log_probs(later, _whole_packs(loader.to_packs(later, old), parallel), loader, parallel)
        for later, old in state.window.stored.items()
        if old
    }
    common = {"scheduler": state.scheduler.state_dict(), "window_steps": sorted(state.window.stored)}
    dist_checkpointing.save({**tensors, **common}, str(target), content_metadata=dict(_METADATA))
    dist.barrier()
    if parallel.is_main:
        _write_marker(target, {"version": VERSION, "step": step, "identity": dict(identity)})
        _remove_older(folder, keep_last)
    dist.barrier()
    return target


def load_checkpoint(checkpoint: Path, state: TrainState, loader: BatchLoader, parallel: Parallel) -> None:
    """Fills `state` from a step folder; collective."""
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    tensors = _sharded_state(state, is_loading=True)
    steps: list[int] = common["window_steps"]
    if parallel.is_last_stage:
        tensors["old_log_probs"] = {str(step): _sharded_old_log_probs(step, None, loader, parallel) for step in steps}
    loaded = dist_checkpointing.load(tensors, str(checkpoint))
    for name, chunk in _named_chunks(state.chunks).items():
        chunk.load_state_dict(loaded[name])
    load_optimizer_state(state.optimizer, loaded["optimizer"])
    state.scheduler.load_state_dict(common["scheduler"])
    for step in steps:
        saved = loaded["old_log_probs"][str(step)] if parallel.is_last_stage else None
        state.window.stored[step] = [] if saved is None else loader.from_packs(step, saved)


def _named_chunks(chunks: Sequence[DistributedDataParallel]) -> dict[str, GPTModel]:
    """Model chunks under the names that Megatron-Core's optimizers expect."""
    models = unwrap_model(list(chunks))
    return {"model": models[0]} if len(models) == 1 else {f"model{i}": model for i, model in enumerate(models)}


def _sharded_state(state: TrainState, *, is_loading: bool) -> dict[str, Any]:
    models = {
        name: model.sharded_state_dict(metadata=dict(_METADATA)) for name, model in _named_chunks(state.chunks).items()
    }
    own = models["model"] if len(models) == 1 else models
    optimizer = state.optimizer.sharded_state_dict(own, is_loading=is_loading, metadata=dict(_METADATA))
    return {**models, "optimizer": optimizer}


def _sharded_old_log_probs(step: int, rows: Tensor | None, loader: BatchLoader, parallel: Parallel) -> ShardedTensor:
    """The old log-probabilities of one global batch as a checkpoint tensor `[global batch, longest pack]`, this
    replica's packs of it.

    It holds no padding that a layout may add, and each pack whole, so that any layout can read it.
    """
    data = torch.zeros(loader.packs_per_rank, loader.unpadded_length(step)) if rows is None else rows
    return ShardedTensor.from_rank_offsets(
        f"old_log_probs.{step}",
        data,
        (0, parallel.data_rank, parallel.data_size),
        replica_id=parallel.context_rank * parallel.tensor_size + parallel.tensor_rank,
    )


def _whole_packs(rows: Tensor, parallel: Parallel) -> Tensor:
    """Adds up what each context-parallel rank has of the packs; collective over these ranks."""
    if parallel.context_size == 1:
        return rows
    rows = rows.to(parallel.device)
    dist.all_reduce(rows, group=parallel.context_group)
    return rows.cpu()


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _write_marker(target: Path, content: Mapping[str, Any]) -> None:
    partial = target / (MARKER + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, target / MARKER)


def _remove_older(folder: Path, keep_last: int | None) -> None:
    if keep_last is None:
        return
    for old in complete_checkpoints(folder)[:-keep_last]:
        # The marker goes first, so that a half-removed folder is not taken for a checkpoint.
        (old / MARKER).unlink()
        shutil.rmtree(old)
