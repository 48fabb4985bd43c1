"""Folders that are written aside and sealed with checksums: whole under their name, or not there. Knows no tensors.

A folder is written as `NAME.partial` and gets its name only when it is whole: its last file, the marker
`complete.json`, lists size and SHA-256 of every other file. So a folder of that name either is what
was written or has been damaged since, and `first_damage` tells which."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_psft.atomic import sync

MARKER = "complete.json"


_SUMS = "sums_{rank}.json"


_READ_BYTES = 1 << 20


FileSums = dict[str, tuple[int, str]]
"""File name to size in bytes and SHA-256."""


class DamageError(Exception):
    """A checkpoint is not what was written; the text names the file."""


def begin(target: Path) -> Path:
    """Returns the empty folder in which `target` is to be written."""
    staging = partial_folder(target)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def discard(target: Path) -> None:
    """Removes what was written of `target` before it failed, and held the room that a next try needs."""
    shutil.rmtree(partial_folder(target), ignore_errors=True)


def leave_sums(staging: Path, rank: int) -> None:
    """Leaves checksums of the files that `rank` wrote beside them: hashing is shared out like writing."""
    sums = {path.name: file_sum(path) for path in sorted(staging.glob(f"__{rank}_*"))}
    (staging / _SUMS.format(rank=rank)).write_text(json.dumps(sums), encoding="utf-8")


def seal(target: Path, content: Mapping[str, Any]) -> None:
    """Makes the finished folder of `begin` the checkpoint `target`, for good: its files have reached the disk.

    Args:
        target: the name; what had it is replaced.
        content: what `read_content` is to return; JSON values.
    """
    staging = partial_folder(target)
    sums: FileSums = {}
    for path in staging.glob(_SUMS.format(rank="*")):
        sums |= json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    for path in staging.iterdir():
        if path.name not in sums:
            sync(path)
            sums[path.name] = file_sum(path)
    marker = staging / MARKER
    marker.write_text(_marker_text(dict(content), dict(sorted(sums.items()))), encoding="utf-8")
    sync(marker)
    sync(staging)
    replaced = target.with_name(target.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    staging.rename(target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def marker_sum(checkpoint: Path) -> str:
    """SHA-256 of the marker of an intact checkpoint: as it lists every file's, no two checkpoints share it."""
    return file_sum(checkpoint / MARKER)[1]


def read_content(checkpoint: Path) -> dict[str, Any]:
    """Returns what was sealed with the checkpoint.

    Raises:
        DamageError: the marker is missing or altered.
    """
    return _read_marker(checkpoint)["content"]


def first_damage(checkpoint: Path, *, part: int, parts: int) -> str | None:
    """Reads every `parts`-th file, from number `part` on, and says what is wrong with the first bad one, if any is."""
    try:
        files: FileSums = _read_marker(checkpoint)["files"]
        for name in list(files)[part::parts]:
            _check(checkpoint / name, *files[name])
    except DamageError as error:
        return str(error)
    return None


def partial_folder(target: Path) -> Path:
    """Where `target` is written until it is whole."""
    return target.with_name(target.name + ".partial")


def _read_marker(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MARKER
    try:
        text = path.read_text(encoding="utf-8")
        marker = json.loads(text)
        is_intact = text == _marker_text(marker["content"], marker["files"])
    except FileNotFoundError:
        raise DamageError(f"{path} is missing") from None
    except (ValueError, TypeError, KeyError):  # no JSON, or not ours
        is_intact = False
    if not is_intact:
        raise DamageError(f"{path} is not as it was written")
    return marker


def _check(path: Path, size_bytes: int, sha256: str) -> None:
    if not path.is_file():
        raise DamageError(f"{path} is missing")
    found_bytes = path.stat().st_size
    if found_bytes != size_bytes:
        raise DamageError(f"{path} has {found_bytes} bytes, {size_bytes} were written")
    if file_sum(path)[1] != sha256:
        raise DamageError(f"{path} is not as it was written")


def file_sum(path: Path) -> tuple[int, str]:
    digest, size_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            size_bytes += len(block)
    return size_bytes, digest.hexdigest()


def _marker_text(content: Mapping[str, Any], files: FileSums) -> str:
    """The marker carries its own checksum, so that it vouches for itself as well."""
    body = {"content": content, "files": files}
    checksum = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": checksum}, indent=1)
