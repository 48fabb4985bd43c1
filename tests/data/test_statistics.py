"""What a run says of its data is what its batches hold."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from megatron_psft.config.inputs import DataConfig
from megatron_psft.config.schema import BatchConfig
from megatron_psft.data.dataset import build_dataset
from megatron_psft.data.loader import BatchLoader, Shard
from megatron_psft.data.packing import plan_of
from megatron_psft.data.statistics import describe_passes
from tests.data import toys
from tests.data.toys import byte_tokenizer
from tests.support.datasets import dataset_of

TOKENIZER = byte_tokenizer(toys.GLM)


@pytest.mark.parametrize(
    ("records", "batch", "expected"),
    [
        (4, {"epochs": 1}, ["1 step of 64 records makes 16 passes over the 4 records of an epoch: each record 16 times",
                            "the last global batch begins another pass: 60 records more than 1 x 4 fill it",
                            "an epoch is less than a global batch, 4 of 64 records: each step takes each record 16 "
                            "times; lower --global-batch-size"]),
        (4, {"epochs": 3, "global_batch_size": 3},
         ["4 steps of 3 records make 3 passes over the 4 records of an epoch: each record 3 times"]),
        (4, {"epochs": 2, "global_batch_size": 3},
         ["3 steps of 3 records make 2.25 passes over the 4 records of an epoch: each record 2 times, those of 1 "
          "record once more", "the last global batch begins another pass: 1 record more than 2 x 4 fill it"]),
        (10, {"train_iters": 3, "global_batch_size": 2},
         ["3 steps of 2 records make 0.6 passes over the 10 records of an epoch: each record 0 times, those of 6 "
          "records once more"]),
        (3, {"global_batch_size": 8}, ["an epoch is less than a global batch, 3 of 8 records: each step takes each "
                                       "record 2.667 times; lower --global-batch-size"]),
        (8, {"global_batch_size": 8}, [""]),
    ],
)  # fmt: skip
def test_passes_are_said(records, batch, expected):
    config = BatchConfig(**batch)
    steps = config.steps(records)
    text = describe_passes(
        records, "record", global_batch_size=config.global_batch_size, train_iters=steps, epochs=config.epochs
    )
    assert text.split("\n") == expected


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("epochs", "size"), [(1, 64), (1, 4), (3, 5), (2, 1)])
def test_each_record_is_taken_as_often_as_is_said(packing, epochs, size):
    offsets = np.cumsum([0, 3, 9, 4, 4, 8, 2, 5])
    dataset = dataset_of(
        tokens=np.arange(offsets[-1], dtype=np.int32),
        label_mask=~np.isin(np.arange(offsets[-1]), offsets),
        offsets=offsets,
    )
    plan = plan_of(dataset.sequence_lengths, DataConfig(data=("a",), seq_length=10, packing=packing))
    batch = BatchConfig(epochs=epochs, global_batch_size=size)
    steps = batch.steps(len(plan))
    loader = BatchLoader(
        dataset, plan, global_batch_size=size, micro_batch_size=1, shard=Shard(), shuffle_seed=1, one_row=packing,
        pad_to_multiple_of=1, pad_token_id=0,
    )  # fmt: skip
    taken = Counter(int(record) for step in range(steps) for pack in loader.own_packs(step) for record in pack)
    text = describe_passes(len(plan), "pack", global_batch_size=size, train_iters=steps, epochs=epochs)
    times = int(re.search(r"each record ([\d,]+) time", text)[1])
    assert set(taken.values()) <= {times, times + 1}
    assert (max(taken.values()) > times) == ("once more" in text)
    assert ("begins another pass" in text) == (max(taken.values()) > epochs)
    assert ("less than a global batch" in text) == (len(plan) < size)


def test_the_table_has_a_line_for_each_folder(tmp_path):
    for name in ("set/train.jsonl", "set/test.jsonl", "set/a.csv", "one.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"prompt": name, "completion": "c"}) + "\n")
    paths = [str(tmp_path / "set"), f"{tmp_path}/set@test=2", str(tmp_path / "one.jsonl")]
    config = DataConfig(data=tuple(paths), seq_length=40, data_cache_dir=str(tmp_path / "cache"))
    dataset = build_dataset(paths, TOKENIZER, config, seed=1, show_progress=False, field="data")
    assert [dataset.location(index).rpartition("/")[2] for index in range(4)] == [
        *("train.jsonl:1", "test.jsonl:1", "test.jsonl:1", "one.jsonl:1")
    ]
    unknown = "a.csv (not .jsonl, .json or .parquet)"
    assert [line for line in str(dataset.statistics()).splitlines() if "left out" in line] == [
        f"{tmp_path}/set: 1 of 3 files read: train.jsonl; left out: test.jsonl (split test), {unknown}",
        f"{tmp_path}/set@test: 1 of 3 files read: test.jsonl; left out: train.jsonl (split train), {unknown}",
    ]
