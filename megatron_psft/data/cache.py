"""Tokenized sources on disk: written once, by one process, and mapped into memory by all.

A source's folder holds flat arrays, so that opening it reads nothing but the index, and a record is one slice:

* `tokens.bin` int32 and `label_mask.bin` bool: all records one after the other;
* `index.bin`: one entry of `tokenizing.INDEX` per record;
* `bad.jsonl`: the rows that are no record, with their places;
* `manifest.json`: sizes and hashes of these, and the key, whose hash is the folder's name; last changed when the folder
  was last used.

The folder is written aside and renamed in one move: it is whole or not there. A lock keeps a second run from doing the
same work; where a file system has no locks both work, and the first to finish wins.
"""

import ast
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_psft.data.chat import ChatRenderer, LossOn, RenderSettings
from megatron_psft.data.example import Example
from megatron_psft.data.files import BadRecord, Source
from megatron_psft.data.formats import RecordKeys
from megatron_psft.data.template import template_texts
from megatron_psft.data.tokenizing import (
    INDEX,
    ChunkTokenizer,
    TokenizedChunk,
    checksum,
    tokenize_chunks,
)
from megatron_psft.errors import RankError, UserError, counted, storage_error
from megatron_psft.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "manifest.json"
_SIZED_FILES = ("tokens.bin", "label_mask.bin", "index.bin", "bad.jsonl")
_HASHED_FILES = ("index.bin", "bad.jsonl")  # small; the records have a checksum each, compared when one is read

log = logging.getLogger(__name__)


class DamagedCacheError(RankError):
    """A record is not what was written; it is found while other ranks train."""


