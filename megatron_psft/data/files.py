"""Files -> raw rows, each with the place it came from; `sources.py` says which files.

Rows come in chunks that are cheap to read and to hand to another process; what costs time, such as parsing JSON,
happens when a chunk's rows are taken. Nothing here knows what a record looks like (`records.py` does) and no single
bad row stops the reading.
"""

import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_psft.data.file_names import (
    COMPRESSIONS,
    JSON_ARRAY,
    JSON_LINES,
    KNOWN_FILES,
    PARQUET,
    endings,
    is_known,
)
from megatron_psft.data.given import GivenPath
from megatron_psft.errors import UserError, first_line

MAX_LINE_BYTES = 64 * 2**20
"""A longer JSON line is a bad record: it would be some 16 million tokens, and a file without line ends fills memory."""

# Enough to keep a tokenizer busy, little enough to hold: a batch of Parquet's 65,536 may be gigabytes.
_CHUNK_ROWS = 256
_CHUNK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One decoded row. `source` is `path:N`: the line (JSON lines) or the row (JSON, Parquet, datasets), from 1."""

    source: str
    value: object


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A row that cannot be trained on. `reason` is one of a few texts, to be counted; `detail` is about this row."""

    source: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class Chunk(Protocol):
    """Consecutive rows of one file, not parsed yet."""

    @property
    def name(self) -> str:
        """The file; the hub dataset's ID."""

    @property
    def size(self) -> int:
        """Bytes of the source's files that these rows are, for a progress bar; to rounding."""

    def rows(self) -> Iterator[Row | BadRecord]:
        """The rows in order. Raises nothing: what cannot be parsed is a `BadRecord`."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What one path of records stands for. `files` hold its content: if they have not changed, neither has it."""

    given: GivenPath
    name: str
    files: tuple[Path, ...]
    chunks: Callable[[], Iterator[Chunk]]
    version: str = ""
    """What tells the contents of a hub dataset apart, whose files may be in memory only."""
    selection: str = ""
    """One line on which files are read, and which are left out and why; empty where the path is that of a file."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)


def file_source(given: GivenPath, name: str, files: tuple[Path, ...]) -> Source:
    """The rows of the files, one file after the other. Raises UserError for one of unknown type or not readable."""
    each = [given.at(file) for file in files]
    for file in each:
        if not is_known(file.path):
            raise UserError(f"{file} must be a {KNOWN_FILES} file; convert or rename it")
        check_readable(file)
    return Source(
        given=given,
        name=name,
        files=files,
        chunks=lambda: itertools.chain.from_iterable(map(_read_file, each)),
    )


def dataset_source(
    rows: Sequence[object], given: GivenPath, name: str, files: tuple[Path, ...], version: str = ""
) -> Source:
    """Rows that the library `datasets` has loaded, from `files`."""
    size_of_row = sum(file.stat().st_size for file in files) // max(len(rows), 1)
    return Source(
        given=given,
        name=name,
        files=files,
        version=version,
        chunks=lambda: _chunks_of_values(map(_without_nulls, rows), name, size_of_row),
    )


def check_readable(given: GivenPath) -> None:
    """Raises UserError where this process may not read a file or folder, or it is a link to nothing."""
    if not os.access(given.path, os.R_OK):
        raise UserError(f"{given} must be readable; change its permissions, or fix the link")


def _read_file(given: GivenPath) -> Iterator[Chunk]:
    return _READERS[endings(given.path)[0]](given)


@contextmanager
def _opened(given: GivenPath) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """The file's content, decompressed while it is read, and a function that says how many bytes of the file are read.

    Raises UserError where it cannot be decompressed.
    """
    compression = COMPRESSIONS.get(endings(given.path)[1])
    with open(given.path, "rb") as file:
        if compression is None:
            yield file, file.tell
            return
        try:
            with pa.CompressedInputStream(file, compression) as stream:
                yield cast(BinaryIO, io.BufferedReader(stream)), file.tell
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{given} cannot be read as {compression}: {first_line(error)}; compress it again"
            ) from error


@dataclass(frozen=True, kw_only=True)
class _Lines:
    """JSON lines, from number `first`, as bytes; None stands for one that is too long."""

    name: str
    size: int
    first: int
    lines: Sequence[bytes | None]

    def rows(self) -> Iterator[Row | BadRecord]:
        for number, line in enumerate(self.lines, self.first):
            source = f"{self.name}:{number}"
            if line is None:
                yield BadRecord(source=source, reason="line too long", detail=f"more than {MAX_LINE_BYTES} bytes")
            elif line.strip():
                yield _parse_line(line, source, encoding="utf-8-sig" if number == 1 else "utf-8")


def _read_json_lines(given: GivenPath) -> Iterator[Chunk]:
    with _opened(given) as (file, position):
        lines = _iter_lines(file)
        first, read = 1, 0
        while chunk := _take_chunk(lines):
            yield _Lines(name=given.path, size=position() - read, first=first, lines=[line for line, _ in chunk])
            first, read = first + len(chunk), position()


def _iter_lines(file: BinaryIO) -> Iterator[tuple[bytes | None, int]]:
    """(line or None, bytes) of each line."""
    # Bytes, cut at b"\n" only: text would also be cut at "\r", and end at the first byte that is no UTF-8.
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line, len(line)
        else:
            size = len(line)
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
                size += len(line)
            yield None, size


def _take_chunk(lines: Iterator[tuple[bytes | None, int]]) -> list[tuple[bytes | None, int]]:
    chunk, size = [], 0
    for line in lines:
        chunk.append(line)
        size += line[1]
        if len(chunk) == _CHUNK_ROWS or size >= _CHUNK_BYTES:
            break
    return chunk


def _parse_line(line: bytes, source: str, encoding: str) -> Row | BadRecord:
    try:
        text = line.decode(encoding).rstrip("\r\n")
        return Row(source=source, value=json.loads(text, object_pairs_hook=_object_of))
    except UnicodeDecodeError as error:
        return BadRecord(source=source, reason="not UTF-8", detail=f"byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return BadRecord(source=source, reason="not JSON", detail=f"{_what(error)} at column {error.colno}")
    except ValueError as error:  # an integer of thousands of digits, or a key that comes twice
        return BadRecord(source=source, reason="not JSON", detail=first_line(error))
    except RecursionError:
        return BadRecord(source=source, reason="nested too deeply")


def _what(error: json.JSONDecodeError) -> str:
    """What is wrong, without the place; some of Python's texts end with the "at" before it."""
    return error.msg.removesuffix(" at")


