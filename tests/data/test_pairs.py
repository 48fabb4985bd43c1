"""Preference rows: what is a pair, which of its tokens are labels, and where its two sequences lie in batches."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_psft.config.inputs import DataConfig
from megatron_psft.data.dataset import TokenizedDataset, build_dataset
from megatron_psft.data.files import BadRecord, Row
from megatron_psft.data.formats import RecordKeys
from megatron_psft.data.loader import BatchLoader, Shard
from megatron_psft.data.micro_batch import MicroBatch
from megatron_psft.data.packing import plan_of
from megatron_psft.data.pairs import Pair, parse_pair
from megatron_psft.data.records import parse_row
from megatron_psft.errors import UserError
from tests.data import toys
from tests.data.shards import assert_right_where_real, layouts, shards
from tests.data.toys import byte_tokenizer, label_texts_of
from tests.support.datasets import dataset_of

PAIRS = RecordKeys(are_pairs=True)
TOKENIZER = byte_tokenizer(toys.CHATML)
ASK = {"role": "user", "content": "Hi?"}
YES, NO, MAYBE = ({"role": "assistant", "content": text} for text in ("Yes.", "No.", "Maybe."))
AGAIN = {"role": "user", "content": "Sure?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def sharegpt(*messages: dict[str, str]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


def parse(row: object, keys: RecordKeys = PAIRS) -> Pair | BadRecord:
    return parse_pair(Row(source="a.jsonl:7", value=row), keys)


FORMS = {
    "strings": {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."},
    "lists": {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
    "a string and objects": {"prompt": "Hi?", "chosen": YES, "rejected": NO},
    "no prompt": {"chosen": [ASK, YES], "rejected": [ASK, NO]},
    "sides that repeat the prompt": {
        "prompt": "Hi?",
        "chosen": [ASK, YES],
        "rejected": [ASK, NO],
        "messages": [ASK, YES],
    },
    "ShareGPT": {"conversations": sharegpt(ASK), "chosen": sharegpt(YES)[0], "rejected": sharegpt(NO)[0]},
    "messages": {"messages": [ASK], "chosen": [YES], "rejected": [NO]},
    "Alpaca": {"instruction": "Hi?", "input": "", "output": "Yes.", "chosen": "Yes.", "rejected": "No."},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_pair(form):
    pair = parse(FORMS[form])
    assert isinstance(pair, Pair), pair
    assert (pair.chosen.messages, pair.rejected.messages) == ((ASK, YES), (ASK, NO))
    assert (pair.chosen.prompt_length, pair.rejected.prompt_length, pair.source) == (1, 1, "a.jsonl:7")


def test_a_prompt_of_another_name_system_and_tools_are_found():
    tool = {"type": "function", "function": {"name": "add"}}
    row = {"ask": "Hi?", "prompt": "Ho?", "chosen": "Yes.", "rejected": "No.", "system": "Be brief.", "tools": [tool]}
    pair = parse(row, RecordKeys(prompt="ask", are_pairs=True))
    assert isinstance(pair, Pair)
    assert pair.chosen.messages == (SYSTEM, ASK, YES)
    assert pair.rejected.messages == (SYSTEM, ASK, NO)
    assert pair.chosen.tools == pair.rejected.tools == (tool,)
    assert pair.chosen.prompt_length == 2
    replaced = parse(row, RecordKeys(prompt="ask", system_prompt="Be kind.", are_pairs=True))
    assert isinstance(replaced, Pair)
    assert replaced.rejected.messages[0] == {"role": "system", "content": "Be kind."}


def test_what_both_sides_say_is_prompt():
    pair = parse({"prompt": "Hi?", "chosen": [YES, AGAIN, NO], "rejected": [YES, AGAIN, MAYBE]})
    assert isinstance(pair, Pair)
    assert pair.chosen.prompt_length == 3


BAD = [
    (["Hi?"], "not an object", "found list"),
    (
        {"prompt": "Hi?", "completion": "Yes."},
        "no preference pair",
        "found: prompt, completion; accepted: prompt, chosen",
    ),
    ({"messages": [ASK, YES]}, "no preference pair", "; chosen and rejected"),
    ({"prompt": "Hi?", "chosen": "Yes.", "rejected": None}, "no preference pair", "keys found: prompt, chosen;"),
    ({"prompt": "Hi?", "chosen": "Yes.", "rejected": 7}, "wrong type", "rejected is int"),
    ({"prompt": 7, "chosen": "Yes.", "rejected": "No."}, "wrong type", "prompt is int"),
    ({"prompt": "Hi?", "chosen": "Yes.", "rejected": " "}, "empty content", "rejected[0], assistant"),
    (
        {"prompt": "Hi?", "chosen": "Yes.", "rejected": []},
        "chosen or rejected is a prefix of the other",
        "1 messages",
    ),
    ({"chosen": "Yes.", "rejected": "No."}, "wrong type", "chosen is a string, and there is no prompt"),
    ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "Yes."}, "chosen and rejected are the same", ""),
    (
        {"prompt": "Hi?", "chosen": [AGAIN, YES], "rejected": [ASK, NO]},
        "two different prompts",
        "chosen begins with another user turn",
    ),
    (
        {"chosen": [ASK, YES], "rejected": [AGAIN, NO]},
        "chosen and rejected do not share a prompt",
        "a user turn, messages[0] of chosen",
    ),
    (
        {"chosen": [ASK, YES], "rejected": [ASK, AGAIN, NO]},
        "chosen and rejected do not share a prompt",
        "messages[1] of rejected",
    ),
    (
        {"chosen": [ASK, YES], "rejected": [ASK, YES, AGAIN, NO]},
        "chosen or rejected is a prefix of the other",
        "2 messages",
    ),
    (
        {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", "advantage": 1.0},
        "advantage is not supported in a preference pair",
        "",
    ),
    (
        {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", "images": ["a.png"]},
        "row key images is not supported: only text is trained on; --ignore-keys images leaves it out",
        "",
    ),
    ({"conversations": [{"from": "robot", "value": "Hi?"}], "chosen": YES, "rejected": NO}, "unknown role", "robot"),
]


@pytest.mark.parametrize(("row", "reason", "detail"), BAD)
def test_a_row_that_is_no_pair_says_why(row, reason, detail):
    bad = parse(row)
    assert isinstance(bad, BadRecord), bad
    assert (bad.source, bad.reason) == ("a.jsonl:7", reason)
    assert detail in bad.detail


@pytest.mark.parametrize("form", FORMS)
def test_without_pairs_a_preference_row_is_what_it_was(form):
    record = parse_row(Row(source="a.jsonl:7", value=FORMS[form]), RecordKeys())
    is_read = form in ("Alpaca", "sides that repeat the prompt")
    assert isinstance(record, BadRecord) != is_read


def build(folder: Path, *rows: object, **changes: object) -> TokenizedDataset:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(data=(str(path),), **changes)
    return build_dataset(config.data, TOKENIZER, config, seed=7, show_progress=False, are_pairs=True, field="data")


def test_malformed_pairs_are_reported_by_file_and_line(tmp_path):
    rows = [row for bad, *_ in BAD for row in (FORMS["strings"], bad)]
    with pytest.raises(UserError, match=f"{len(BAD)} of {len(rows)} records are bad") as error:
        build(tmp_path, *rows)
    for number, (_, reason, _) in enumerate(BAD, 1):
        assert f"{tmp_path}/a.jsonl:{2 * number}: {reason}" in str(error.value)
    dataset = build(tmp_path, *rows, skip_bad_records=True)
    assert [dataset.location(index) for index in range(len(dataset))] == [
        f"{tmp_path}/a.jsonl:{number}" for number in range(1, len(rows), 2)
    ]


def test_a_pair_is_two_sequences_whose_labels_are_what_differs(tmp_path):
    (pair, longer) = build(
        tmp_path, FORMS["ShareGPT"], {"prompt": [ASK, YES, AGAIN], "chosen": "Yes.", "rejected": [NO, AGAIN, MAYBE]}
    )
    chosen, rejected = pair.sequences
    whole = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    assert TOKENIZER.decode(chosen.tokens.tolist()) == whole.format("Yes.")
    assert TOKENIZER.decode(rejected.tokens.tolist()) == whole.format("No.")
    assert [label_texts_of(side, TOKENIZER) for side in pair.sequences] == [["Yes.<|im_end|>"], ["No.<|im_end|>"]]
    assert [label_texts_of(side, TOKENIZER) for side in longer.sequences] == [
        ["Yes.<|im_end|>"],
        ["No.<|im_end|>", "Maybe.<|im_end|>"],
    ]


def test_the_last_turn_of_each_side_can_be_the_label_alone(tmp_path):
    row = {"prompt": "Hi?", "chosen": [YES, AGAIN, YES], "rejected": [NO, AGAIN, MAYBE]}
    (pair,) = build(tmp_path, row, loss_on="last")
    assert [label_texts_of(side, TOKENIZER) for side in pair.sequences] == [["Yes.<|im_end|>"], ["Maybe.<|im_end|>"]]


def test_the_longer_side_is_over_long_or_not(tmp_path):
    rows = [{"prompt": "Hi?", "chosen": "x" * i, "rejected": "y" * j} for i, j in ((9, 2), (2, 9), (8, 9), (2, 2))]
    whole = build(tmp_path, *rows)
    assert whole.sequence_lengths.shape == (4, 2)
    assert whole.lengths.tolist() == whole.sequence_lengths.sum(axis=1).tolist()
    longest = int(whole.sequence_lengths.max())
    assert len(build(tmp_path, *rows, seq_length=longest)) == 4
    assert [build(tmp_path, *rows, seq_length=longest - 1, overlong="drop").location(0)] == [f"{tmp_path}/a.jsonl:4"]
    with pytest.raises(UserError, match=rf"found 3 in 4: .*:1 \({longest} tokens\).* to {longest}, or .* drop$"):
        build(tmp_path, *rows, seq_length=longest - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overlong": "truncate"}, r"overlong \(truncate\)"),
        ({"loss_on": "all"}, r"loss_on \(all\)"),
        ({"completion_key": "answer"}, r"completion_key \(answer\)"),
    ],
)
def test_what_pairs_cannot_have_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf"{message} is not supported for preference pairs"):
        build(tmp_path, FORMS["strings"], **changes)


def test_the_sides_of_a_pair_are_part_of_the_fingerprint():
    def fingerprint(second_start: int) -> str:
        return dataset_of(
            tokens=np.arange(8, dtype=np.int32),
            label_mask=np.arange(8) % 4 > 1,
            offsets=np.array([0, 8]),
            second_starts=np.array([second_start]),
        ).fingerprint()

    assert fingerprint(4) != fingerprint(3)


def test_the_cache_keeps_pairs_and_records_apart(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(FORMS["Alpaca"]) + "\n")
    config = DataConfig(data=(str(path),), data_cache_dir=str(tmp_path / "cache"))
    read = partial(build_dataset, config.data, TOKENIZER, config, field="data", seed=0, show_progress=False)
    for _ in range(2):
        found = [read(are_pairs=are_pairs) for are_pairs in (False, True)]
        assert [len(dataset[0].sequences) for dataset in found] == [1, 2]
        assert found[0].fingerprint() != found[1].fingerprint()
    assert len([folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]) == 2


SEQ_LENGTH = 12


def make_dataset(lengths: list[tuple[int, int]]) -> TokenizedDataset:
    """Sequence i, chosen and rejected of each pair in turn, has the tokens 1000 * (i + 1) and on; the second half of
    them are labels."""
    sequences = [length for pair in lengths for length in pair]
    masks = [np.arange(length) >= min(length // 2 + 1, length - 1) for length in sequences]
    return dataset_of(
        tokens=np.concatenate([1000 * (i + 1) + np.arange(n, dtype=np.int32) for i, n in enumerate(sequences)]),
        label_mask=np.concatenate(masks),
        offsets=np.cumsum([0, *map(sum, lengths)]),
        second_starts=np.array([first for first, _ in lengths]),
    )


pairs = st.lists(st.tuples(st.integers(2, SEQ_LENGTH), st.integers(2, SEQ_LENGTH)), min_size=1, max_size=20)


def loader_of(dataset: TokenizedDataset, *, packing: bool, **settings: object) -> BatchLoader:
    plan = plan_of(dataset.sequence_lengths, DataConfig(data=("x",), seq_length=SEQ_LENGTH, packing=packing))
    every = {"micro_batch_size": 1, "shard": Shard(), "shuffle_seed": 3, "one_row": packing, "pad_to_multiple_of": 1}
    return BatchLoader(dataset, plan, pad_token_id=0, **(every | settings))


class Sequences(list):
    """The sequences of a data set of pairs, as `assert_right_where_real` takes records."""


def check(batch: MicroBatch, sequences: Sequences) -> list[int]:
    """That the batch's records are chosen and rejected in turn, each right; returns the tokens that are no padding."""
    is_real = batch.tokens != 0
    owners = {
        record: int(batch.tokens[is_real & (batch.record_ids == record)][0]) // 1000 - 1
        for record in set(batch.record_ids[is_real].tolist())
    }
    for record, owner in owners.items():
        assert record % 2 == owner % 2, "chosen and rejected have changed places"
        other = owners.get(record ^ 1)
        assert other in (None, owner ^ 1), "the other side is another pair's"
    return assert_right_where_real(batch, sequences)


