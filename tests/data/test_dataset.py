"""From files to token arrays: what is kept, cut, dropped, counted and refused."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_psft.config.inputs import DataConfig
from megatron_psft.data.chat import render_record
from megatron_psft.data.dataset import DatasetStatistics, TokenizedDataset, beyond_positions, build_dataset
from megatron_psft.data.records import read_records
from megatron_psft.errors import UserError
from tests.data import toys
from tests.data.toys import byte_tokenizer, label_texts_of
from tests.support.datasets import dataset_of

TOKENIZER = byte_tokenizer(
    toys.GLM
)  # <|user|> \n prompt <|assistant|> \n completion </s>: 5 tokens and the texts' bytes


def write_rows(folder: Path, *rows: object) -> str:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pair(prompt_length: int, completion_length: int) -> dict[str, str]:
    return {"prompt": "p" * prompt_length, "completion": "c" * completion_length}


def build(path: str, **changes: object) -> TokenizedDataset:
    show_progress = bool(changes.pop("show_progress", False))
    config = DataConfig(data=(path,), **({"seq_length": 20} | changes))
    return build_dataset([path], TOKENIZER, config, seed=7, show_progress=show_progress, field="data")


def test_the_dataset_is_the_rendered_records_in_order(tmp_path):
    path = write_rows(tmp_path, *(pair(1 + i % 5, 1 + i % 7) for i in range(600)))
    dataset = build(path)
    records, _ = read_records([path], field="data")
    assert len(dataset) == len(records) == 600
    for index, record in enumerate(records):
        example = render_record(record, TOKENIZER, "assistant")
        assert dataset[index].tokens.tolist() == example.tokens.tolist()
        assert dataset[index].label_mask.tolist() == example.label_mask.tolist()
        assert dataset.lengths[index] == len(example.tokens)
        assert dataset.location(index) == record.source
    assert (dataset[0].tokens.dtype, dataset[0].label_mask.dtype, dataset.lengths.dtype) == (
        np.int32,
        np.bool_,
        np.int64,
    )


def test_an_index_beyond_the_records_is_an_error_and_ends_iteration(tmp_path):
    dataset = build(write_rows(tmp_path, pair(1, 1), pair(2, 2)))
    assert len(list(dataset)) == 2
    for index in (-1, 2):
        with pytest.raises(IndexError):
            dataset[index]


def test_a_record_of_seq_length_tokens_is_not_over_long(tmp_path):
    assert build(write_rows(tmp_path, pair(5, 10)), seq_length=20).lengths.tolist() == [20]
    with pytest.raises(UserError, match=r"more than seq_length \(19\)"):
        build(write_rows(tmp_path, pair(5, 10)), seq_length=19)


def test_over_long_records_are_refused_with_the_length_that_the_longest_needs(tmp_path):
    path = write_rows(tmp_path, pair(5, 10), pair(5, 11), pair(5, 20))
    with pytest.raises(UserError) as error:
        build(path)
    assert f"found 2 in 3: {path}:2 (21 tokens), {path}:3 (30 tokens); raise --seq-length to 30, or" in str(error.value)
    assert len(build(path, seq_length=30)) == 3


def test_the_longest_record_is_named_wherever_it_is(tmp_path):
    (tmp_path / "other").mkdir()
    paths = [write_rows(tmp_path, *[pair(5, 12)] * 6), write_rows(tmp_path / "other", pair(1, 1), pair(5, 31))]
    with pytest.raises(UserError) as error:
        build_dataset(
            paths, TOKENIZER, DataConfig(data=tuple(paths), seq_length=20), seed=7, show_progress=False, field="data"
        )
    message = str(error.value)
    assert "found 7 in 8: " in message
    assert f"{paths[0]}:5 (22 tokens); the longest is {paths[1]}:2 (41 tokens); raise --seq-length to 41, or" in message
    assert f"{paths[0]}:6" not in message


def test_over_long_records_are_dropped_and_counted(tmp_path):
    dataset = build(write_rows(tmp_path, pair(5, 10), pair(5, 11), pair(5, 4)), overlong="drop")
    assert dataset.lengths.tolist() == [20, 14]
    assert dataset.statistics().dropped == {"over-long": 1}


def test_over_long_records_are_cut_on_the_right_and_dropped_without_a_label(tmp_path):
    # The prompt and both headers take 4 tokens more than the prompt's text: with 16 bytes nothing else fits into 20.
    path = write_rows(tmp_path, pair(5, 30), pair(16, 1), pair(15, 2), pair(5, 4))
    dataset = build(path, overlong="truncate")
    assert [label_texts_of(example, TOKENIZER) for example in dataset] == [["c" * 11], ["c"], ["cccc</s>"]]
    assert dataset.lengths.tolist() == [20, 20, 14]
    statistics = dataset.statistics()
    assert (statistics.truncated, statistics.dropped) == (2, {"without a label in seq_length": 1})


def test_loss_on_reaches_the_labels(tmp_path):
    path = write_rows(tmp_path, pair(2, 1))
    assert build(path)[0].label_mask.sum() == 2
    assert build(path, loss_on="all")[0].label_mask.sum() == 7


def test_advantages_are_those_of_the_records(tmp_path):
    advantages = [1, -0.5, 0, 2.5, None]
    path = write_rows(tmp_path, *(pair(1, 1) | {"advantage": value} for value in advantages), pair(1, 1))
    dataset = build(path)
    assert [example.advantage for example in dataset] == [1.0, -0.5, 0.0, 2.5, 1.0, 1.0]
    assert dataset.has_advantages
    assert [example.advantage for example in build(f"{path}=2")] == 2 * [1.0, -0.5, 0.0, 2.5, 1.0, 1.0]


def test_advantages_of_1_are_none_and_others_are_part_of_the_fingerprint(tmp_path):
    def fingerprint(advantage: float) -> str:
        folder = tmp_path / str(advantage)
        folder.mkdir()
        dataset = build(write_rows(folder, pair(1, 1) | {"advantage": advantage}))
        assert dataset.has_advantages == (advantage != 1)
        return dataset.fingerprint()

    assert len({fingerprint(advantage) for advantage in (1, 0.5, -0.5)}) == 3
    (tmp_path / "plain").mkdir()
    assert build(write_rows(tmp_path / "plain", pair(1, 1))).fingerprint() == fingerprint(1.0)


def test_an_advantage_of_a_record_that_is_left_out_does_not_count(tmp_path):
    path = write_rows(tmp_path, pair(1, 1), pair(5, 30) | {"advantage": 2})
    assert not build(path, overlong="drop").has_advantages


def test_statistics_are_counted_by_hand(tmp_path):
    rows = [pair(1, length) for length in range(1, 11)]  # 7 to 16 tokens
    path = write_rows(tmp_path, *rows, pair(5, 11), {}, {"a": 1}, 7)
    statistics = build(path, overlong="drop", skip_bad_records=True).statistics()
    assert statistics == DatasetStatistics(
        name=path,
        weight=1.0,
        records=10,
        tokens=115,
        label_tokens=65,
        length_p50=11,
        length_p90=15,
        length_p99=16,
        length_max=16,
        truncated=0,
        dropped={"bad: no known keys": 2, "bad: not an object": 1, "over-long": 1},
    )
    header, row, dropped = str(statistics).splitlines()
    assert header.split() == ["passes", "records", "tokens", "labels", "median", "p90", "p99", "longest"]
    assert row.split() == [path, "1", "10", "115", "65", "11", "15", "16", "16"]
    assert dropped == f"{path}: truncated: 0; dropped: 2 bad: no known keys, 1 bad: not an object, 1 over-long"


def test_bad_records_stop_the_run_with_all_of_their_places(tmp_path):
    quoting = {"prompt": "Hi?", "completion": "k7Qplaceholder0Xv"}  # can be read, but not masked
    path = write_rows(tmp_path, pair(1, 1), {}, {"prompt": quoting["completion"], "completion": "x"}, pair(1, 1))
    with pytest.raises(UserError, match=r"a\.jsonl:2: no known keys.*\n.*a\.jsonl:3: no label span"):
        build(path, seq_length=99)
    assert len(build(write_rows(tmp_path, quoting), seq_length=99)) == 1


def test_skipped_bad_records_are_logged_and_the_others_kept(tmp_path, caplog):
    path = write_rows(tmp_path, pair(1, 1), {}, pair(1, 2))
    with caplog.at_level(logging.WARNING):
        dataset = build(path, skip_bad_records=True)
    assert dataset.lengths.tolist() == [7, 8]
    assert "1 of 3 records is bad\n" in caplog.text
    assert f"{path}:2: no known keys" in caplog.text


def test_good_records_log_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        build(write_rows(tmp_path, pair(1, 1)))
    assert not caplog.records


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_no_record_that_fits_is_a_user_error(tmp_path, overlong):
    with pytest.raises(UserError, match=r"no usable record: 2 .*seq_length \(20\)"):
        build(write_rows(tmp_path, pair(16, 1), pair(17, 9)), overlong=overlong)


def test_no_record_at_all_is_a_user_error(tmp_path):
    path = write_rows(tmp_path)
    with pytest.raises(UserError, match=f"{path}.*holds no record"):
        build(path)


def test_chunks_of_bad_records_alone_do_no_harm(tmp_path):
    path = write_rows(tmp_path, *[{}] * 300, pair(1, 1), *[{}] * 300)
    assert build(path, skip_bad_records=True).lengths.tolist() == [7]


def test_progress_is_shown_only_when_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("megatron_psft.progress._SHORT_SECONDS", 0.0)
    path = write_rows(tmp_path, pair(1, 1))
    build(path)
    assert capsys.readouterr() == ("", "")
    build(path, show_progress=True, data_cache_dir=str(tmp_path / "other"))
    shown = capsys.readouterr().err
    assert "tokenizing:" in shown


def build_many(*paths: str, seed: int = 7, **changes: object) -> TokenizedDataset:
    config = DataConfig(data=paths, **({"seq_length": 99} | changes))
    return build_dataset(config.data, TOKENIZER, config, seed=seed, show_progress=False, field="data")


def test_weights_are_passes_over_a_source(tmp_path):
    """Records are told by their lengths: 7, 8, ... in the one file, 50, 51, ... in the other."""
    (tmp_path / "b").mkdir()
    first = write_rows(tmp_path, *(pair(1, length) for length in range(1, 11)))
    second = write_rows(tmp_path / "b", *(pair(44, length) for length in range(1, 5)))
    dataset = build_many(f"{first}=2.5", f"{second}=0.5")
    lengths = dataset.lengths.tolist()
    assert lengths[:20] == list(range(7, 17)) * 2
    assert len(lengths) == 20 + 5 + 2
    half, part = lengths[20:25], lengths[25:]
    assert half == sorted(set(half))
    assert set(half) < set(range(7, 17))
    assert part == sorted(set(part))
    assert set(part) < set(range(50, 54))
    assert [len(example.tokens) for example in dataset] == lengths
    statistics = dataset.statistics()
    assert [(s.name, s.weight, s.records) for s in statistics.sources] == [(first, 2.5, 25), (second, 0.5, 2)]
    assert (statistics.records, statistics.tokens, statistics.weight) == (27, sum(lengths), None)
    assert statistics.label_tokens == sum(int(example.label_mask.sum()) for example in dataset)
    assert [line.split()[0] for line in str(statistics).splitlines()[1:4]] == [first, second, "all"]
    assert build_many(f"{first}=2.5", f"{second}=0.5").fingerprint() == dataset.fingerprint()
    others = {build_many(f"{first}=2.5", f"{second}=0.5", seed=seed).fingerprint() for seed in range(8, 14)}
    assert others - {dataset.fingerprint()}
    assert build_many(first, second).lengths.tolist() == [*range(7, 17), *range(50, 54)]


def test_a_path_may_hold_an_equals_sign(tmp_path):
    for name, count in (("a=2.jsonl", 1), ("a=0.5", 2), ("x=y", 3)):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name, *[pair(1, 1)] * count)
    assert len(build_many(f"{tmp_path}/a=0.5")) == 2  # a folder of that very name
    assert len(build_many(f"{tmp_path}/a=0.5=0.5")) == 1
    assert len(build_many(f"{tmp_path}/x=y")) == 3
    assert len(build_many(f"{tmp_path}/a=2.jsonl/a.jsonl=3")) == 3
    with pytest.raises(UserError, match=r"z=y\) does not exist"):
        build_many("z=y")


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_weight_that_is_none_is_refused(tmp_path, weight):
    path = write_rows(tmp_path, pair(1, 1))
    with pytest.raises(UserError, match=rf"a\.jsonl={weight}\) must have a weight above 0"):
        build_many(f"{path}={weight}")


def test_a_weight_that_takes_nothing_is_refused(tmp_path):
    path = write_rows(tmp_path, pair(1, 1))
    with pytest.raises(UserError, match=r"takes none of 1 record with weight 0\.1; raise it"):
        build_many(f"{path}=0.1")


def test_a_source_without_a_usable_record_is_refused_beside_others(tmp_path):
    (tmp_path / "b").mkdir()
    good, bad = write_rows(tmp_path, pair(1, 1)), write_rows(tmp_path / "b", {}, {})
    with pytest.raises(UserError, match=rf"{bad}.* holds no usable record: 2 bad: no known keys"):
        build_many(good, bad, skip_bad_records=True)


@pytest.mark.parametrize(("name", "text"), [("b.jsonl", ""), ("b.jsonl", "\n \n"), ("b.json", "[]")])
def test_a_file_without_a_record_is_refused_for_that(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    for others in [], [write_rows(tmp_path, pair(1, 1))]:
        with pytest.raises(UserError, match=r"b\.jsonl?\) holds no record; name files that hold at least one$"):
            build_many(*others, str(tmp_path / name))


def test_the_fingerprint_tells_tokens_labels_and_borders_apart():
    tokens, mask, offsets = np.arange(6, dtype=np.int32), np.array([0, 1, 1, 0, 1, 1], bool), np.array([0, 3, 6])
    base = dataset_of(tokens=tokens, label_mask=mask, offsets=offsets)
    same = dataset_of(tokens=tokens.copy(), label_mask=mask.copy(), offsets=offsets.copy())
    others = [
        dataset_of(tokens=tokens[::-1], label_mask=mask, offsets=offsets),
        dataset_of(tokens=tokens, label_mask=np.roll(mask, 1), offsets=offsets),
        dataset_of(tokens=tokens, label_mask=mask, offsets=np.array([0, 2, 6])),
    ]
    assert base.fingerprint() == same.fingerprint()
    assert len({dataset.fingerprint() for dataset in [base, *others]}) == 4


def test_records_beyond_the_positions_of_the_model_are_named():
    """Also of pairs, and not a pack of records that are short: a record's last token has no position of its own."""
    offsets = np.array([0, 3, 12, 20, 24])
    arrays = {"tokens": np.arange(24, dtype=np.int32), "label_mask": ~np.isin(np.arange(24), offsets)}
    records = dataset_of(**arrays, offsets=offsets)
    assert beyond_positions("data", records, 8) is None
    assert beyond_positions("data", records, None) is None
    text = beyond_positions("valid_data", records, 6)
    assert "valid_data: beyond max_position_embeddings (6) of the model's config.json are 2 of 4 records" in text
    assert "the longest is memory:2 (9 tokens): leave them out by --seq-length 7 --overlong drop" in text
    pairs = dataset_of(**arrays, offsets=np.array([0, 12, 24]), second_starts=np.array([3, 6]))
    assert beyond_positions("data", pairs, 8) is None
    assert "1 of 2 records, the longest is memory:1 (9 tokens)" in beyond_positions("data", pairs, 7)