def _object_of(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Raises ValueError for a key that comes twice, of which JSON's own reader takes the last in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r:.40} comes twice in an object")
    return found


@dataclass(frozen=True, kw_only=True)
class _Values:
    """Rows that are Python values already, from number `first`."""

    name: str
    size: int
    first: int
    values: Sequence[object]

    def rows(self) -> Iterator[Row]:
        return (Row(source=f"{self.name}:{number}", value=row) for number, row in enumerate(self.values, self.first))


def _read_json_array(given: GivenPath) -> Iterator[Chunk]:
    try:
        with _opened(given) as (file, _):
            rows = json.loads(file.read().decode("utf-8-sig"), object_pairs_hook=_object_of)
    except UnicodeDecodeError as error:
        raise UserError(f"{given} must be UTF-8, byte {error.start + 1} is not; re-encode the file") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{given} must be one JSON array: {_what(error)} at line {error.lineno}, column {error.colno}; "
            "a file with one object per line is named .jsonl"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{given} must be one JSON array: {first_line(error)}; use .jsonl") from error
    if not isinstance(rows, list):
        raise UserError(f"{given} must be a JSON array of objects, found {type(rows).__name__}; put it in [ ]")
    return _chunks_of_values(rows, given.path, os.path.getsize(given.path) // max(len(rows), 1))


def _chunks_of_values(rows: Iterable[object], name: str, size_of_row: int) -> Iterator[Chunk]:
    rows = iter(rows)
    first = 1
    while values := list(itertools.islice(rows, _CHUNK_ROWS)):
        yield _Values(name=name, size=size_of_row * len(values), first=first, values=values)
        first += len(values)


@dataclass(frozen=True, kw_only=True)
class _Table:
    """Rows of an Arrow table, from number `first`."""

    name: str
    size: int
    first: int
    batch: pa.RecordBatch

    def rows(self) -> Iterator[Row | BadRecord]:
        for index in range(self.batch.num_rows):
            source = f"{self.name}:{self.first + index}"
            try:
                (value,) = self.batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError:  # Arrow does not check strings when it reads them
                yield BadRecord(source=source, reason="not UTF-8")
            except (ValueError, OverflowError, pa.ArrowException) as error:  # such as a date before the year 1
                yield BadRecord(source=source, reason="not readable", detail=first_line(error))
            else:
                yield Row(source=source, value=_without_nulls(value))


def _without_nulls(value: object) -> object:
    """Without the fields that are null: columns spell so what a row has not, and all rows share the fields of a nested
    column, such as the arguments of all tools."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_parquet(given: GivenPath) -> Iterator[Chunk]:
    first = 1
    try:
        with pq.ParquetFile(given.path) as file:
            size_of_row = os.path.getsize(given.path) // max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=_CHUNK_ROWS):
                yield _Table(name=given.path, size=size_of_row * batch.num_rows, first=first, batch=batch)
                first += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{given} cannot be read as Parquet: {first_line(error)}; write it again") from error


_READERS: dict[str, Callable[[GivenPath], Iterator[Chunk]]] = {
    JSON_LINES: _read_json_lines,
    JSON_ARRAY: _read_json_array,
    PARQUET: _read_parquet,
}
