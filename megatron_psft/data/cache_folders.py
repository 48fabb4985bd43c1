"""What lies in a cache of tokenized data, and how to make room in it. Not imported by `cache.py`: a change here leaves
the cache as it is.
"""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_psft.data.cache import MANIFEST

State = Literal["current", "changed", "gone", "unfinished"]

_NAME = re.compile(r"[0-9a-f]{32}")
_UNFINISHED = re.compile(r"\.([0-9a-f]{32})\..+\.\d+\.\d+")
_SECONDS_PER_DAY = 86400


@dataclass(frozen=True, kw_only=True)
class CacheFolder:
    """One source, tokenized in one way."""

    path: Path
    size: int
    """In bytes."""
    idle_days: float
    """Since it was last used."""
    sources: tuple[str, ...]
    """Files that were tokenized; the ID of a hub dataset that has none."""
    state: State
    """Of its source: as it was; changed, or gone, so that this is not found again; or not tokenized to the end."""


def cache_folders(root: Path) -> list[CacheFolder]:
    """All folders of a cache, the longest unused first. What else lies there is left out, as nothing may remove it."""
    if not root.is_dir():
        return []
    found = [_read(path) for path in root.iterdir() if path.is_dir()]
    return sorted((folder for folder in found if folder is not None), key=lambda folder: -folder.idle_days)


def to_prune(folders: list[CacheFolder], older_than_days: int | None) -> Iterator[CacheFolder]:
    """Those that no run will find again, as their source is changed or gone; those unused for so many days; and
    unfinished ones to which nothing was written for a day, as not every lock reaches from one node to another."""
    for folder in folders:
        is_old = older_than_days is not None and folder.idle_days > older_than_days
        is_lost = folder.idle_days > 1 if folder.state == "unfinished" else folder.state != "current"
        if is_old or is_lost:
            yield folder


def remove(folder: CacheFolder) -> bool:
    """Removes a folder and returns True; False if a process uses it, or may, as where the file system has no locks.
    Raises OSError for what cannot be deleted."""
    unfinished = _UNFINISHED.fullmatch(folder.path.name)
    lock = folder.path.with_name(f"{unfinished[1]}.lock") if unfinished else folder.path / MANIFEST
    try:
        with lock.open("ab" if unfinished else "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Renamed under the lock: who waits for it finds no folder, and not half of one.
            name = unfinished[1] if unfinished else folder.path.name
            target = folder.path.with_name(f".{name}.removed.{os.getpid()}.{time.time_ns()}")
            folder.path.rename(target)
    except OSError:
        return False
    shutil.rmtree(target)
    return True


def _read(path: Path) -> CacheFolder | None:
    try:
        if _UNFINISHED.fullmatch(path.name):
            size, idle_days = _size_of(path), min(map(_idle_days, [path, *path.iterdir()]))
            return CacheFolder(path=path, size=size, idle_days=idle_days, sources=(), state="unfinished")
        if not _NAME.fullmatch(path.name):
            return None
        key = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["key"]
        files = [(name, size, changed_ns) for name, size, changed_ns in key["files"]]
        return CacheFolder(
            path=path,
            size=_size_of(path),
            idle_days=_idle_days(path / MANIFEST),
            sources=tuple(name for name, *_ in files) or (key["version"].split()[0],),
            state=_state_of(files),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # another program's, or removed meanwhile
        return None


def _state_of(files: list[tuple[str, int, int]]) -> State:
    for name, size, changed_ns in files:
        if not os.path.exists(name):
            return "gone"
        found = os.stat(name)
        if (found.st_size, found.st_mtime_ns) != (size, changed_ns):
            return "changed"
    return "current"


def _size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def _idle_days(path: Path) -> float:
    return (time.time() - path.stat().st_mtime) / _SECONDS_PER_DAY
