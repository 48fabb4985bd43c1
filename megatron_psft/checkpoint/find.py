"""Finds the checkpoint that a run goes on from, and makes sure that it is whole and that run's own."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_psft import sealed
from megatron_psft.checkpoint import folders
from megatron_psft.distributed.collective import find_damage, on_main, together
from megatron_psft.errors import UserError
from megatron_psft.model.shape import ModelShape
from megatron_psft.sealed import DamageError

log = logging.getLogger(__name__)

VERSION = 2
"""Of what a checkpoint holds."""

WEIGHTS_STEP = 0
"""Completed steps of a checkpoint that holds nothing but weights: a run starts from it as from Hugging Face weights."""

Identity = Mapping[str, Any]
"""What a run must share with the checkpoint it starts from, field by field; JSON values."""


def model_identity(shape: ModelShape) -> dict[str, Any]:
    """The part of an identity that tells the model."""
    values = json.loads(json.dumps(asdict(shape)))  # as a checkpoint has them
    return {f"model {name}": value for name, value in values.items()}


def weights_identity(shape: ModelShape) -> dict[str, Any]:
    """The identity of a checkpoint that holds nothing but weights: only what their names, sizes and use depend on."""
    unrelated = {"model dtype", "model initializer_range"}
    return {field: value for field, value in model_identity(shape).items() if field not in unrelated}


def find_checkpoint(save: Path, load: Path | None, identity: Identity) -> tuple[Path, int] | None:
    """The checkpoint to start from and its completed steps; collective.

    That is the newest intact one of the run folder `save`, where it holds any, else the newest of the run folder
    `load`, or `load` itself. Damaged ones of `save` lose their name, so that they neither count nor are taken again.

    Raises:
        UserError: `save` holds only damaged checkpoints; `load` is needed and holds none, or a damaged one; the
            checkpoint was written by another version or by a run that differs in a field of `identity`.
    """
    saved = _see(save)
    for checkpoint in reversed(saved):
        damage = _find_damage(checkpoint, identity)
        if damage is None:
            return checkpoint, _step_of(checkpoint)
        kept = on_main(partial(folders.set_aside, checkpoint))
        log.warning("WARNING: %s: this checkpoint is damaged; it is now called %s and not used", damage, kept.name)
    if saved:
        raise UserError(f"save ({save}) holds no intact checkpoint any more; name another save folder to start anew")
    if load is None:
        return None
    checkpoint, others = _choose(load)
    damage = _find_damage(checkpoint, identity)
    if damage is not None:
        intact = next((other for other in reversed(others) if _find_damage(other, identity) is None), None)
        remedy = "none beside it is intact" if intact is None else f"the newest intact one is --load {intact}"
        raise UserError(f"load ({load}) must be an intact checkpoint: {damage}; {remedy}")
    return checkpoint, _step_of(checkpoint)


def _see(folder: Path) -> list[Path]:
    """Checkpoints of a run folder, oldest first, which every rank must see as rank 0 does; collective."""
    found = on_main(lambda: folders.step_folders(folder))

    def look() -> None:
        for checkpoint in found:
            if not checkpoint.is_dir():
                raise UserError(
                    f"{folder} must be a folder that all nodes share: rank {dist.get_rank()} lacks {checkpoint}"
                )

    together(look)
    return found


def _choose(load: Path) -> tuple[Path, list[Path]]:
    """The checkpoint that `load` names, and all of its run; collective."""
    if on_main(lambda: folders.is_step_folder(load)):
        return load, [other for other in _see(load.parent) if other != load]
    found = _see(load)
    if not found:
        raise UserError(f"load ({load}) must be a complete step folder or a run folder that holds one; check the path")
    return found[-1], found[:-1]


def _find_damage(checkpoint: Path, identity: Identity) -> str | None:
    """What is wrong with a checkpoint, if anything is; every rank reads its share of the files. Collective.

    Raises:
        UserError: it belongs to another version or another run.
    """

    def read() -> str | None:
        try:
            content = sealed.read_content(checkpoint)
        except DamageError as error:
            return str(error)
        _check_identity(checkpoint, content, identity)
        return None

    damage = on_main(read)
    return find_damage(checkpoint) if damage is None else damage


def _check_identity(checkpoint: Path, content: Mapping[str, Any], identity: Identity) -> None:
    if content["version"] != VERSION:
        version = content["version"]
        raise UserError(f"{checkpoint}: version ({version}) must be {VERSION}; use the release that wrote it")
    for field, wanted in identity.items():
        if content["step"] == WEIGHTS_STEP and field not in content["identity"]:
            continue
        found = content["identity"].get(field)
        if found != wanted:
            raise UserError(
                f"{checkpoint}: the run that wrote it had {field} ({found}), this one has ({wanted}); "
                "use its settings, or another save folder to start anew"
            )


def _step_of(checkpoint: Path) -> int:
    return on_main(lambda: int(sealed.read_content(checkpoint)["step"]))
