"""Files and folders that are either as they were or as they were meant to be, whatever interrupts their writing."""

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and fs.h
_ASIDE = re.compile(r"\..+\.psft-[0-9a-f]{16}")


def replace_file(path: Path, text: str) -> None:
    """Writes a file in one move: whoever reads it, after whatever interruption, finds the old text or the new."""
    staging = unfinished(path)
    staging.write_text(text, encoding="utf-8")
    sync(staging)
    staging.rename(path)
    sync(path.parent)


def unfinished(path: Path) -> Path:
    """Where a file is written until it is whole: a hidden name that nobody gives a file of his own."""
    return path.with_name(f".{path.name}.psft-unfinished")


def sync(path: Path) -> None:
    """Has the file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def aside(parent: Path, name: str) -> Iterator[Path]:
    """An empty folder in `parent` to write something in that is to be called `name`; it has a hidden name that nobody
    gives a folder of his own. What lies under that name at the end is removed, and so is what processes left that were
    killed. Raises OSError where `parent` cannot be written.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent, name)
    folder = parent / f".{name}.psft-{secrets.token_hex(8)}"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks, where nobody can take one either, to remove the folder
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def is_aside(path: Path) -> bool:
    """Whether `path` has a name that only `aside` gives."""
    return _ASIDE.fullmatch(path.name) is not None


def _remove_abandoned(parent: Path, name: str) -> None:
    for path in parent.glob(f".{name}.psft-*"):
        if is_aside(path):
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # whoever wrote it has just finished
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            except OSError:  # in use, or nobody can say
                continue
            finally:
                os.close(descriptor)


def exchange(first: Path, second: Path) -> None:
    """Gives two folders each other's name: in one step where Linux and the file system can, else in three renames, of
    which the first two leave `second` without a folder for a moment."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = os.fsencode(first), os.fsencode(second)
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        if (number := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(number, os.strerror(number), str(first), None, str(second))
    between = first.with_name(first.name + "-replaced")
    second.rename(between)
    first.rename(second)
    between.rename(first)
