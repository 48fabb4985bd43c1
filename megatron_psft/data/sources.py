"""What a path of records stands for: a file, the files of a folder or pattern, or a dataset on disk or on the hub."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_psft.data.file_names import KNOWN_FILES, is_known, stem_of
from megatron_psft.data.files import (
    BadRecord,
    Row,
    Source,
    check_readable,
    dataset_source,
    file_source,
)
from megatron_psft.data.given import GivenPath
from megatron_psft.data.places import Place, find_place
from megatron_psft.data.splits import SplitUse, choose, kind_of, label_of, missing_shards
from megatron_psft.errors import UserError, counted, first_line

_NAMED_FILES = 8
_SET_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def open_source(path: str, *, field: str, use: SplitUse = "training") -> Source:
    """One path of `--data` or of another setting that names records, without its weight:

    * a `.jsonl`, `.json` (array) or `.parquet` file, the first two also compressed as `.gz` or `.zst`;
    * a folder of such files, also in its sub-folders `data` and `train`, `test` and so on, or the files that a pattern
      such as `data/*.jsonl` matches, in the order of their names;
    * a folder that `datasets.save_to_disk` wrote, or a dataset on the hub.

    `:CONFIG` behind a folder or ID names a sub-folder or a configuration, `@SPLIT` a split; `splits.choose` says which
    one is taken without. A file, or a folder, whose whole name has such a character is meant by it.

    Whether `path` can be read is checked now; rows are read when the iterator of chunks is advanced. Errors name
    `field`, the setting that `path` is of.

    Raises UserError: no such file, unknown file type, empty folder, no split or several that may be meant, hub dataset
    that cannot be loaded; while iterating over chunks: a JSON or Parquet file that is broken as a whole.
    """
    place = find_place(GivenPath(field, path))
    local = place.local
    if os.path.isdir(local):
        if place.config is not None:
            local = _sub_folder(local, place)
        return _open_folder(local, place, use)
    if os.path.exists(local):
        return _open_file(local, place, use)
    return _open_pattern(place, use) if place.is_pattern else _open_hub(place, use)


def open_rows(path: str, *, field: str, use: SplitUse = "training") -> Iterator[Row | BadRecord]:
    """The rows of `open_source`, one after the other."""
    source = open_source(path, field=field, use=use)
    return (row for chunk in source.chunks() for row in chunk.rows())


def _sub_folder(folder: Path, place: Place) -> Path:
    assert place.config is not None
    found = folder / place.config
    if not found.is_dir():
        names = ", ".join(sorted(item.name for item in folder.iterdir() if item.is_dir())) or "none"
        raise UserError(f"{place.given} names the sub-folder {place.config}, but {folder} has {names}")
    return found


def _open_file(path: Path, place: Place, use: SplitUse) -> Source:
    if place.split is not None or place.config is not None:
        raise UserError(f"{place.given} names a part of {place.base}, which is a file and read whole; remove it")
    label = label_of(stem_of(path))
    is_odd = use == "training" and kind_of(label) in ("test", "validation")
    note = f"{path}: read whole, though its name is that of the split {label}" if is_odd else ""
    return replace(file_source(place.given, str(path), (path,)), selection=note)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What lies in a folder: data files by split, and the rest."""

    files: tuple[tuple[Path, str], ...]
    """Each with its split's label, or an empty one."""
    others: tuple[str, ...]
    """Names of what is not read, with the reason."""
    folder: Path | None = None
    """What names are relative to."""

    def name_of(self, file: Path) -> str:
        return str(file if self.folder is None else file.relative_to(self.folder))


def _open_folder(folder: Path, place: Place, use: SplitUse) -> Source:
    check_readable(place.given.at(folder))
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        files = tuple(sorted(file for file in folder.rglob("*") if file.is_file()))
        return _split_source(_load_from_disk(folder, place.given), place, files, use, name=str(folder))
    found = _look_into(folder, folder, label="")
    if not found.files:
        there = f"; it has {', '.join(found.others[:_NAMED_FILES])}" if found.others else ""
        raise UserError(f"{place.given} is a folder without any {KNOWN_FILES} file{there}; name one that has some")
    return _selected(found, place, use, name=str(folder) if place.split is None else place.given.path)


def _look_into(top: Path, folder: Path, *, label: str) -> _Found:
    """Files that belong to `folder`, of split `label` where it is that of one; `top` is what names are relative to."""
    files: list[tuple[Path, str]] = []
    others: list[str] = []
    for item in sorted(folder.iterdir()):
        name = str(item.relative_to(top))
        if item.name.startswith(".") or item.suffix.lower() == ".md" or item.stem.upper() == "LICENSE":
            continue
        if item.is_dir():
            inner = label_of(item.name)
            is_part = (item.name == "data" or inner) and not label and not is_known(item.name)
            if not is_part:
                others.append(f"{name}/ (a sub-folder)")
                continue
            part = _look_into(top, item, label=inner)
            files += part.files
            others += part.others
        elif item.name in _SET_DESCRIPTIONS:
            others.append(f"{name} (describes the set)")
        elif is_known(item.name):
            files.append((item, label or label_of(stem_of(item))))
        else:
            others.append(f"{name} (not {KNOWN_FILES})")
    return _Found(files=tuple(files), others=tuple(others), folder=top)


