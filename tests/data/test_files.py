"""Whatever lies in a file, reading it gives rows, bad records with their place, or an error the user can act on."""

import json
import os
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_psft.data import files
from megatron_psft.data.files import BadRecord, Row, open_rows
from megatron_psft.errors import UserError

ROWS = [{"a": 1}, {"a": 2}, {"a": 3}]


def write(path: Path, content: bytes | str) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_parquet(path: Path, rows: list[dict]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def values(path: str | Path) -> list[object]:
    rows = list(open_rows(str(path)))
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.value for row in rows]


def test_every_format_gives_the_same_rows_with_their_place(tmp_path):
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, ROWS)))
    write(tmp_path / "a.json", json.dumps(ROWS))
    write_parquet(tmp_path / "a.parquet", ROWS)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.json", "a.parquet", "saved"):
        expected = [Row(source=f"{tmp_path / name}:{i}", value=row) for i, row in enumerate(ROWS, 1)]
        assert list(open_rows(str(tmp_path / name))) == expected


def test_a_folder_is_its_data_files_in_order_of_name(tmp_path):
    write(tmp_path / "b.jsonl", '{"a": 2}')
    write(tmp_path / "a.JSON", '[{"a": 1}]')
    write_parquet(tmp_path / "c.parquet", [{"a": 3}])
    write(tmp_path / "README.md", "not data")
    write(tmp_path / "._a.jsonl", b"\0\5\26\7")
    (tmp_path / "d.jsonl").mkdir()
    assert values(tmp_path) == ROWS


def test_a_saved_dataset_with_splits_gives_its_train_split_as_plain_values(tmp_path):
    train = datasets.Dataset.from_list([{"a": [1, 2]}]).with_format("numpy")
    splits = datasets.DatasetDict({"test": datasets.Dataset.from_list([{"a": [3, 4]}]), "train": train})
    splits.save_to_disk(tmp_path / "saved")
    assert values(tmp_path / "saved") == [{"a": [1, 2]}]


def test_a_saved_dataset_without_train_split_names_those_it_has(tmp_path):
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="must have a train split, found test"):
        open_rows(str(tmp_path / "saved"))


def test_blank_lines_count_as_lines_but_not_as_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"a": 1}\r\n\n  \n{"a": "\u2028"}')
    assert list(open_rows(path)) == [
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
    bad, good = open_rows(path)
    assert isinstance(bad, BadRecord)
    assert (bad.source, bad.reason) == (f"{path}:1", reason)
    assert detail in bad.detail
    assert good == Row(source=f"{path}:2", value={"a": 2})


@pytest.mark.parametrize("length", [11, 19, 20, 21, 22, 30, 45])
def test_a_line_over_the_limit_is_a_bad_record_and_the_next_line_is_read(tmp_path, monkeypatch, length):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 10)
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n' + b"x" * length + b'\n{"a": 3}')
    assert list(open_rows(path)) == [
        Row(source=f"{path}:1", value={"a": 1}),
        BadRecord(source=f"{path}:2", reason="line too long", detail="more than 10 bytes"),
        Row(source=f"{path}:3", value={"a": 3}),
    ]


@given(content=st.binary(max_size=200))
def test_no_bytes_crash_the_reading_of_lines(tmp_path_factory, content):
    path = write(tmp_path_factory.mktemp("fuzz") / "a.jsonl", content)
    lines = [number for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    assert [row.source for row in open_rows(path)] == [f"{path}:{number}" for number in lines]


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
        list(open_rows(path))
    assert path in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_a_broken_parquet_file_is_a_user_error(tmp_path, content):
    path = write(tmp_path / "a.parquet", content)
    with pytest.raises(UserError, match=r"a\.parquet\) cannot be read as Parquet"):
        list(open_rows(path))


def test_a_parquet_row_that_is_no_unicode_is_a_bad_record(tmp_path):
    # Arrow refuses to make such strings of values, but takes them as they lie in memory or in a file.
    broken = pa.StringArray.from_buffers(3, *pa.array([b"a", b"\xff", b"c"], pa.binary()).buffers()[1:])
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"a": broken}), path)
    assert list(open_rows(path)) == [
        Row(source=f"{path}:1", value={"a": "a"}),
        BadRecord(source=f"{path}:2", reason="not UTF-8"),
        Row(source=f"{path}:3", value={"a": "c"}),
    ]


def test_parquet_rows_are_numbered_through_batches(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"a": i} for i in range(1000)])
    assert [(row.source, row.value) for row in open_rows(path)] == [(f"{path}:{i + 1}", {"a": i}) for i in range(1000)]


@pytest.mark.parametrize("path", ["/no/such", "./no_such", "../no_such", "~/no_such", "no/such.jsonl", "none.parquet"])
def test_a_path_that_does_not_exist_is_a_user_error_and_no_hub_id(path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"does not exist; give a file, a folder or the ID"):
        open_rows(path)


def test_an_id_without_the_library_of_the_hub_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"data \(some/set\) is no file .* pip install datasets, or check the path"):
        open_rows("some/set")


def test_other_files_and_empty_folders_are_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"must be a \.jsonl or \.json or \.parquet file"):
        open_rows(write(tmp_path / "a.csv", "a,b"))
    with pytest.raises(UserError, match="is a folder without any"):
        open_rows(str(tmp_path))


def test_a_dangling_link_in_a_folder_is_not_passed_over(tmp_path):
    write(tmp_path / "a.jsonl", '{"a": 1}')
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl\) must be readable"):
        list(open_rows(str(tmp_path)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_a_user_error(tmp_path):
    path = write(tmp_path / "a.jsonl", "{}")
    os.chmod(path, 0)
    with pytest.raises(UserError, match="must be readable"):
        open_rows(path)


def test_a_folder_that_datasets_cannot_load_is_a_user_error(tmp_path):
    write(tmp_path / "state.json", "{}")
    with pytest.raises(UserError, match="cannot be loaded by datasets"):
        open_rows(str(tmp_path))


def test_an_id_that_is_not_local_is_the_train_split_on_the_hub(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [{"name": name, "split": split}])
    assert list(open_rows("org/set")) == [Row(source="org/set:1", value={"name": "org/set", "split": "train"})]


def test_a_hub_dataset_has_a_version_of_its_content(monkeypatch):
    loaded = [datasets.Dataset.from_list(ROWS[:count]) for count in (1, 1, 2)]
    found = []
    for dataset in loaded:
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, dataset=dataset, **__: dataset)
        source = files.open_source("org/set")
        found.append(source.version)
        assert [row for chunk in source.chunks() for row in chunk.rows()] == [
            Row(source=f"org/set:{i}", value=row) for i, row in enumerate(dataset, 1)
        ]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    "error",
    [ConnectionError("no network\nat all"), ValueError("no network"), datasets.exceptions.DatasetsError("no network")],
)
def test_a_hub_that_fails_is_a_user_error_of_one_line(monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"\(org/set\) is not a local .* no network; check the name") as raised:
        open_rows("org/set")
    assert "\n" not in str(raised.value)
