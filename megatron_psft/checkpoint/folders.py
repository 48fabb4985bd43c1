"""Checkpoints of a run as folders: how they are called, found, and removed. Each is sealed, see sealed.py."""

import re
import shutil
from pathlib import Path

from megatron_psft.sealed import MARKER

_STEP_FOLDER = re.compile(r"step_\d+")  # and no copy that somebody keeps beside, such as step_0000012_good


def step_folder(folder: Path, step: int) -> Path:
    """`step` counts completed optimizer steps."""
    return folder / f"step_{step:07d}"


def export_folder(folder: Path, step: int) -> Path:
    """Of an export of the checkpoint, beside it."""
    return folder / f"{step_folder(folder, step).name}_hf"


def step_folders(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; whether they are intact is `damage_on_any_rank`'s question."""
    found = (path for path in folder.glob("step_*") if _STEP_FOLDER.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Completed optimizer steps of a checkpoint of a run, by its name."""
    return int(checkpoint.name.removeprefix("step_"))


def is_step_folder(path: Path) -> bool:
    """Whether `path` is one checkpoint, be it under another name, and not a run."""
    return path.is_dir() and (_STEP_FOLDER.fullmatch(path.name) is not None or (path / MARKER).exists())


def set_aside(checkpoint: Path) -> Path:
    """Takes the name from a damaged checkpoint, which stays for people to look at; returns the new one."""
    target = checkpoint.with_name(checkpoint.name + ".damaged")
    shutil.rmtree(target, ignore_errors=True)
    checkpoint.rename(target)
    return target


def remove_older(folder: Path, keep_last: int | None) -> None:
    """Removes all checkpoints but the newest `keep_last`."""
    if keep_last is None:
        return
    for old in step_folders(folder)[:-keep_last]:
        # The name goes first, so that a half-removed folder is not taken for a checkpoint.
        removed = old.with_name(old.name + ".removed")
        old.rename(removed)
        shutil.rmtree(removed)
