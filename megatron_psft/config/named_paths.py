"""Sets of records that have names: `NAME=PATH` of `--valid-data` and `--drift-data`. Imports no torch."""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from megatron_psft.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class NamedPath(NamedTuple):
    """A path and its set's name, which is empty if none is given."""

    name: str
    path: str


def parse_named_path(field: str, text: str) -> NamedPath:
    """`NAME=PATH`, or `PATH`. A file or folder whose whole name is `text` is meant by it, `PATH=2` is a weight, and
    what has a `/` before the `=` is a path, unless a file or folder is behind.

    Raises UserError, with the configuration's `field`, for a name that is empty or could not be part of a metric's.
    """
    name, equals, path = text.partition("=")
    if not equals or _exists(text) or _is_number(path) or ("/" in name and not _exists(path)):
        return NamedPath("", text)
    if not name:
        raise UserError(f"{field} ({text}) must have a name before =; write NAME=PATH, or PATH alone")
    if not _NAME.fullmatch(name):
        raise UserError(f"{field} ({text}) must have a name of letters, digits, '.', '_' and '-' before =; change it")
    if not path:
        raise UserError(f"{field} ({text}) must have a path after =; write NAME=PATH")
    return NamedPath(name, path)


def sets_by_name(field: str, texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The paths of each set in order: one of each name, and all that have none as one set, whose name is empty.

    Raises UserError for a name that is given twice, in whatever case, as files are named after it.
    """
    sets: dict[str, tuple[str, ...]] = {}
    for name, path in (parse_named_path(field, text) for text in texts):
        if name and name.lower() in map(str.lower, sets):
            raise UserError(
                f"{field} names the set {name} twice; give each a name of its own, or a folder of the files"
            )
        sets[name] = (*sets.get(name, ()), path)
    return sets


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
