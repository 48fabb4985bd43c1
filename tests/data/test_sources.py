"""Whatever a `--data` path stands for, what is read is what was meant, and what is not read is named."""

import json
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_psft.data.files import Row
from megatron_psft.data.given import GivenPath
from megatron_psft.data.places import folder_of
from megatron_psft.data.sources import open_rows, open_source
from megatron_psft.errors import UserError

ROWS = [{"a": 1}, {"a": 2}, {"a": 3}]


def fill(folder: Path, *names: str) -> Path:
    """Writes files whose one row is their own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"file": name}
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist([row]), path)
        elif name.endswith(".gz"):
            with pa.output_stream(str(path), compression="gzip") as file:
                file.write(json.dumps(row).encode())
        else:
            path.write_text(json.dumps([row] if name.lower().endswith(".json") else row))
    return folder


def read(path: str | Path, **options) -> list[str]:
    """The files that are read, which `fill` has written."""
    return [row.value["file"] for row in open_rows(str(path), **options, field="data")]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["train.jsonl", "test.jsonl"], ["train.jsonl"]),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
         ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
        (["data/train-00000-of-00002-a09b74b3ef9c3b56.parquet", "data/train-00001-of-00002-0123456789abcdef.parquet",
          "data/test-00000-of-00001-ffffffffffffffff.parquet"],
         ["data/train-00000-of-00002-a09b74b3ef9c3b56.parquet", "data/train-00001-of-00002-0123456789abcdef.parquet"]),
        (["train_2024-01-02.jsonl", "train_2024-02-02.jsonl", "train_2023.jsonl", "test_2024-01-02.jsonl"],
         ["train_2023.jsonl", "train_2024-01-02.jsonl", "train_2024-02-02.jsonl"]),
        (["train/0000.parquet", "train/0001.parquet", "test/0000.parquet"],
         ["train/0000.parquet", "train/0001.parquet"]),
        (["train/a.jsonl", "train/b.jsonl", "validation/a.jsonl"], ["train/a.jsonl", "train/b.jsonl"]),
        (["data/train/test_cases.jsonl", "data/test/train_like.jsonl"], ["data/train/test_cases.jsonl"]),
        (["train_sft.parquet", "test_sft.parquet"], ["train_sft.parquet"]),
        (["gsm8k_train.jsonl", "gsm8k_test.jsonl"], ["gsm8k_train.jsonl"]),
        (["TRAIN.JSONL", "Dev.jsonl"], ["TRAIN.JSONL"]),
        (["trainSet.jsonl", "testset.jsonl"], ["trainSet.jsonl"]),
        (["train.1.jsonl", "train.2.jsonl", "valid.jsonl"], ["train.1.jsonl", "train.2.jsonl"]),
        (["training.jsonl.gz", "evaluation.jsonl.gz"], ["training.jsonl.gz"]),
        (["train.jsonl", "eval.jsonl", "val.jsonl", "dev.jsonl", "holdout.jsonl", "all.jsonl"], ["train.jsonl"]),
        (["math.jsonl", "code.jsonl", "test.jsonl"], ["code.jsonl", "math.jsonl"]),
        # Names without other splits are read as ever.
        (["train.jsonl", "extra.jsonl"], ["extra.jsonl", "train.jsonl"]),
        (["b.jsonl", "a.JSON", "c.parquet"], ["a.JSON", "b.jsonl", "c.parquet"]),
        (["latest.jsonl", "contest.jsonl", "devops.jsonl", "evaluate.jsonl", "constraint.jsonl"],
         ["constraint.jsonl", "contest.jsonl", "devops.jsonl", "evaluate.jsonl", "latest.jsonl"]),
        (["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"],
         ["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"]),
    ],
)  # fmt: skip
def test_a_folder_of_several_splits_gives_its_training_split(tmp_path, names, wanted):
    source = open_source(str(fill(tmp_path, *names)), field="data")
    assert read(tmp_path) == wanted
    assert [str(file.relative_to(tmp_path)) for file in source.files] == wanted
    listed, left = source.selection.split("; left out: ")
    assert listed == f"{tmp_path}: {len(wanted)} of {len(names)} files read: {', '.join(wanted)}"
    assert all((name in left) == (name not in wanted) for name in names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train_sft.jsonl", "train_gen.jsonl", "test_sft.jsonl"],
         "has several training splits, train_gen, train_sft; say which by its name, as {0}@train_gen or {0}@train_sft"),
        (["train_sft/a.jsonl", "train_prefs/a.jsonl"], "has several training splits, train_prefs, train_sft"),
        (["test.jsonl"], "has no training split, only test; say which by its name, as {0}@test"),
        (["valid-00000-of-00001.parquet", "data/test.jsonl"], "has no training split, only test, valid"),
        (["math-00000-of-00001.parquet", "code-00000-of-00001.parquet"], "has several splits, code, math; say which"),
        (["main/train.jsonl", "socratic/train.jsonl"],
         "without any .jsonl, .json or .parquet file; it has main/ (a sub-folder), socratic/ (a sub-folder); name one"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_say_what_to_train_on_is_refused(tmp_path, names, message):
    with pytest.raises(UserError) as error:
        open_source(str(fill(tmp_path, *names)), field="data")
    assert message.format(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("place", "wanted"),
    [
        ("set@test", ["test.jsonl"]),
        ("set@TEST", ["test.jsonl"]),
        ("set@validation", ["val.jsonl"]),
        ("set@train_sft", ["train_sft/a.jsonl"]),
        ("set@aime24", ["aime24-00000-of-00001.jsonl"]),
        ("set:sub", ["set/sub/train.jsonl"]),
        ("set:sub@test", ["set/sub/test.jsonl"]),
    ],
)
def test_a_part_of_a_folder_is_named(tmp_path, place, wanted):
    fill(
        tmp_path / "set",
        "train_sft/a.jsonl",
        "train_gen/a.jsonl",
        "test.jsonl",
        "val.jsonl",
        "aime24-00000-of-00001.jsonl",
    )
    fill(tmp_path, "set/sub/train.jsonl", "set/sub/test.jsonl")
    assert read(tmp_path / place) == wanted
    assert ": 1 of " in open_source(str(tmp_path / place), field="data").selection


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("set@tests", "names the split tests, but it has the splits test, train; did you mean test?"),
        ("set@validation", "names the split validation, but it has the splits"),
        ("set:other", "names the sub-folder other, but "),
        ("set@", "must have a name before and after : and @"),
        ("set:@train", "must have a name before and after : and @"),
        ("set/train.jsonl@test", "is a file and read whole; remove it"),
        ("set/train.jsonl:test", "is a file and read whole; remove it"),
        ("gone@train", "does not exist"),
        ("set/gone*.jsonl", "is a pattern that matches nothing"),
        ("set/*.csv", "is a pattern that matches "),
    ],
)
def test_a_part_that_is_not_there_is_a_user_error(tmp_path, place, message):
    fill(tmp_path / "set", "train.jsonl", "test.jsonl", "a.csv")
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path / place), field="data")
    assert message in str(error.value)


def test_a_name_that_exists_is_meant_whole(tmp_path):
    names = ["a@train.jsonl", "b:c.jsonl", "d*[1].jsonl", "test@x/test.jsonl", "set:main@test/e.jsonl"]
    fill(tmp_path, *names)
    for name in (*names[:3], "set:main@test"):
        assert read(tmp_path / name)[0].startswith(name)
    assert read(tmp_path / "test@x@test") == ["test@x/test.jsonl"]


def test_explicit_files_are_read_whatever_their_names_say(tmp_path):
    fill(tmp_path, "test.jsonl", "train.jsonl", "a.jsonl")
    assert read(tmp_path / "test.jsonl") == ["test.jsonl"]
    notes = [
        open_source(str(tmp_path / name), field="data").selection for name in ("test.jsonl", "train.jsonl", "a.jsonl")
    ]
    assert notes == [f"{tmp_path}/test.jsonl: read whole, though its name is that of the split test", "", ""]
    assert open_source(str(tmp_path / "test.jsonl"), use="other", field="data").selection == ""


def test_a_pattern_is_its_matches_in_order_of_name(tmp_path):
    fill(tmp_path, "b.jsonl", "a.jsonl", "c.csv", "deep/er/d.jsonl")
    assert read(tmp_path / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert read(tmp_path / "?.*") == ["a.jsonl", "b.jsonl"]
    assert (
        f"left out: {tmp_path}/c.csv (not .jsonl, .json or .parquet)"
        in open_source(str(tmp_path / "?.*"), field="data").selection
    )
    assert read(tmp_path / "**/*.jsonl") == ["a.jsonl", "b.jsonl", "deep/er/d.jsonl"]


def test_a_pattern_over_several_splits_is_as_a_folder(tmp_path):
    fill(tmp_path, "train.jsonl", "test-1.jsonl", "test-2.jsonl")
    assert read(tmp_path / "*.jsonl") == ["train.jsonl"]
    assert read(tmp_path / "tes*.jsonl") == ["test-1.jsonl", "test-2.jsonl"]
    assert read(tmp_path / "*.jsonl@test") == ["test-1.jsonl", "test-2.jsonl"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("set", "set"),
        ("set@test", "set"),
        ("set:sub@test", "set"),
        ("set/*.jsonl", "set"),
        ("set/[ab]/**/*.jsonl", "set"),
        ("set/a*b.jsonl", "set/a*b.jsonl"),
        ("gone/x.jsonl", "gone/x.jsonl"),
    ],
)
def test_where_a_path_reads_from(tmp_path, text, place):
    fill(tmp_path / "set", "a*b.jsonl")
    assert folder_of(GivenPath("data", str(tmp_path / text))) == tmp_path / place


def test_what_a_folder_holds_besides_is_named(tmp_path):
    fill(tmp_path, "b.jsonl", "a.csv", "c.gz", "d.csv.gz", "e.ndjson", "sub/f.jsonl", "d.jsonl/x.jsonl")
    fill(tmp_path, "dataset_infos.json", "README.md", ".gitattributes", "LICENSE")
    (tmp_path / "._a.jsonl").write_bytes(b"\0\5\26\7")
    assert read(tmp_path) == ["b.jsonl"]
    unknown = "(not .jsonl, .json or .parquet)"
    assert open_source(str(tmp_path), field="data").selection == (
        f"{tmp_path}: 1 of 8 files read: b.jsonl; left out: a.csv {unknown}, c.gz {unknown}, d.csv.gz {unknown}, "
        f"d.jsonl/ (a sub-folder), dataset_infos.json (describes the set), e.ndjson {unknown}, sub/ (a sub-folder)"
    )


def test_shards_that_are_not_there_are_named(tmp_path):
    fill(tmp_path, "data/train-00000-of-00003-a09b74b3ef9c3b56.jsonl", "data/test-00001-of-00002.jsonl.gz")
    for path, missing in {
        tmp_path: "train-00001-of-00003, train-00002-of-00003",
        f"{tmp_path}@test": "test-00000-of-00002",
        tmp_path / "data/tr*": "train-00001-of-00003, train-00002-of-00003",
    }.items():
        assert open_source(str(path), field="data").selection.endswith(f"; missing shards: {missing}")
    fill(tmp_path, "data/train-00001-of-00003.jsonl", "data/train-00002-of-00003.jsonl")
    assert "missing" not in open_source(str(tmp_path), field="data").selection


def test_a_line_names_a_few_of_many_files(tmp_path):
    fill(tmp_path, *(f"{number:02}.jsonl" for number in range(20)), *(f"{number:02}.csv" for number in range(30)))
    line = open_source(str(tmp_path), field="data").selection
    assert "20 of 50 files read: 00.jsonl, 01.jsonl, " in line
    assert " and 12 more; left out: 00.csv" in line
    assert line.endswith(" and 22 more")


def test_outside_of_training_no_split_is_guessed(tmp_path):
    fill(tmp_path / "both", "train.jsonl", "test.jsonl")
    fill(tmp_path / "one", "validation-00000-of-00001.parquet")
    fill(tmp_path / "odd", "test.jsonl", "b.jsonl")
    fill(tmp_path / "none", "a.jsonl", "b.jsonl")
    with pytest.raises(UserError, match=r"has the splits test, train; say which by its name, as .*/both@test or"):
        open_source(str(tmp_path / "both"), use="other", field="data")
    with pytest.raises(UserError, match=r"has the splits test and files whose names tell none; say which"):
        open_source(str(tmp_path / "odd"), use="other", field="data")
    assert read(tmp_path / "both@test", use="other") == ["test.jsonl"]
    assert read(tmp_path / "one", use="other") == ["validation-00000-of-00001.parquet"]
    assert read(tmp_path / "none", use="other") == ["a.jsonl", "b.jsonl"]


def save_splits(folder: Path, *splits: str) -> Path:
    rows = {split: datasets.Dataset.from_list([{"file": split, "a": [1, 2]}]) for split in splits}
    datasets.DatasetDict({split: row.with_format("numpy") for split, row in rows.items()}).save_to_disk(folder)
    return folder


def test_a_saved_dataset_with_splits_is_as_a_folder(tmp_path):
    saved = save_splits(tmp_path / "saved", "test", "train")
    assert [row.value for row in open_rows(str(saved), field="data")] == [
        {"file": "train", "a": [1, 2]}
    ]  # plain values
    assert open_source(str(saved), field="data").selection == f"{saved}: split train read; left out: test"
    assert read(f"{saved}@test") == ["test"]
    assert read(save_splits(tmp_path / "other", "train_sft", "test_sft")) == ["train_sft"]
    assert read(save_splits(tmp_path / "single", "aime24")) == ["aime24"]
    for splits, message in {
        ("test",): "has no training split, only test; say which",
        ("train_a", "train_b"): "has several training splits, train_a, train_b",
        ("math", "code"): "has several splits, math, code; say which",
    }.items():
        folder = save_splits(tmp_path / "-".join(splits), *splits)
        with pytest.raises(UserError, match=message):
            open_source(str(folder), field="data")
    with pytest.raises(UserError, match="has the splits test, train"):
        open_source(str(saved), use="other", field="data")


def test_a_saved_dataset_without_splits_has_none_to_name(tmp_path):
    datasets.Dataset.from_list([{"file": "x"}]).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == ["x"]
    with pytest.raises(UserError, match="names the split test, but it was saved without; remove it"):
        open_source(str(tmp_path / "saved@test"), field="data")


@pytest.mark.parametrize("path", ["/no/such", "./no_such", "../no_such", "~/no_such", "no/such.jsonl", "none.parquet",
                                  "none.jsonl.gz", "a/b/c", "a b", "\0*", "no.jsonl@train"])  # fmt: skip
def test_a_path_that_does_not_exist_is_a_user_error_and_no_hub_id(path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"does not exist; give a file, a folder or the ID"):
        open_rows(path, field="data")


def test_an_address_is_a_user_error():
    with pytest.raises(UserError, match=r"must not be an address; download it"):
        open_source("https://example.org/train.jsonl", field="data")


def test_an_id_without_the_library_of_the_hub_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"data \(some/set\) is no file .* pip install datasets, or check the path"):
        open_rows("some/set", field="data")


def test_other_files_and_empty_folders_are_user_errors(tmp_path):
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"must be a \.jsonl, \.json or \.parquet file; convert or rename it"):
        open_rows(str(tmp_path / "a.csv"), field="data")
    with pytest.raises(UserError, match=r"is a folder without any .* file; it has a\.csv \(not .*\); name one"):
        open_rows(str(tmp_path), field="data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is a folder without any \.jsonl, \.json or \.parquet file; name one"):
        open_rows(str(tmp_path / "empty"), field="data")


def test_a_dangling_link_in_a_folder_is_not_passed_over(tmp_path):
    fill(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl\) must be readable"):
        list(open_rows(str(tmp_path), field="data"))


def test_a_folder_that_datasets_cannot_load_is_a_user_error(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded by datasets"):
        open_rows(str(tmp_path), field="data")


def on_the_hub(monkeypatch, *splits: str) -> None:
    """Lets the hub have `org/set` with these splits, whose rows say what was asked for."""

    def load(name, config=None):
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list([{"file": f"{name} {config} {split}"}]) for split in splits}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_a_dataset_on_the_hub_is_as_a_folder(monkeypatch):
    on_the_hub(monkeypatch, "train", "test")
    assert list(open_rows("org/set", field="data")) == [Row(source="org/set:1", value={"file": "org/set None train"})]
    assert open_source("org/set", field="data").selection == "org/set: split train read; left out: test"
    assert read("org/set@test") == ["org/set None test"]
    assert read("org/set:main") == ["org/set main train"]
    assert read("set:main@test") == ["set main test"]
    with pytest.raises(UserError, match="names the split tset, but it has the splits train, test; did you mean test"):
        open_source("org/set@tset", field="data")
    on_the_hub(monkeypatch, "train_sft", "train_gen", "test_sft")
    with pytest.raises(UserError, match=r"several training splits, train_sft, train_gen; .* as org/set@train_sft or"):
        open_source("org/set", field="data")


def test_a_hub_dataset_of_several_configurations_names_them(monkeypatch):
    def load(*_: object) -> None:
        raise ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nExample of"
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match="has several configurations, 'main', 'socratic'; name one, as org/set:CONFIG"):
        open_source("org/set@train", field="data")


def test_a_hub_dataset_has_a_version_of_its_content(monkeypatch):
    loaded = [datasets.Dataset.from_list(ROWS[:count]) for count in (1, 1, 2)]
    found = []
    for dataset in loaded:
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, dataset=dataset: datasets.DatasetDict(train=dataset))
        source = open_source("org/set", field="data")
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
        open_rows("org/set", field="data")
    assert "\n" not in str(raised.value)