@settings(max_examples=40)
@given(
    lengths=pairs,
    layout=layouts,
    context_size=st.sampled_from([1, 2, 3]),
    multiple=st.integers(1, 3),
    packing=st.booleans(),
    shuffle_seed=st.sampled_from([None, 3]),
)
def test_every_pair_comes_once_with_both_sequences_in_one_micro_batch(
    lengths, layout, context_size, multiple, packing, shuffle_seed
):
    data_size, micro_batch_size, count = layout
    dataset = make_dataset(lengths)
    sequences = Sequences(sequence for i in range(len(dataset)) for sequence in dataset[i].sequences)
    one_row = packing or context_size > 1
    loaders = [
        loader_of(
            dataset,
            packing=packing,
            global_batch_size=data_size * micro_batch_size * count,
            micro_batch_size=micro_batch_size,
            shard=shard,
            shuffle_seed=shuffle_seed,
            one_row=one_row,
            pad_to_multiple_of=multiple,
            wrap=False,
        )
        for shard in shards(data_size, context_size)
    ]
    seen: list[int] = []
    for step in range(loaders[0].num_batches):
        positions = 0
        for loader in loaders:
            batches = loader.micro_batches(step)
            for batch in batches:
                seen += check(batch, sequences)
                assert batch.num_records % 2 == 0
                rows = 1 if one_row else 2 * micro_batch_size
                assert batch.tokens.shape == (rows, max(loader.row_lengths(step)) // context_size)
                if one_row:  # a segment for each sequence, and one of padding
                    assert len(batch.segments) - batch.num_records in (0, 1)
            assert sum(batch.tokens.numel() for batch in batches) == loader.positions_per_rank(step)
            positions += sum(batch.num_tokens for batch in batches)
        assert positions == context_size * loaders[0].lengths(step).sum()
        if not packing:
            assert max(loaders[0].row_lengths(step)) >= loaders[0].lengths(step).max()
    assert sorted(seen) == sorted(token for sequence in sequences for token in sequence.tokens[:-1].tolist())


@settings(max_examples=30)
@given(
    lengths=pairs, layout=layouts, context_size=st.sampled_from([1, 2]), packing=st.booleans(), step=st.integers(0, 9)
)
def test_values_of_pairs_go_into_one_table_and_come_back(lengths, layout, context_size, packing, step):
    data_size, micro_batch_size, count = layout
    dataset = make_dataset(lengths)
    settings = {"global_batch_size": data_size * micro_batch_size * count, "packing": packing}
    whole = loader_of(dataset, **settings)
    expected = whole.to_packs(step, [batch.tokens for batch in whole.micro_batches(step)])
    parts = []
    for shard in shards(data_size, context_size):
        one_row = packing or context_size > 1
        loader = loader_of(dataset, micro_batch_size=micro_batch_size, shard=shard, one_row=one_row, **settings)
        tokens = [batch.tokens for batch in loader.micro_batches(step)]
        parts.append(loader.to_packs(step, tokens))
        own = expected[loader.own_numbers(step)]
        assert all(map(torch.equal, loader.from_packs(step, own), tokens))
    packs = torch.stack(parts).view(data_size, context_size, -1, expected.shape[1]).sum(dim=1)
    assert torch.equal(packs.view(expected.shape), expected)


@settings(max_examples=20)
@given(lengths=pairs, context_size=st.sampled_from([1, 2]), packing=st.booleans())
def test_the_values_of_a_pair_go_to_both_sequences(lengths, context_size, packing):
    """As reference log-probabilities: here those of a token are the token."""
    dataset = make_dataset(lengths)

    def values(record: int) -> np.ndarray:
        return np.concatenate([side.tokens[:-1] for side in dataset[record].sequences]).astype(np.float32)

    for shard in shards(1, context_size):
        loader = loader_of(
            dataset,
            packing=packing,
            global_batch_size=4,
            micro_batch_size=2,
            shard=shard,
            one_row=packing or context_size > 1,
        ).with_ref_log_probs(values)
        for batch in loader.micro_batches(0):
            assert batch.ref_log_probs.dtype == torch.float32
            assert torch.equal(batch.ref_log_probs, batch.tokens.float())


def test_the_room_of_a_pack_is_both_sequences_of_the_longest_pair():
    dataset = make_dataset([(SEQ_LENGTH, SEQ_LENGTH), (3, 3), (4, SEQ_LENGTH), (2, 2)])
    loader = loader_of(dataset, packing=True, global_batch_size=2, shuffle_seed=None)
    assert [batch.segments for batch in loader.micro_batches(0)] == [(11, 11, 1, 1), (2, 2, 3, 11, 6)]


def test_real_preference_files_are_pairs(real_data):
    for name, count, same in (("dpo_en_demo.json", 300, 0), ("instruction_data_with_preference.json", 1094, 6)):
        path = real_data / "preference" / name
        items = [
            parse_pair(Row(source=f"{path}:{i}", value=v), PAIRS) for i, v in enumerate(json.loads(path.read_text()), 1)
        ]
        assert sum(isinstance(item, Pair) for item in items) == count
        bad = [item for item in items if isinstance(item, BadRecord)]
        assert [item.reason for item in bad] == same * ["chosen and rejected are the same"]
