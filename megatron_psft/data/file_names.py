"""Which files can be read, by their names: formats, and the compressions that may be behind them."""

import os
from pathlib import Path

JSON_LINES, JSON_ARRAY, PARQUET = ".jsonl", ".json", ".parquet"

KNOWN_FILES = f"{JSON_LINES}, {JSON_ARRAY} or {PARQUET}"
"""What can be read, in words; the first two also with .gz or .zst behind."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""What Arrow calls them, by ending."""

_FORMATS = (JSON_LINES, JSON_ARRAY, PARQUET)
_COMPRESSED = (JSON_LINES, JSON_ARRAY)


def is_known(name: str) -> bool:
    """Whether a file of that name can be read."""
    return endings(name)[0] in _FORMATS


def stem_of(path: Path) -> str:
    """The file's name without its endings, that of compression too."""
    return path.name[: len(path.name) - len("".join(endings(path.name)))]


def endings(name: str) -> tuple[str, str]:
    """The ending that tells the format and that of compression, lower-case; each may be empty."""
    rest, ending = os.path.splitext(name.lower())
    if ending not in COMPRESSIONS:
        return ending, ""
    inner = os.path.splitext(rest)[1]
    return (inner if inner in _COMPRESSED else "", ending)
