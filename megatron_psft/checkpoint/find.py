"""Finds the checkpoint that a run goes on from, and makes sure that it is whole and that run's own."""

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from megatron_psft import sealed
from megatron_psft.checkpoint import folders
from megatron_psft.checkpoint.identity import BASE, BEGAN_WITH_BASE, VERSION, WEIGHTS_ONLY_STEP, Identity
from megatron_psft.config.resume import Change, Settings, changes_since, listed
from megatron_psft.distributed.collective import damage_on_any_rank, on_every_rank, on_rank_zero
from megatron_psft.errors import UserError
from megatron_psft.sealed import DamageError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StartPoint:
    """The checkpoint that a run goes on from, or whose weights a new one starts from."""

    checkpoint: Path
    step: int
    """Completed steps; `WEIGHTS_ONLY_STEP` for the weights alone."""
    changes: Sequence[Change]
    """Settings that the run which wrote it had otherwise, and that may change."""
    not_compared: str | None
    """What of the settings could not be compared, and why; None for nothing."""
    began_with_base: bool = False
    """Whether its run has adapters and began with the model beside them, which it is again without them."""

    def resumes(self, save: Path) -> bool:
        """Whether it is a checkpoint of the run folder `save` itself, whose run has made these steps."""
        return self.step != WEIGHTS_ONLY_STEP and self.checkpoint.parent == save


def find_checkpoint(save: Path, load: Path | None, identity: Identity, settings: Settings) -> StartPoint | None:
    """The checkpoint to go on from; collective.

    That is the newest intact one of the run folder `save`, where it holds any, else the newest of the run folder
    `load`, or `load` itself. Damaged ones of `save` lose their name, so that they neither count nor are taken again.

    Raises:
        UserError: `save` holds only damaged checkpoints; `load` is needed and holds none, or a damaged one; the
            checkpoint was written by another version, or by a run that differs in a field of `identity` or in a
            setting that must be the same.
    """
    saved = _list_checkpoints(save)
    for checkpoint in reversed(saved):
        damage = _check_checkpoint(checkpoint, identity, settings)
        if damage is None:
            return _start_point(checkpoint, settings)
        kept = on_rank_zero(partial(folders.set_aside, checkpoint))
        log.warning("WARNING: %s: this checkpoint is damaged; it is now called %s and not used", damage, kept.name)
    if saved:
        raise UserError(f"save ({save}) holds no intact checkpoint any more; name another save folder to start anew")
    if load is None:
        return None
    return _start_point(_find_intact("load", load, identity, settings), settings)


def find_weights(init_from: Path, identity: Identity) -> StartPoint:
    """The checkpoint whose weights a new run starts from, of any run: the newest of a run folder, or `init_from`
    itself; collective.

    Raises:
        UserError: there is none, or a damaged one, or it is of a model that differs in a field of `identity`.
    """
    checkpoint = _find_intact("init_from", init_from, identity, None)
    if on_rank_zero(lambda: BASE in sealed.read_content(checkpoint)["identity"]):
        raise UserError(
            f"init_from ({init_from}) holds adapters and not a model; export them, and start from them with "
            "--load-lora, or from a merged export with --load-hf"
        )
    return StartPoint(checkpoint=checkpoint, step=WEIGHTS_ONLY_STEP, changes=(), not_compared=None)


def _find_intact(field: str, folder: Path, identity: Identity, settings: Settings | None) -> Path:
    """The checkpoint that a flag names; collective."""
    checkpoint, others = _resolve(field, folder)
    damage = _check_checkpoint(checkpoint, identity, settings)
    if damage is not None:
        sound = (other for other in reversed(others) if _check_checkpoint(other, identity, settings) is None)
        intact, flag = next(sound, None), "--" + field.replace("_", "-")
        remedy = "none beside it is intact" if intact is None else f"the newest intact one is {flag} {intact}"
        raise UserError(f"{field} ({folder}) must be an intact checkpoint: {damage}; {remedy}")
    return checkpoint


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