@dataclass(frozen=True, kw_only=True)
class TokenizedSource:
    """All good records of a source, mapped into memory or held in it. `tokens`: int32 [total]; `label_mask`: bool
    [total]; `index` (of `tokenizing.INDEX`): [records]."""

    name: str
    folder: Path | None
    tokens: NDArray[np.int32]
    label_mask: NDArray[np.bool_]
    index: NDArray[np.void]
    file_names: tuple[str, ...]
    content: str
    """Hash over every token, label, border and advantage."""
    bad_counts: Mapping[str, int]
    """Rows that are no record, by reason."""
    in_use: BinaryIO | None = None
    """What tells others that the folder is in use, as long as it is open."""

    def __len__(self) -> int:
        return len(self.index)

    def example(self, record: int, length: int) -> Example:
        """The first `length` tokens of a record, copied. Raises DamagedCacheError where it is not as written."""
        entry = self.index[record]
        whole = slice(int(entry["offset"]), int(entry["offset"]) + int(entry["length"]))
        tokens, label_mask = np.array(self.tokens[whole]), np.array(self.label_mask[whole])
        if checksum(tokens, label_mask) != entry["crc32"]:
            raise DamagedCacheError(f"{self.folder} is damaged at {self.location(record)}; delete it and start again")
        return Example(
            tokens=tokens[:length],
            label_mask=label_mask[:length],
            advantage=float(entry["advantage"]),
            second_start=int(entry["second_start"]) or None,
        )

    @property
    def num_rows(self) -> int:
        """Rows that are records; some may have several sequences, and so entries of the index, each."""
        places = self.index[["file", "row"]]
        return len(places) - int((places[1:] == places[:-1]).sum())

    def location(self, record: int) -> str:
        """`path:N` of a record. Raises DamagedCacheError where there is no such file."""
        if not 0 <= self.index[record]["file"] < len(self.file_names):
            raise DamagedCacheError(f"{self.folder} is damaged at record {record}; delete it and start again")
        return f"{self.file_names[self.index[record]['file']]}:{self.index[record]['row']}"

    def bad_records(self) -> Iterator[BadRecord]:
        """The rows that are no record, in order. Raises UserError where the file of them is not as written."""
        if self.folder is None:
            return
        path = self.folder / "bad.jsonl"
        try:
            with path.open(encoding="utf-8") as file:
                for line in file:
                    yield BadRecord(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete {self.folder} and start again") from None


class DataCache:
    """The tokenized form of sources, for one tokenizer and one way to read rows.

    Raises UserError for a tokenizer that cannot render chats.
    """

    def __init__(
        self,
        root: str,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        keys: RecordKeys,
        loss_on: LossOn,
        num_workers: int,
        settings: RenderSettings | None = None,
    ) -> None:
        settings = settings or RenderSettings()
        self._root = Path(os.path.expanduser(root))
        self._tokenize = ChunkTokenizer(keys=keys, renderer=ChatRenderer(tokenizer, loss_on, settings))
        self._options = {
            **asdict(keys),
            **asdict(settings),
            "loss_on": loss_on,
            "tokenizer": _hash_of(tokenizer),
            "code": _hash_of_code(),
        }
        self._num_workers = num_workers

    def open(self, source: Source, *, show_progress: bool) -> TokenizedSource:
        """The tokenized source, from its folder or, the first time, into it.

        Raises UserError: a file that is broken as a whole or changes while it is read, a cache that cannot be written;
        InfrastructureError where it has no room, or its disk fails.
        """
        key = {**self._options, "files": _identity(source), "version": source.version}
        folder = self._root / _digest(json.dumps(key, sort_keys=True).encode())[:32]
        if (found := _open_folder(folder, source.name)) is not None:
            return found
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with _locked(folder.with_suffix(".lock")) as is_locked:
                if (found := _open_folder(folder, source.name)) is None:
                    self._make_folder(folder, source, key, is_locked=is_locked, show_progress=show_progress)
                    found = _open_folder(folder, source.name)
        except OSError as error:
            text = (
                f"data_cache_dir ({self._root}) cannot be written, or {source.given} not read: "
                f"{error.strerror or error}; make room or name another folder with --data-cache-dir"
            )
            raise storage_error(error, text) from error
        if found is None:
            raise UserError(f"data_cache_dir ({self._root}) does not keep what is written to it; name another folder")
        return found

    def _make_folder(
        self, folder: Path, source: Source, key: Mapping[str, Any], *, is_locked: bool, show_progress: bool
    ) -> None:
        # Host and process in the name: of what lies around only this host's leavings are surely nobody's, and only
        # where the lock is held. `cache_folders.py` knows these names, too.
        mine = f".{folder.name}.{socket.gethostname()}"
        if is_locked:
            for leaving in self._root.glob(f"{mine}.*"):
                shutil.rmtree(leaving, ignore_errors=True)
        staging = self._root / f"{mine}.{os.getpid()}.{time.time_ns()}"
        staging.mkdir()
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, staging, ignore_errors=True)
            shown = stack.enter_context(Progress("tokenizing", total=source.size, unit="B", is_shown=show_progress))
            chunks = tokenize_chunks(source.chunks(), self._tokenize, self._num_workers)
            manifest = _write_chunks(staging, stack.enter_context(closing(chunks)), shown)
            if _identity(source) != key["files"]:
                raise UserError(f"{source.given} changed while it was read; start again when it is complete")
            # Last, so that a folder without it is nothing, whatever a file system made of the order of writes.
            (staging / MANIFEST).write_text(json.dumps({**manifest, "key": key}, indent=1))
            if folder.exists():
                shutil.rmtree(folder)  # damaged, or `_open_folder` had taken it
            _move(staging, folder)


