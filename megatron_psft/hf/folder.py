"""The folder of an export: what may be replaced there, and how.

Its manifest lists what an export wrote, with checksums. Only that is ever replaced or removed, and only as long as it
is what was written.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from megatron_psft.atomic import aside, exchange, is_aside, sync
from megatron_psft.errors import UserError, folder_error
from megatron_psft.sealed import MARKER, FileSums, file_sum

MANIFEST = "psft_export.json"
CONFIG = "config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMED_TEMPLATES = "additional_chat_templates"

GENERATION_CONFIG = "generation_config.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    f"{NAMED_TEMPLATES}/*.jinja",
)
"""What belongs to a tokenizer, as patterns."""

PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""How a model that sees wants its pixels."""

_LOADED = (
    *(MANIFEST, CONFIG, GENERATION_CONFIG, ADAPTER_CONFIG, ADAPTER_WEIGHTS),
    *(*TOKENIZER_FILES, *PROCESSOR_FILES, "model*.safetensors", "model.safetensors.index.json"),
)
"""What an export may write, and whoever loads the folder may read."""

_CONFIGS = (CONFIG, ADAPTER_CONFIG)
"""Without one nothing loads the folder."""


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    """What an export wrote."""

    files: FileSums
    replaced: FileSums = field(default_factory=dict)
    """Of a folder that is being replaced file by file: those of the earlier export, of which some may be left."""
    is_complete: bool = True

    def has_written(self, name: str) -> bool:
        return name in self.files or name in self.replaced

    def text(self) -> str:
        content = {"complete": self.is_complete, "files": self.files}
        return json.dumps(content | ({"replaced": self.replaced} if self.replaced else {}), indent=1) + "\n"

    def write(self, staging: Path, target: Path) -> None:
        """Puts the manifest into `target` in one move from `staging`, which may be the same."""
        (staging / MANIFEST).write_text(self.text(), encoding="utf-8")
        sync(staging / MANIFEST)
        (staging / MANIFEST).replace(target / MANIFEST)
        sync(target)


def check_apart(option: str, target: Path, needed: Iterable[tuple[str, Path]]) -> None:
    """Raises UserError where an export's folder is the working directory, or holds it, or what a run needs.

    Args:
        option: the field of the configuration that names `target`, for errors.
        target: the folder that the export writes.
        needed: folders and files, with the names of their fields.
    """
    place = target.resolve()
    if Path.cwd().is_relative_to(place):
        raise UserError(f"{option} ({target}) is or holds the working directory; name another folder")
    for name, path in needed:
        if path.resolve().is_relative_to(place):
            raise UserError(f"{option} ({target}) is or holds {name} ({path}); name another folder")


def check_target(option: str, target: Path) -> None:
    """Raises UserError where an export would fail, or touch what no export wrote; `option` names `target` in errors."""
    check_apart(option, target, [])
    if target.exists():
        _check_content(option, target)
    try:
        target.resolve().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise folder_error(option, target, error) from None


def check_unchanged(option: str, target: Path) -> FileSums:
    """Returns what of an earlier export is in `target`, and reads all of it. Raises UserError for a changed file."""
    earlier = _read_manifest(option, target)
    found: FileSums = {}
    for name in () if earlier is None else sorted(earlier.files | earlier.replaced):
        if not os.path.lexists(target / name):
            continue
        known = [] if earlier is None else [sums[name] for sums in (earlier.files, earlier.replaced) if name in sums]
        if not (target / name).is_file() or (file := file_sum(target / name)) not in known:
            raise UserError(
                f"{option} ({target}): {name} has changed since an export wrote it, and would be replaced; "
                "move it away, or name another folder"
            )
        found[name] = file
    return found


def _check_content(option: str, target: Path) -> None:
    """Of a target that exists."""
    if not target.is_dir():
        raise UserError(f"{option} ({target}) must be a folder; name another")
    if (target / MARKER).exists():
        raise UserError(f"{option} ({target}) is a checkpoint; name another folder")
    earlier = _read_manifest(option, target)
    present = [path for path in target.iterdir() if not is_aside(path)]
    if earlier is None and present:
        raise UserError(
            f"{option} ({target}) holds {min(path.name for path in present)}, and no {MANIFEST}, which every export "
            "leaves; name an empty or new folder"
        )
    if earlier is not None:
        inner = [path for path in (target / NAMED_TEMPLATES).glob("*") if path.is_file()]
        for path in sorted(present + inner):
            name = path.relative_to(target).as_posix()
            if name != MANIFEST and not earlier.has_written(name) and _is_loaded(name):
                raise UserError(
                    f"{option} ({target}) holds {name}, which no export wrote, and which would be taken for a part of "
                    "the model; move it away, or name another folder"
                )


