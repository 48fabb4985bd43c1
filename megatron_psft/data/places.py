"""Where a path of records leads: nothing is read here, and nothing imported that takes time."""

import glob
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_psft.config.inputs import DataConfig
from megatron_psft.data.file_names import is_known
from megatron_psft.data.given import GivenPath, given_paths
from megatron_psft.errors import UserError

_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A path or ID with what is said of it: `ID[:CONFIG][@SPLIT]`."""

    given: GivenPath
    base: str
    config: str | None = None
    split: str | None = None

    @property
    def local(self) -> Path:
        """The file or folder, if it is one."""
        return Path(os.path.expanduser(self.base))

    @property
    def is_pattern(self) -> bool:
        """Whether it stands for all files that match it. No file has its name."""
        return glob.has_magic(self.base) and "\0" not in self.base


def find_place(given: GivenPath) -> Place:
    """A file, a folder, a pattern, or an ID that the hub may have.

    Raises UserError for a path that can be none of them.
    """
    if "://" in given.path:
        raise UserError(f"{given} must not be an address; download it and give the file")
    place = _parse(given)
    looks_like_path = place.base.startswith(("/", "./", "../", "~")) or is_known(place.base)
    if _exists(place.base) or place.is_pattern or (_HUB_ID.fullmatch(place.base) and not looks_like_path):
        return place
    raise UserError(f"{given} does not exist; give a file, a folder or the ID of a dataset on the hub")


def check_places(config: DataConfig) -> None:
    """Raises UserError for the first path of a run's records that leads nowhere."""
    for given in given_paths(config):
        find_place(given)


def folder_of(given: GivenPath) -> Path:
    """The file or folder that is read from if it is local; of a pattern, the folder of its matches."""
    place = _parse(given).local
    if os.path.exists(place) or not glob.has_magic(str(place)):
        return place
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), place.parts)
    return Path(*fixed)


def _parse(given: GivenPath) -> Place:
    """A name that exists is taken whole, from the longest on."""
    base, split, config = given.path, None, None
    if not _exists(base) and "@" in base:
        base, _, split = base.rpartition("@")
    if not _exists(base) and ":" in base:
        base, _, config = base.rpartition(":")
    if not base or split == "" or config == "":
        raise UserError(f"{given} must have a name before and after : and @; give PATH or ID[:CONFIG][@SPLIT]")
    return Place(given=given, base=base, config=config, split=split)


def _exists(path: str) -> bool:
    # os.path and not pathlib: its answers stay False, and its text unchanged, for what cannot be a path at all.
    return os.path.exists(os.path.expanduser(path))
