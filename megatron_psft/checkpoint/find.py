"""Finds the checkpoint that a run goes on from, and makes sure that it is whole and that run's own."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_psft import sealed
from megatron_psft.checkpoint import folders
from megatron_psft.checkpoint.identity import VERSION, WEIGHTS_ONLY_STEP, Identity
from megatron_psft.distributed.collective import damage_on_any_rank, on_every_rank, on_rank_zero
from megatron_psft.errors import UserError
from megatron_psft.sealed import DamageError

log = logging.getLogger(__name__)


def find_checkpoint(save: Path, load: Path | None, identity: Identity) -> tuple[Path, int] | None:
    """The checkpoint to start from and its completed steps; collective.

    That is the newest intact one of the run folder `save`, where it holds any, else the newest of the run folder
    `load`, or `load` itself. Damaged ones of `save` lose their name, so that they neither count nor are taken again.

    Raises:
        UserError: `save` holds only damaged checkpoints; `load` is needed and holds none, or a damaged one; the
            checkpoint was written by another version or by a run that differs in a field of `identity`.
    """
    saved = _list_checkpoints(save)
    for checkpoint in reversed(saved):
        damage = _check_checkpoint(checkpoint, identity)
        if damage is None:
            return checkpoint, _step_of(checkpoint)
        kept = on_rank_zero(partial(folders.set_aside, checkpoint))
        log.warning("WARNING: %s: this checkpoint is damaged; it is now called %s and not used", damage, kept.name)
    if saved:
        raise UserError(f"save ({save}) holds no intact checkpoint any more; name another save folder to start anew")
    if load is None:
        return None
    checkpoint, others = _resolve_load(load)
    damage = _check_checkpoint(checkpoint, identity)
    if damage is not None:
        intact = next((other for other in reversed(others) if _check_checkpoint(other, identity) is None), None)
        remedy = "none beside it is intact" if intact is None else f"the newest intact one is --load {intact}"
        raise UserError(f"load ({load}) must be an intact checkpoint: {damage}; {remedy}")
    return checkpoint, _step_of(checkpoint)


def _list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run folder, oldest first, which every rank must see as rank 0 does; collective."""
    found = on_rank_zero(lambda: folders.step_folders(folder))

    def look() -> None:
        for checkpoint in found:
            if not checkpoint.is_dir():
                raise UserError(
                    f"{folder} must be a folder that all nodes share: rank {dist.get_rank()} lacks {checkpoint}"
                )

    on_every_rank(look)
    return found


def _resolve_load(load: Path) -> tuple[Path, list[Path]]:
    """The checkpoint that `load` names, and all of its run; collective."""
    if on_rank_zero(lambda: folders.is_step_folder(load)):
        return load, [other for other in _list_checkpoints(load.parent) if other != load]
    found = _list_checkpoints(load)
    if not found:
        raise UserError(f"load ({load}) must be a complete step folder or a run folder that holds one; check the path")
    return found[-1], found[:-1]


def _check_checkpoint(checkpoint: Path, identity: Identity) -> str | None:
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

    damage = on_rank_zero(read)
    return damage_on_any_rank(checkpoint) if damage is None else damage


def _check_identity(checkpoint: Path, content: Mapping[str, Any], identity: Identity) -> None:
    if content["version"] != VERSION:
        version = content["version"]
        raise UserError(f"{checkpoint}: version ({version}) must be {VERSION}; use the release that wrote it")
    for field, wanted in identity.items():
        if content["step"] == WEIGHTS_ONLY_STEP and field not in content["identity"]:
            continue
        found = content["identity"].get(field)
        if found != wanted:
            raise UserError(
                f"{checkpoint}: the run that wrote it had {field} ({found}), this one has ({wanted}); "
                "use its settings, or another save folder to start anew"
            )


def _step_of(checkpoint: Path) -> int:
    return on_rank_zero(lambda: int(sealed.read_content(checkpoint)["step"]))
