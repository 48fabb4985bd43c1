"""Whatever lies in a file, reading it gives rows, bad records with their place, or an error the user can act on."""

import gzip
import json
import os
import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_psft.data import files
from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.sources import open_rows, open_source
from megatron_psft.errors import UserError

ROWS = [{"a": 1}, {"a": 2}, {"a": 3}]


def write(path: Path, content: bytes | str) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_parquet(path: Path, rows: list[dict]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def values(path: str | Path) -> list[object]:
    rows = list(open_rows(str(path), field="data"))
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.value for row in rows]


def test_every_format_gives_the_same_rows_with_their_place(tmp_path):
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, ROWS)))
    write(tmp_path / "a.json", json.dumps(ROWS))
    write_parquet(tmp_path / "a.parquet", ROWS)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.json", "a.parquet", "saved"):
        expected = [Row(source=f"{tmp_path / name}:{i}", value=row) for i, row in enumerate(ROWS, 1)]
        assert list(open_rows(str(tmp_path / name), field="data")) == expected


@pytest.mark.parametrize(("ending", "compression"), [("gz", "gzip"), ("zst", "zstd"), ("GZ", "gzip")])
def test_compressed_files_are_read_as_they_are(tmp_path, ending, compression):
    lines = [json.dumps({"a": number, "text": "ä" * (number % 50)}) for number in range(1000)]
    texts = {"a.jsonl": "\n".join(lines).encode(), "a.json": f"[{','.join(lines)}]".encode()}
    for name, text in texts.items():
        with pa.output_stream(str(tmp_path / f"{name}.{ending}"), compression=compression) as file:
            file.write(text)
        write(tmp_path / name, text)
        assert values(tmp_path / f"{name}.{ending}") == values(tmp_path / name) == [json.loads(line) for line in lines]


@pytest.mark.parametrize(("ending", "codec"), [("gz", "gzip"), ("zst", "zstd")])
def test_a_compressed_file_of_several_parts_is_read_to_its_end(tmp_path, ending, codec):
    parts = [pa.compress(b'{"a": %d}\n' % number, codec, asbytes=True) for number in (1, 2, 3)]
    if codec == "gzip":
        parts = [gzip.compress(b'{"a": %d}\n' % number) for number in (1, 2, 3)]
    assert values(write(tmp_path / f"a.jsonl.{ending}", b"".join(parts))) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("ending", "harm"),
    [("gz", "truncated"), ("gz", "other"), ("gz", "changed"), ("zst", "truncated"), ("zst", "other")],
)
def test_a_compressed_file_that_is_damaged_is_a_user_error(tmp_path, ending, name, harm):
    text = json.dumps([{"a": random.Random(0).random()} for _ in range(5000)]).encode()
    whole = gzip.compress(text) if ending == "gz" else pa.compress(text, "zstd", asbytes=True)
    content = {"truncated": whole[: len(whole) // 2], "other": text, "changed": whole[:20] + b"\xff" * 20 + whole[40:]}
    path = write(tmp_path / f"{name}.{ending}", content[harm])
    with pytest.raises(UserError, match=rf"{name}\.{ending}\) cannot be read as (gzip|zstd): .+; compress it again"):
        list(open_rows(path, field="data"))


def test_chunks_of_a_compressed_file_add_up_to_its_size(tmp_path):
    text = b"".join(b'{"a": "%d"}\n' % random.Random(number).getrandbits(400) for number in range(5000))
    source = open_source(write(tmp_path / "a.jsonl.gz", gzip.compress(text)), field="data")
    sizes = [chunk.size for chunk in source.chunks()]
    assert sum(sizes) == source.size
    assert sizes.count(0) < len(sizes) * 0.8  # a bar that moves


def test_blank_lines_count_as_lines_but_not_as_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"a": 1}\r\n\n  \n{"a": "\u2028"}')
    assert list(open_rows(path, field="data")) == [
        Row(source=f"{path}:1", value={"a": 1}),
        Row(source=f"{path}:4", value={"a": "\u2028"}),
    ]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b'{"a": 1', "not JSON", "Expecting ',' delimiter at column 8"),
        (b"{'a': 1}", "not JSON", "at column 2"),
        (b'{"a": "\xff"}', "not UTF-8", "byte 8 of the line"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8", "byte 8"),
        (b'{"a": "\0"}', "not JSON", "Invalid control character"),
        (b"{\0}", "not JSON", "at column 2"),
        (b"\xff\xfe{\0}\0", "not UTF-8", "byte 1"),
        (b"[" * 100_000, "nested too deeply", ""),
        (b'{"a":' * 100_000, "nested too deeply", ""),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON", "integer string"),
    ],
)
def test_a_broken_line_is_a_bad_record_and_the_next_line_is_read(tmp_path, line, reason, detail):
    path = write(tmp_path / "a.jsonl", line + b'\n{"a": 2}\n')
    bad, good = open_rows(path, field="data")
    assert isinstance(bad, BadRecord)
    assert (bad.source, bad.reason) == (f"{path}:1", reason)
    assert detail in bad.detail
    assert good == Row(source=f"{path}:2", value={"a": 2})


