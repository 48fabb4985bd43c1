"""Files that are either as they were or as they were meant to be, whatever interrupts their writing."""

import os
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Writes a file in one move: whoever reads it, after whatever interruption, finds the old text or the new."""
    staging = path.with_name(path.name + ".new")
    staging.write_text(text, encoding="utf-8")
    sync(staging)
    staging.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Has the file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