def _open_pattern(place: Place, use: SplitUse) -> Source:
    if place.config is not None:
        raise UserError(f"{place.given} names a part of a pattern, :{place.config}; put it into the pattern")
    matches = sorted(map(Path, glob.glob(os.path.expanduser(place.base), recursive=True)))
    files = tuple((path, label_of(stem_of(path))) for path in matches if path.is_file() and is_known(path.name))
    others = tuple(f"{path} (not {KNOWN_FILES})" for path in matches if not (path.is_file() and is_known(path.name)))
    if not files:
        there = f" {', '.join(others[:_NAMED_FILES])}" if others else " nothing"
        raise UserError(f"{place.given} is a pattern that matches{there}; check it, or name files")
    if place.split is None and len({label for _, label in files}) == 1:  # the pattern itself says which
        return _source_of(_Found(files=files, others=others), {files[0][1]}, place.given, name=place.given.path)
    return _selected(_Found(files=files, others=others), place, use, name=place.given.path)


def _selected(found: _Found, place: Place, use: SplitUse, *, name: str) -> Source:
    labels = list(dict.fromkeys(label for _, label in found.files))
    return _source_of(found, choose(place.given, labels, place.split, use), place.given, name=name)


def _source_of(found: _Found, chosen: set[str], given: GivenPath, *, name: str) -> Source:
    files = tuple(path for path, label in found.files if label in chosen)
    left = [
        f"{found.name_of(path)} ({f'split {label}' if label else 'no split in its name'})"
        for path, label in found.files
        if label not in chosen
    ]
    count = counted(len(found.files) + len(found.others), "file")
    read = _listed([found.name_of(path) for path in files])
    note = f"{name}: {len(files)} of {count} read: {read}; left out: {_listed([*left, *found.others]) or 'none'}"
    if missing := missing_shards(stem_of(path) for path in files):
        note += f"; missing shards: {_listed(missing)}"
    return replace(file_source(given, name, files), selection=note)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED_FILES} more" if len(names) > _NAMED_FILES else ""
    return ", ".join(names[:_NAMED_FILES]) + more


def _split_source(
    loaded: Any, place: Place, files: tuple[Path, ...] | None, use: SplitUse, *, name: str, is_hub: bool = False
) -> Source:
    """The rows of what the library has loaded, all splits or one. `files` are those of its arrow files if None."""
    note = ""
    if isinstance(loaded, dict):
        (label,) = choose(place.given, list(loaded), place.split, use)
        left = [split for split in loaded if split != label]
        note = f"{name}: split {label} read; left out: {_listed(left) or 'none'}"
        loaded = loaded[label]
    elif place.split is not None:
        raise UserError(f"{place.given} names the split {place.split}, but it was saved without; remove it")
    if files is None:
        files = tuple(Path(file["filename"]) for file in getattr(loaded, "cache_files", ()))
    version = f"{place.given.path} {getattr(loaded, '_fingerprint', '')}" if is_hub else ""
    if hasattr(loaded, "with_format"):
        loaded = loaded.with_format(None)  # a saved numpy or torch format would come back as arrays
    return replace(dataset_source(loaded, place.given, name, files, version), selection=note)


def _load_from_disk(folder: Path, given: GivenPath) -> Any:
    datasets = _import_datasets(given)
    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{given} cannot be loaded by datasets: {first_line(error)}; save it again") from error


def _open_hub(place: Place, use: SplitUse) -> Source:
    datasets = _import_datasets(place.given)
    try:
        # All splits, which the library prepares in any case.
        loaded = datasets.load_dataset(place.base, place.config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if configs := re.search(r"available configs: \[(.*?)\]", str(error)):
            raise UserError(
                f"{place.given} has several configurations, {configs[1]}; name one, as {place.base}:CONFIG"
            ) from error
        raise UserError(
            f"{place.given} is not a local file or folder, and the hub does not have it: {first_line(error)}; "
            "check the name, or download it and give the folder"
        ) from error
    return _split_source(loaded, place, None, use, name=place.given.path, is_hub=True)


def _import_datasets(given: GivenPath) -> Any:
    """The library, a second's import that plain files do not need."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(
            f"{given} is no file and no folder of files, and needs the package datasets, which is not there; "
            "pip install datasets, or check the path"
        ) from None
    return datasets