@pytest.mark.parametrize("length", [11, 19, 20, 21, 22, 30, 45])
def test_a_line_over_the_limit_is_a_bad_record_and_the_next_line_is_read(tmp_path, monkeypatch, length):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 10)
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n' + b"x" * length + b'\n{"a": 3}')
    assert list(open_rows(path, field="data")) == [
        Row(source=f"{path}:1", value={"a": 1}),
        BadRecord(source=f"{path}:2", reason="line too long", detail="more than 10 bytes"),
        Row(source=f"{path}:3", value={"a": 3}),
    ]


@given(content=st.binary(max_size=200))
def test_no_bytes_crash_the_reading_of_lines(tmp_path_factory, content):
    path = write(tmp_path_factory.mktemp("fuzz") / "a.jsonl", content)
    lines = [number for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    assert [row.source for row in open_rows(path, field="data")] == [f"{path}:{number}" for number in lines]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n{"a" 2}]', "Expecting ':' delimiter at line 2, column 6"),
        (b'{"a": 1}\n{"a": 2}', r"Extra data at line 2, column 1; a file with one object per line is named \.jsonl"),
        (b'{"a": 1}', "must be a JSON array of objects, found dict"),
        (b'["\xff"]', "must be UTF-8, byte 3 is not"),
        (b"[" * 100_000, "must be one JSON array: .*recursion"),
        (b"", "Expecting value at line 1, column 1"),
    ],
)
def test_a_json_file_that_is_broken_as_a_whole_is_a_user_error(tmp_path, content, message):
    path = write(tmp_path / "a.json", content)
    with pytest.raises(UserError, match=message) as error:
        list(open_rows(path, field="data"))
    assert path in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_a_broken_parquet_file_is_a_user_error(tmp_path, content):
    path = write(tmp_path / "a.parquet", content)
    with pytest.raises(UserError, match=r"a\.parquet\) cannot be read as Parquet"):
        list(open_rows(path, field="data"))


def test_a_parquet_row_that_is_no_unicode_is_a_bad_record(tmp_path):
    # Arrow refuses to make such strings of values, but takes them as they lie in memory or in a file.
    broken = pa.StringArray.from_buffers(3, *pa.array([b"a", b"\xff", b"c"], pa.binary()).buffers()[1:])
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"a": broken}), path)
    assert list(open_rows(path, field="data")) == [
        Row(source=f"{path}:1", value={"a": "a"}),
        BadRecord(source=f"{path}:2", reason="not UTF-8"),
        Row(source=f"{path}:3", value={"a": "c"}),
    ]


def test_parquet_rows_are_numbered_through_batches(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"a": i} for i in range(1000)])
    assert [(row.source, row.value) for row in open_rows(path, field="data")] == [
        (f"{path}:{i + 1}", {"a": i}) for i in range(1000)
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_a_user_error(tmp_path):
    path = write(tmp_path / "a.jsonl", "{}")
    os.chmod(path, 0)
    with pytest.raises(UserError, match="must be readable"):
        open_rows(path, field="data")
