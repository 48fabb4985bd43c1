"""The batches of every layout are the same records, each once per epoch, shifted by one token."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_psft.data.example import Example
from megatron_psft.data.loader import BatchLoader, Shard
from megatron_psft.data.micro_batch import MicroBatch, collate
from megatron_psft.data.packing import best_fit, one_per_pack
from megatron_psft.errors import UserError
from tests.data.shards import (
    CAPACITY,
    PAD,
    assert_right_where_real,
    context_sizes,
    datasets,
    layouts,
    make_dataset,
    make_loader,
    shards,
)


def record_ids(batch: MicroBatch) -> list[int]:
    """The records in a micro-batch of `make_dataset`, without empty rows."""
    return [int(row[0]) // 1000 - 1 for row in batch.tokens if row[0] != PAD]


def ids_of_steps(loader: BatchLoader, steps: range) -> list[int]:
    return [index for step in steps for batch in loader.micro_batches(step) for index in record_ids(batch)]


def rows(batches: list[MicroBatch]) -> torch.Tensor:
    """Everything in the rows of one or more micro-batches, [rows, 4, seq]."""
    parts = [torch.stack([b.tokens, b.labels, b.label_mask, b.position_ids], dim=1) for b in batches]
    return torch.cat(parts)


def test_labels_are_the_tokens_shifted_by_one_and_the_mask_is_theirs():
    examples = [
        Example(tokens=np.array([5, 6, 7, 8], np.int32), label_mask=np.array([False, False, True, True])),
        Example(tokens=np.array([9, 4], np.int32), label_mask=np.array([False, True])),
    ]
    batch = collate(examples, batch_size=3, seq_length=4, pad_token_id=4)
    assert batch.tokens.tolist() == [[5, 6, 7, 4], [9, 4, 4, 4], [4, 4, 4, 4]]
    assert batch.labels.tolist() == [[6, 7, 8, 4], [4, 4, 4, 4], [4, 4, 4, 4]]
    assert batch.label_mask.tolist() == [[False, True, True, False], [True] + [False] * 3, [False] * 4]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 3
    assert batch.record_ids.tolist() == [[0] * 4, [1, 0, 0, 0], [0] * 4]
    assert batch.label_counts.tolist() == [2, 1]
    assert (batch.num_records, batch.num_tokens) == (2, 4)
    assert {batch.tokens.dtype, batch.labels.dtype, batch.position_ids.dtype} == {torch.int64}
    assert batch.label_mask.dtype == torch.bool


def test_to_moves_every_tensor():
    batch = make_loader(make_dataset([3, 4], has_advantages=True)).micro_batches(0)[0]
    batch = replace(batch, ref_log_probs=torch.zeros(1, 2))
    before, after = vars(batch), vars(batch.to(torch.device("meta")))
    devices = {name: value.device.type for name, value in after.items() if isinstance(value, torch.Tensor)}
    names = ["tokens", "labels", "label_mask", "position_ids", "record_ids", "label_counts"]
    names += ["advantages", "ref_log_probs"]
    assert devices == dict.fromkeys(names, "meta")
    assert [after[name] for name in after if name not in devices] == [
        before[name] for name in before if name not in devices
    ]


def test_without_shuffling_batches_are_in_file_order_and_wrap_around():
    loader = make_loader(make_dataset([5] * 6), shuffle_seed=None)
    batches = [ids_of_steps(loader, range(step, step + 1)) for step in range(4)]
    assert batches == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5], [0, 1, 2, 3]]


def test_a_rank_has_consecutive_rows_of_the_global_batch():
    dataset = make_dataset([5] * 8)
    for rank, expected in enumerate([[[0, 1], [2, 3]], [[4, 5], [6, 7]]]):
        loader = make_loader(
            dataset,
            global_batch_size=8,
            micro_batch_size=2,
            shard=Shard(data_rank=rank, data_size=2),
            shuffle_seed=None,
        )
        assert [record_ids(batch) for batch in loader.micro_batches(0)] == expected
        assert (len(loader.own_numbers(0)), loader.micro_batch_size) == (4, 2)


@given(dataset=datasets, batch_size=st.integers(1, 12), shuffle=st.booleans(), seed=st.integers(0, 99))
def test_every_record_comes_once_per_epoch(dataset, batch_size, shuffle, seed):
    size, epochs = len(dataset), 3
    loader = make_loader(dataset, global_batch_size=batch_size, shuffle_seed=seed if shuffle else None)
    ids = ids_of_steps(loader, range(-(-epochs * size // batch_size)))
    for epoch in range(epochs):
        assert sorted(ids[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(dataset=datasets, layout=layouts, step=st.integers(0, 20), wrap=st.booleans(), multiple=st.integers(1, 5))
def test_the_rows_of_a_step_do_not_depend_on_the_layout(dataset, layout, step, wrap, multiple):
    ranks, micro_batch_size, count = layout
    size = ranks * micro_batch_size * count
    settings = {"global_batch_size": size, "wrap": wrap, "pad_to_multiple_of": multiple}
    whole = make_loader(dataset, micro_batch_size=size, **settings)
    step %= whole.num_batches
    parts = [
        batch
        for rank in range(ranks)
        for batch in make_loader(
            dataset, micro_batch_size=micro_batch_size, shard=Shard(data_rank=rank, data_size=ranks), **settings
        ).micro_batches(step)
    ]
    (expected,) = whole.micro_batches(step)
    assert torch.equal(rows(parts), rows([expected]))
    assert sum(batch.num_records for batch in parts) == expected.num_records
    assert sum(batch.num_tokens for batch in parts) == expected.num_tokens == whole.lengths(step).sum()
    assert len(parts) == ranks * count


@given(dataset=datasets, seed=st.integers(0, 99), steps=st.permutations(range(6)))
def test_a_step_does_not_depend_on_the_steps_before_it(dataset, seed, steps):
    loader = make_loader(dataset, shuffle_seed=seed)
    for step in steps:
        assert torch.equal(
            rows(loader.micro_batches(step)), rows(make_loader(dataset, shuffle_seed=seed).micro_batches(step))
        )


def test_epochs_and_seeds_have_orders_of_their_own():
    dataset = make_dataset([3] * 40)
    orders = [
        tuple(ids_of_steps(make_loader(dataset, shuffle_seed=seed), range(10 * epoch, 10 * epoch + 10)))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({tuple(range(40)), *orders}) == 5


@given(dataset=datasets, batch_size=st.integers(1, 12), shuffle=st.booleans())
def test_without_wrapping_every_record_comes_once_and_empty_rows_fill_up(dataset, batch_size, shuffle):
    loader = make_loader(dataset, global_batch_size=batch_size, shuffle_seed=1 if shuffle else None, wrap=False)
    batches = [batch for step in range(loader.num_batches) for batch in loader.micro_batches(step)]
    assert sorted(index for batch in batches for index in record_ids(batch)) == list(range(len(dataset)))
    assert sum(batch.num_records for batch in batches) == len(dataset)
    assert sum(int(batch.label_mask.sum()) for batch in batches) == dataset.statistics().label_tokens
    assert len(batches) == loader.num_batches * batch_size


def test_empty_rows_have_no_label_and_keep_the_shape():
    loader = make_loader(
        make_dataset([5, 6, 4]), global_batch_size=4, micro_batch_size=2, shuffle_seed=None, wrap=False
    )
    full, part = loader.micro_batches(0)
    assert full.tokens.shape == part.tokens.shape == (2, 5)
    assert (full.num_records, part.num_records) == (2, 1)
    assert part.tokens[1].tolist() == part.labels[1].tolist() == [PAD] * 5
    assert not part.label_mask[1].any()


@pytest.mark.parametrize(("wrap", "step"), [(False, 2), (False, -1), (True, -1)])
def test_a_step_outside_the_stream_is_an_error(wrap, step):
    with pytest.raises(IndexError, match=rf"global batch {step} of 2"):
        make_loader(make_dataset([3] * 7), wrap=wrap).micro_batches(step)


@given(dataset=datasets, multiple=st.integers(1, 8), step=st.integers(0, 9))
def test_the_sequence_length_is_the_longest_row_rounded_up(dataset, multiple, step):
    loader = make_loader(dataset, pad_to_multiple_of=multiple)
    inputs = [len(dataset[index].tokens) - 1 for index in ids_of_steps(loader, range(step, step + 1))]
    assert loader.lengths(step).tolist() == inputs
    assert loader.unpadded_length(step) == max(inputs)
    assert max(loader.row_lengths(step)) == min(n for n in range(100) if n >= max(inputs) and n % multiple == 0)
    assert {batch.tokens.shape for batch in loader.micro_batches(step)} == {(1, max(loader.row_lengths(step)))}


def test_batch_sizes_that_do_not_divide_are_a_user_error():
    with pytest.raises(UserError, match=r"global_batch_size \(6\) must be a multiple of .* \(2 \* 2\)"):
        make_loader(make_dataset([3]), global_batch_size=6, micro_batch_size=2, shard=Shard(data_size=2))


@settings(max_examples=40)
@given(
    dataset=datasets,
    layout=layouts,
    context_size=context_sizes,
    multiple=st.integers(1, 3),
    packing=st.booleans(),
    shuffle_seed=st.sampled_from([None, 3]),
)
def test_every_token_comes_once_per_epoch_over_all_ranks(
    dataset, layout, context_size, multiple, packing, shuffle_seed
):
    data_size, micro_batch_size, count = layout
    plan = (best_fit if packing else one_per_pack)(dataset.lengths - 1, CAPACITY)
    loaders = [
        make_loader(
            dataset,
            plan,
            global_batch_size=data_size * micro_batch_size * count,
            micro_batch_size=micro_batch_size,
            shard=shard,
            shuffle_seed=shuffle_seed,
            one_row=True,
            pad_to_multiple_of=multiple,
            wrap=False,
        )
        for shard in shards(data_size, context_size)
    ]
    seen: list[int] = []
    for step in range(loaders[0].num_batches):
        batches = [batch for loader in loaders for batch in loader.micro_batches(step)]
        assert len(batches) == len(loaders) * count
        for batch in batches:
            seen += assert_right_where_real(batch, dataset)
            assert batch.tokens.shape == (1, max(loaders[0].row_lengths(step)) // context_size)
            assert batch.tokens.shape[1] % multiple == 0
            assert batch.seq_length == sum(batch.segments) == max(loaders[0].row_lengths(step))
        firsts = [batch for loader in loaders[::context_size] for batch in loader.micro_batches(step)]
        assert sum(batch.num_tokens for batch in firsts) == loaders[0].lengths(step).sum()
        assert sum(batch.num_records for batch in firsts) == len(loaders[0].lengths(step))
    inputs = [token for i in range(len(dataset)) for token in dataset[i].tokens[:-1].tolist()]
    assert sorted(seen) == inputs


@settings(max_examples=40)
@given(dataset=datasets, layout=layouts, context_size=context_sizes, step=st.integers(0, 9), seed=st.integers(0, 9))
def test_the_records_of_a_packed_step_do_not_depend_on_the_layout(dataset, layout, context_size, step, seed):
    """On any ranks the values of the tokens of a step go into the same table, and come back from it."""
    data_size, micro_batch_size, count = layout
    plan = best_fit(dataset.lengths - 1, CAPACITY)
    settings = {"global_batch_size": data_size * micro_batch_size * count, "one_row": True, "shuffle_seed": seed}
    whole = make_loader(dataset, plan, micro_batch_size=1, **settings)
    expected = whole.to_packs(step, [batch.tokens for batch in whole.micro_batches(step)])
    assert expected.shape == (settings["global_batch_size"], whole.unpadded_length(step))
    parts = []
    for shard in shards(data_size, context_size):
        loader = make_loader(dataset, plan, micro_batch_size=micro_batch_size, shard=shard, **settings)
        tokens = [batch.tokens for batch in loader.micro_batches(step)]
        parts.append(loader.to_packs(step, tokens))
        own = expected[loader.own_numbers(step)]
        assert all(map(torch.equal, loader.from_packs(step, own), tokens))
        assert loader.lengths(step).tolist() == whole.lengths(step).tolist()
    packs = torch.stack(parts).view(data_size, context_size, -1, expected.shape[1]).sum(dim=1)
    assert torch.equal(packs.view(expected.shape), expected)


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(2, 12), min_size=2, max_size=30), context_size=context_sizes, packing=st.booleans())
def test_every_token_finds_the_advantage_of_its_record(lengths, context_size, packing):
    dataset = make_dataset(lengths, has_advantages=True)
    plan = (best_fit if packing else one_per_pack)(dataset.lengths - 1, CAPACITY)
    for shard in shards(1, context_size):
        loader = make_loader(dataset, plan, micro_batch_size=2, shard=shard, one_row=packing or context_size > 1)
        for batch in loader.micro_batches(0):
            assert batch.advantages.dtype == torch.float32
            assert len(batch.advantages) == batch.num_records
            is_real = batch.tokens != PAD
            records = batch.tokens[is_real] // 1000 - 1
            assert torch.equal(batch.advantages[batch.record_ids[is_real]], records / 2)


def test_a_batch_has_advantages_where_one_of_the_whole_set_is_not_1():
    assert make_loader(make_dataset([3] * 8)).micro_batches(0)[0].advantages is None
    dataset = make_dataset([3] * 8, has_advantages=True)  # of which record 2 has 1
    batches = make_loader(dataset, shuffle_seed=None).micro_batches(0)
    assert [batch.advantages.tolist() for batch in batches] == [[0.0], [0.5], [1.0], [1.5]]


def test_rows_of_a_record_each_have_the_same_table():
    dataset = make_dataset([5, 3, 8, 2])
    separate, packed = (make_loader(dataset, micro_batch_size=2, one_row=one_row) for one_row in (False, True))
    tables = [loader.to_packs(0, [batch.tokens for batch in loader.micro_batches(0)]) for loader in (separate, packed)]
    assert torch.equal(*tables)
    assert [row[row > 0].numel() for row in tables[0]] == separate.lengths(0).tolist()
    for batch, values in zip(separate.micro_batches(0), separate.from_packs(0, tables[0]), strict=True):
        assert torch.equal(values, batch.tokens)


def test_a_step_across_an_epochs_end_takes_packs_of_both():
    dataset = make_dataset([9, 9, 9, 5, 5, 3])
    plan = best_fit(dataset.lengths - 1, CAPACITY)
    assert len(plan) == 3
    loader = make_loader(dataset, plan, global_batch_size=2, one_row=True)
    steps = [
        sorted(t for batch in loader.micro_batches(step) for t in batch.tokens[0].tolist() if t) for step in range(3)
    ]
    inputs = [token for i in range(len(dataset)) for token in dataset[i].tokens[:-1].tolist()]
    assert sorted(steps[0] + steps[1] + steps[2]) == sorted(2 * inputs)
    again = make_loader(dataset, plan, global_batch_size=2, one_row=True)
    assert sorted(t for batch in again.micro_batches(1) for t in batch.tokens[0].tolist() if t) == steps[1]