def _resolve(field: str, folder: Path) -> tuple[Path, list[Path]]:
    """The checkpoint that `folder` is or holds, and the others of its run; collective."""
    if on_rank_zero(lambda: folders.is_step_folder(folder)):
        return folder, [other for other in _list_checkpoints(folder.parent) if other != folder]
    found = _list_checkpoints(folder)
    if not found:
        raise UserError(
            f"{field} ({folder}) must be a complete step folder or a run folder that holds one; check the path"
        )
    return found[-1], found[:-1]


def _check_checkpoint(checkpoint: Path, identity: Identity, settings: Settings | None) -> str | None:
    """What is wrong with a checkpoint, if anything is; every rank reads its share of the files. Collective.

    Raises:
        UserError: it belongs to another version or another run.
    """

    def read() -> str | None:
        try:
            content = sealed.read_content(checkpoint)
        except DamageError as error:
            return str(error)
        _check_version(checkpoint, content)
        if settings is not None:
            _check_settings(checkpoint, content, settings)
        _check_identity(checkpoint, content, identity)
        return None

    damage = on_rank_zero(read)
    return damage_on_any_rank(checkpoint) if damage is None else damage


def _check_version(checkpoint: Path, content: Mapping[str, Any]) -> None:
    if content["version"] != VERSION:
        version = content["version"]
        raise UserError(f"{checkpoint}: version ({version}) must be {VERSION}; use the release that wrote it")


def _check_settings(checkpoint: Path, content: Mapping[str, Any], settings: Settings) -> None:
    refused = [change for change in _changes(checkpoint, content, settings) if change.is_refused]
    if refused:
        before = listed((change.name, change.before) for change in refused)
        now = listed((change.name, change.now) for change in refused)
        way_on = _way_on(checkpoint, content)
        raise UserError(f"{checkpoint}: the run that wrote it had {before}, this one has {now}; {way_on}")


def _way_on(checkpoint: Path, content: Mapping[str, Any]) -> str:
    has_adapters = BASE in content["identity"]
    weights = f"its weights: --init-from {shlex.quote(str(checkpoint))}"
    start = "an export of its adapters: --load-lora" if has_adapters else weights
    return f"use its settings, or another save folder, where a new run can start from {start}"


def _check_identity(checkpoint: Path, content: Mapping[str, Any], identity: Identity) -> None:
    for field, wanted in identity.items():
        if content["step"] == WEIGHTS_ONLY_STEP and field not in content["identity"]:
            continue
        found = content["identity"].get(field)
        if found != wanted:
            remedy = _way_on(checkpoint, content)
            if field == BASE:
                remedy = "name its model by load_hf or init_from"
            elif field.startswith("model "):
                remedy = "use its settings, or another save folder to start anew"
            raise UserError(
                f"{checkpoint}: the run that wrote it had {field} ({found}), this one has ({wanted}); {remedy}"
            )


def _start_point(checkpoint: Path, settings: Settings) -> StartPoint:
    """Collective."""

    def read() -> StartPoint:
        content = sealed.read_content(checkpoint)
        return StartPoint(
            checkpoint=checkpoint,
            step=int(content["step"]),
            changes=_changes(checkpoint, content, settings),
            not_compared=_not_compared(checkpoint, content),
            began_with_base=content.get(BEGAN_WITH_BASE, False),
        )

    return on_rank_zero(read)


def _changes(checkpoint: Path, content: Mapping[str, Any], settings: Settings) -> list[Change]:
    """The settings that a run which goes on from the checkpoint has otherwise; a new run has none."""
    before = content.get("settings") or _settings_in(_config_file(checkpoint))
    return [] if content["step"] == WEIGHTS_ONLY_STEP or before is None else changes_since(before, settings)


def _not_compared(checkpoint: Path, content: Mapping[str, Any]) -> str | None:
    if content["step"] == WEIGHTS_ONLY_STEP or "settings" in content:
        return None
    path = _config_file(checkpoint)
    if _settings_in(path) is None:
        return f"{checkpoint} is of an earlier release and names no settings; what has changed could not be compared"
    return f"{checkpoint} is of an earlier release and names no settings; compared are those of {path}"


def _config_file(checkpoint: Path) -> Path:
    return checkpoint.parent / "config.yaml"


def _settings_in(path: Path) -> Settings | None:
    """What an earlier release has left beside its checkpoints: the settings of the run's last start."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None
