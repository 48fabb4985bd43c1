"""Local files, folders and hub datasets -> raw rows, each with the place it came from.

Nothing here knows what a record looks like (`records.py` does) and no single bad row stops the reading.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_psft.errors import UserError

MAX_LINE_BYTES = 64 * 2**20
"""A longer JSON line is a bad record: it would be some 16 million tokens, and a file without line ends fills memory."""

_PARQUET_BATCH_ROWS = 256  # the reader's default of 65,536 would hold gigabytes of long reasoning traces at once


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


def open_rows(path: str) -> Iterator[Row | BadRecord]:
    """Rows of a `.jsonl`, `.json` (array) or `.parquet` file, of a folder of such files or of one written by
    `datasets.save_to_disk`, or of the `train` split of a dataset on the hub.

    Whether `path` can be read is checked now; rows are read when the iterator is advanced.

    Raises UserError: no such file, unknown file type, empty folder, hub dataset that cannot be loaded; while iterating:
    a JSON or Parquet file that is broken as a whole.
    """
    # os.path and not pathlib: its answers stay False, and its text unchanged, for what cannot be a path at all.
    local = Path(os.path.expanduser(path))
    if os.path.isdir(local):
        _check_readable(local)
        if (local / "state.json").exists() or (local / "dataset_dict.json").exists():
            return _iter_dataset(_load_from_disk(local), str(local))
        files = sorted(file for file in local.iterdir() if _is_data_file(file))
        if not files:
            raise UserError(f"data ({path}) is a folder without any {_known_suffixes()} file; name one that has some")
        return itertools.chain.from_iterable(_open_file(file) for file in files)
    if os.path.exists(local):
        return _open_file(local)
    if _looks_like_path(path):
        raise UserError(f"data ({path}) does not exist; give a file, a folder or the ID of a dataset on the hub")
    return _iter_dataset(_load_from_hub(path), path)


def _open_file(path: Path) -> Iterator[Row | BadRecord]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"data ({path}) must be a {_known_suffixes()} file; convert or rename it")
    _check_readable(path)
    return reader(path)


def _check_readable(path: Path) -> None:
    if not os.access(path, os.R_OK):
        raise UserError(f"data ({path}) must be readable; change its permissions, or mend the link")


def _is_data_file(path: Path) -> bool:
    return path.suffix.lower() in _READERS and not path.name.startswith(".") and not path.is_dir()


def _looks_like_path(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~")) or Path(path).suffix.lower() in _READERS


def _iter_json_lines(path: Path) -> Iterator[Row | BadRecord]:
    with path.open("rb") as file:
        for number in itertools.count(1):
            # Bytes, cut at b"\n" only: text would also be cut at "\r", and end at the first byte that is no UTF-8.
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            source = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                _skip_rest_of_line(file, line)
                yield BadRecord(source=source, reason="line too long", detail=f"more than {MAX_LINE_BYTES} bytes")
            elif line.strip():
                yield _parse_line(line, source, encoding="utf-8-sig" if number == 1 else "utf-8")


def _skip_rest_of_line(file: BinaryIO, read: bytes) -> None:
    while read and not read.endswith(b"\n"):
        read = file.readline(MAX_LINE_BYTES)


def _parse_line(line: bytes, source: str, encoding: str) -> Row | BadRecord:
    try:
        return Row(source=source, value=json.loads(line.decode(encoding).rstrip("\r\n")))
    except UnicodeDecodeError as error:
        return BadRecord(source=source, reason="not UTF-8", detail=f"byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return BadRecord(source=source, reason="not JSON", detail=f"{error.msg} at column {error.colno}")
    except ValueError as error:  # an integer of thousands of digits
        return BadRecord(source=source, reason="not JSON", detail=_first_line(error))
    except RecursionError:
        return BadRecord(source=source, reason="nested too deeply")


def _iter_json_array(path: Path) -> Iterator[Row | BadRecord]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"data ({path}) must be UTF-8, byte {error.start + 1} is not; re-encode the file") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"data ({path}) must be one JSON array: {error.msg} at line {error.lineno}, column {error.colno}; "
            "a file with one object per line is named .jsonl"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"data ({path}) must be one JSON array: {_first_line(error)}; use .jsonl") from error
    if not isinstance(rows, list):
        raise UserError(f"data ({path}) must be a JSON array of objects, found {type(rows).__name__}; put it in [ ]")
    yield from (Row(source=f"{path}:{number}", value=row) for number, row in enumerate(rows, 1))


def _iter_parquet(path: Path) -> Iterator[Row | BadRecord]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                for index in range(batch.num_rows):
                    number += 1
                    yield _parse_arrow_row(batch, index, f"{path}:{number}")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data ({path}) cannot be read as Parquet: {_first_line(error)}; write it again") from error


def _parse_arrow_row(batch: pa.RecordBatch, index: int, source: str) -> Row | BadRecord:
    try:
        return Row(source=source, value=batch.slice(index, 1).to_pylist()[0])
    except UnicodeDecodeError:  # Arrow does not check strings when it reads them
        return BadRecord(source=source, reason="not UTF-8")


def _load_from_disk(folder: Path) -> Iterable[object]:
    import datasets  # a second's import, which plain files do not need

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"data ({folder}) cannot be loaded by datasets: {_first_line(error)}; save it again") from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            splits = ", ".join(loaded)
            raise UserError(f"data ({folder}) must have a train split, found {splits}; name the folder of one split")
        loaded = loaded["train"]
    return loaded.with_format(None)  # a saved numpy or torch format would come back as arrays


def _load_from_hub(dataset_id: str) -> Iterable[object]:
    import datasets

    try:
        return datasets.load_dataset(dataset_id, split="train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data ({dataset_id}) is no local file or folder and the hub does not give it: {_first_line(error)}; "
            "check the name, or download it and give the folder"
        ) from error


def _iter_dataset(rows: Iterable[object], name: str) -> Iterator[Row | BadRecord]:
    return (Row(source=f"{name}:{number}", value=row) for number, row in enumerate(rows, 1))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _known_suffixes() -> str:
    return " or ".join(_READERS)


_READERS: dict[str, Callable[[Path], Iterator[Row | BadRecord]]] = {
    ".jsonl": _iter_json_lines,
    ".json": _iter_json_array,
    ".parquet": _iter_parquet,
}
