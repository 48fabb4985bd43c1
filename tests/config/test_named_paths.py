"""`NAME=PATH` beside paths whose names have an `=` themselves, and weights."""

import pytest

from megatron_psft.config.inputs import DataConfig
from megatron_psft.config.named_paths import NamedPath, parse_named_path, sets_by_name
from megatron_psft.errors import UserError


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("general=kept.jsonl", "general", "kept.jsonl"),
        ("a.b_c-2=org/name:config@test", "a.b_c-2", "org/name:config@test"),
        ("general=kept.jsonl=0.5", "general", "kept.jsonl=0.5"),
        ("kept.jsonl=0.5", "", "kept.jsonl=0.5"),
        ("kept.jsonl", "", "kept.jsonl"),
        ("parts/day=one/kept.jsonl", "", "parts/day=one/kept.jsonl"),
        ("day=two", "", "day=two"),  # a file that there is
    ],
)
def test_a_name_comes_before_the_first_equals_sign(tmp_path, monkeypatch, text, name, path):
    (tmp_path / "day=two").touch()
    monkeypatch.chdir(tmp_path)
    assert parse_named_path("valid_data", text) == NamedPath(name, path)


def test_paths_without_a_name_are_one_set():
    texts = ("a.jsonl", "general=b.jsonl", "c.jsonl=2")
    assert sets_by_name("valid_data", texts) == {"": ("a.jsonl", "c.jsonl=2"), "general": ("b.jsonl",)}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["general=a.jsonl", "general=b.jsonl"], "valid_data names the set general twice"),
        (["General=a.jsonl", "x.jsonl", "general=a.jsonl"], "valid_data names the set general twice"),
        (["=a.jsonl"], r"valid_data \(=a.jsonl\) must have a name before ="),
        (["general="], r"valid_data \(general=\) must have a path after ="),
        (["a/b=/"], r"valid_data \(a/b=/\) must have a name of letters, digits"),
        (["my set=a.jsonl"], r"valid_data \(my set=a.jsonl\) must have a name of letters, digits"),
        (["ü=a.jsonl"], r"valid_data \(ü=a.jsonl\) must have a name of letters, digits"),
    ],
)
def test_names_that_no_metric_could_have_are_refused_with_the_configuration(texts, message):
    with pytest.raises(UserError, match=message):
        DataConfig(data=("d.jsonl",), valid_data=tuple(texts))
