"""Names of sources in metrics: short, clean, and each once."""

import pytest

from megatron_psft.data.source_names import source_names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["data/math.jsonl", "data/code.parquet"], ["math", "code"]),
        (["/x/math/train.jsonl", "/x/code/train.jsonl", "c.jsonl"], ["math-train", "code-train", "c"]),
        (["a/b/train.jsonl", "b/train.jsonl", "train.jsonl"], ["a-b-train", "b-train", "train"]),
        (["open/set", "other/set:main@train"], ["set", "set-main-train"]),
        (["a.jsonl", "a.jsonl", "A.jsonl"], ["a", "a-2", "A-3"]),
        (["a.jsonl", "a-2.jsonl", "a.jsonl"], ["a", "a-2", "a-3"]),
        (["parts/*.jsonl", "my set/über 1.jsonl"], ["parts", "ber-1"]),
        (["x.v1.2.jsonl", "..", "/"], ["x.v1.2", "data", "data-2"]),
    ],
)
def test_names(paths, names):
    assert source_names(paths) == names