def _read_manifest(option: str, target: Path) -> _Manifest | None:
    path = target / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files, replaced = (
            {str(name): (int(size), str(checksum)) for name, (size, checksum) in content.get(key, {}).items()}
            for key in ("files", "replaced")
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{option} ({target}): {MANIFEST} is not as an export wrote it; name another folder") from None
    outside = next((name for name in files | replaced if not _is_loaded(name)), None)
    if outside is not None:  # it may lead anywhere
        raise UserError(f"{option} ({target}): {MANIFEST} names {outside}, which no export writes; name another folder")
    return _Manifest(files=files, replaced=replaced)


def _is_loaded(name: str) -> bool:
    """Of a path within an export's folder."""
    folder, _, file = name.rpartition("/")
    return folder in ("", NAMED_TEMPLATES) and file != ".." and any(fnmatch(name, pattern) for pattern in _LOADED)


@contextmanager
def replacing(target: Path, option: str) -> Iterator[Path]:
    """An empty folder to write an export in; at the end its files are what `target` has of exports.

    Where `target` holds nothing but an earlier export, it is replaced as a whole, in one step if the file system can.
    Where it holds more, which stays, or is a place that cannot be renamed, it is replaced file by file: it then has no
    config.json (an adapter: adapter_config.json), so that nothing loads it, until all files are there. Whatever goes
    wrong before leaves it as it was.

    Raises:
        UserError: `target` holds what may not be replaced; `option` is the field that names it.
    """
    target = target.resolve()
    check_target(option, target)
    is_shared = target.exists() and not _is_alone(target, option)
    with aside(target if is_shared else target.parent, "export" if is_shared else target.name) as folder:
        yield folder
        _give_modes(folder)
        files: FileSums = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            sync(path)
            files[path.relative_to(folder).as_posix()] = file_sum(path)
        check_target(option, target)  # it has been a while
        earlier = check_unchanged(option, target)
        if is_shared:
            _move_in(folder, target, files, earlier)
        else:
            _swap(folder, target, files, option)


def _is_alone(target: Path, option: str) -> bool:
    """Whether an existing folder has nothing but an earlier export, and may have another name for a moment."""
    if os.path.ismount(target) or not os.access(target.parent, os.W_OK | os.X_OK):
        return False
    manifest = _read_manifest(option, target)
    return all(_is_written(path, manifest) for path in target.iterdir())


def _is_written(path: Path, manifest: _Manifest | None) -> bool:
    """Whether an entry of an export's folder, of which all that is loaded has been checked, comes from an export."""
    if path.is_dir():
        return path.name == NAMED_TEMPLATES and all(it.is_file() for it in path.iterdir())
    return path.name == MANIFEST or (manifest is not None and manifest.has_written(path.name))


def _give_modes(folder: Path) -> None:
    """Gives all files the mode of a new one, as the umask has it; safetensors writes for the owner alone."""
    mode = next(folder / name for name in _CONFIGS if (folder / name).exists()).stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _swap(folder: Path, target: Path, files: FileSums, option: str) -> None:
    _Manifest(files=files).write(folder, folder)
    if not target.exists():
        folder.rename(target)
    else:
        earlier = _read_manifest(option, target)
        shutil.copymode(target, folder)
        exchange(folder, target)
        for path in folder.iterdir():
            if not _is_written(path, earlier):  # it came in the moment before
                path.rename(target / path.name)
    sync(target.parent)


def _move_in(folder: Path, target: Path, files: FileSums, earlier: FileSums) -> None:
    _Manifest(files=files, replaced=earlier, is_complete=False).write(folder, target)
    for name in _CONFIGS:
        (target / name).unlink(missing_ok=True)
    sync(target)
    for name in earlier:
        if name not in files:
            (target / name).unlink(missing_ok=True)
    for name in sorted(files, key=lambda name: name in _CONFIGS):
        (target / name).parent.mkdir(exist_ok=True)
        (folder / name).replace(target / name)
    templates = target / NAMED_TEMPLATES
    if templates.is_dir() and not any(templates.iterdir()):
        templates.rmdir()
    sync(target)
    _Manifest(files=files).write(folder, target)