def _move(staging: Path, folder: Path) -> None:
    try:
        staging.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another run was quicker, where there is no lock
            raise


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds the lock of that name, and says so; false where the file system has no locks. A dead holder's is free."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except BlockingIOError:
            log.info("another run tokenizes the same data; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
            is_locked = True
        except OSError:
            is_locked = False
        yield is_locked


def _write_chunks(folder: Path, chunks: Iterator[TokenizedChunk], shown: Progress) -> dict[str, Any]:
    """Writes the chunks and returns the manifest."""
    file_names: dict[str, int] = {}
    bad_counts: Counter[str] = Counter()
    content = [hashlib.sha256() for _ in range(5)]
    num_tokens = num_records = 0
    with ExitStack() as stack:
        tokens, label_mask, index, bad = (
            stack.enter_context((folder / name).open("wb", buffering=2**20)) for name in _SIZED_FILES
        )
        for chunk in chunks:
            chunk.index["offset"] += num_tokens
            chunk.index["file"] = file_names.setdefault(chunk.name, len(file_names))
            columns = (chunk.index[name] for name in ("length", "second_start", "advantage"))
            for digest, part in zip(content, (*columns, chunk.tokens, chunk.label_mask), strict=True):
                digest.update(np.ascontiguousarray(part).data)
            _append(tokens, chunk.tokens)
            _append(label_mask, chunk.label_mask)
            _append(index, chunk.index)
            bad.writelines(json.dumps(asdict(record)).encode() + b"\n" for record in chunk.bad)
            bad_counts.update(record.reason for record in chunk.bad)
            num_tokens += len(chunk.tokens)
            num_records += len(chunk.index)
            shown.update(chunk.size, note=counted(num_records + bad_counts.total(), "record"))
    return {
        "records": num_records,
        "tokens": num_tokens,
        "file_names": list(file_names),
        "bad_counts": bad_counts,
        "content": _digest(b"".join(digest.digest() for digest in content)),
        "sizes": {name: (folder / name).stat().st_size for name in _SIZED_FILES},
        "hashes": {name: _digest_file(folder / name) for name in _HASHED_FILES},
    }


def _append(file: BinaryIO, array: NDArray[Any]) -> None:
    file.write(np.ascontiguousarray(array).view(np.uint8).data)


def _open_folder(folder: Path, name: str) -> TokenizedSource | None:
    """What a folder holds; None where it is not there, or damaged, which is logged."""
    if not folder.is_dir():
        return None
    try:
        in_use = _tell_use(folder / MANIFEST)
        manifest = json.loads((folder / MANIFEST).read_text())
        for file, size in manifest["sizes"].items():
            if (found := (folder / file).stat().st_size) != size:
                raise ValueError(f"{file} has {found} bytes instead of {size}")
        for file, expected in manifest["hashes"].items():
            if _digest_file(folder / file) != expected:
                raise ValueError(f"{file} is not what was written")
        return TokenizedSource(
            name=name,
            folder=folder,
            tokens=_map(folder / "tokens.bin", np.dtype("<i4")),
            label_mask=_map(folder / "label_mask.bin", np.dtype(np.bool_)),
            index=_map(folder / "index.bin", INDEX),
            file_names=tuple(manifest["file_names"]),
            content=manifest["content"],
            bad_counts=manifest["bad_counts"],
            in_use=in_use,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the tokenized data in %s is damaged and made again: %s", folder, error)
        return None


def _tell_use(manifest: Path) -> BinaryIO:
    """Tells `cache_folders.remove` that a folder is in use, until the file is closed, and notes the time of its last
    use. Where a file system has no locks, or may not be written to, it goes without."""
    file = manifest.open("rb", buffering=0)
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH)
    with suppress(OSError):
        os.utime(manifest)
    return file


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:  # where every row is bad; nothing cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)  # whose slices are quicker


def _identity(source: Source) -> list[tuple[str, int, int]]:
    """What changes when data does: path, bytes and time of the last change in nanoseconds of every file.

    A hash of the content would cost minutes per start for sets of hundreds of gigabytes. Copied or touched data is
    tokenized again; what is trained on does not depend on it.
    """
    paths = [Path(os.path.realpath(file)) for file in source.files]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _hash_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Everything that makes tokens of a chat, as it is in memory: libraries change what they read from a folder."""
    import tokenizers
    import transformers

    parts = [
        tokenizer.backend_tokenizer.to_str(),
        sorted(template_texts(tokenizer).items()),
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        (transformers.__version__, tokenizers.__version__),
    ]
    return _digest(json.dumps(parts).encode())


@functools.cache
def _hash_of_code(start: Path = Path(__file__)) -> str:
    """Of all that may change tokens: the code of this file and of what it imports of this room, directly or through
    others, so that nobody has to think of a version. Comments and docstrings do not count."""
    found: dict[str, str] = {}
    waiting = [start]
    while waiting:
        path = waiting.pop()
        if path.name in found:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found[path.name] = _without_texts(tree)
        modules = (node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
        names = (module.removeprefix("megatron_psft.data.") for module in modules)
        waiting += [file for name in names if (file := path.with_name(f"{name}.py")).is_file()]
    return _digest(json.dumps(sorted(found.items())).encode())


def _without_texts(tree: ast.Module) -> str:
    """The code with its docstrings, and strings below fields, taken out; comments are in no tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [line for line in node.body if not _is_text(line)]
    return ast.dump(tree)


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(2**20):
            digest.update(data)
    return digest.hexdigest()
