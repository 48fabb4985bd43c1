"""What tells one run, one model, one start and one set of weights from another."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_psft import sealed
from megatron_psft.config.schema import Config
from megatron_psft.model.shape import ModelShape

VERSION = 2
"""Of what a checkpoint holds."""


WEIGHTS_ONLY_STEP = 0
"""Completed steps of a checkpoint that holds nothing but weights: a run starts from it as from Hugging Face weights."""


BASE = "the weights that adapters stand beside"
"""Field of the identity of a checkpoint that holds adapters, and not the model."""

BEGAN_WITH_BASE = "began with the model without adapters"
"""Field of a checkpoint, not of its identity: `StartPoint.began_with_base`."""

Identity = Mapping[str, Any]
"""What a run must share with the checkpoint it starts from, field by field; JSON values."""


def run_identity(
    config: Config, model: Identity, *, data_fingerprint: str, train_iters: int, base: str | None = None
) -> Identity:
    """What must not change between a checkpoint of a run and the run that resumes from it.

    Args:
        config: of the run.
        model: of its model, with what a checkpoint's parameters depend on besides.
        data_fingerprint: of the training set.
        train_iters: steps of the run.
        base: what tells the weights beside which adapters are trained; None without adapters.
    """
    identity = {
        **model,
        "training data": data_fingerprint,
        "global_batch_size": config.batch.global_batch_size,
        "shuffle": config.data.shuffle,
        "seed": config.batch.seed,
        "bf16": config.precision.bf16,
        "use_distributed_optimizer": config.parallel.use_distributed_optimizer,
        "packing": config.data.packing,
    }
    if config.data.packing:
        identity["seq_length"] = config.data.seq_length
    if config.packs_each_step:  # what earlier releases wrote has no such field
        identity["global_batch_unit"] = config.batch.global_batch_unit
    if config.objective.old_policy_interval == "fixed":
        # Its log-probabilities were computed for these steps, by weights that are gone.
        identity["train_iters"] = train_iters
    if base is not None:
        identity[BASE] = base
    return identity


def model_identity(shape: ModelShape) -> dict[str, Any]:
    """The part of an identity that tells the model."""
    values = json.loads(json.dumps(asdict(shape)))  # as a checkpoint has them
    return {f"model {name}": value for name, value in values.items()}


def weights_identity(shape: ModelShape) -> dict[str, Any]:
    """The identity of a checkpoint that holds nothing but weights: only what their names, sizes and use depend on."""
    unrelated = {"model dtype", "model initializer_range"}
    return {field: value for field, value in model_identity(shape).items() if field not in unrelated}


def start_identity(
    checkpoint: Path | None, model_folder: Path, seed: int | None, adapter: Path | None = None
) -> dict[str, Any]:
    """What tells the weights that a run starts from: those of a checkpoint, random ones of `seed`, or the files of
    `model_folder`, and beside them those of the folder `adapter`; files by size and time of change in nanoseconds. JSON
    values."""
    beside = {} if adapter is None else {"load_lora": _files(adapter)}
    if checkpoint is not None:
        return {"checkpoint": sealed.marker_sum(checkpoint), **beside}
    return {**(_files(model_folder) if seed is None else {"seed": seed}), **beside}


def _files(folder: Path) -> dict[str, list[int]]:
    stats = {path.name: path.stat() for path in sorted(folder.glob("*.safetensors"))}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
