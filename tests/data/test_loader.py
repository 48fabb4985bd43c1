"""The batches of every layout are the same records, each once per epoch, shifted by one token."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_psft.data.chat import Example
from megatron_psft.data.dataset import TokenizedDataset
from megatron_psft.data.loader import BatchLoader, MicroBatch, collate
from megatron_psft.errors import UserError

PAD = 0


def make_dataset(lengths: list[int]) -> TokenizedDataset:
    """Record i has the tokens 1000 * (i + 1), 1000 * (i + 1) + 1, ...; about the second half of them are labels."""
    masks = [[position >= min(length // 2 + 1, length - 1) for position in range(length)] for length in lengths]
    return TokenizedDataset.from_arrays(
        tokens=np.concatenate([1000 * (i + 1) + np.arange(n, dtype=np.int32) for i, n in enumerate(lengths)]),
        label_mask=np.concatenate([np.array(mask) for mask in masks]),
        offsets=np.cumsum([0, *lengths]),
    )


def make_loader(dataset: TokenizedDataset, **changes: object) -> BatchLoader:
    settings = {
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
        "shuffle": True,
        "seed": 7,
        "pad_to_multiple_of": 1,
        "pad_token_id": PAD,
    }
    return BatchLoader(dataset, **(settings | changes))


def record_ids(batch: MicroBatch) -> list[int]:
    """The records in a micro-batch of `make_dataset`, without empty rows."""
    return [int(row[0]) // 1000 - 1 for row in batch.tokens if row[0] != PAD]


def ids_of_steps(loader: BatchLoader, steps: range) -> list[int]:
    return [index for step in steps for batch in loader.micro_batches(step) for index in record_ids(batch)]


def rows(batches: list[MicroBatch]) -> torch.Tensor:
    """Everything in the rows of one or more micro-batches, [rows, 4, seq]."""
    parts = [torch.stack([b.tokens, b.labels, b.loss_mask, b.position_ids], dim=1) for b in batches]
    return torch.cat(parts)


datasets = st.lists(st.integers(2, 12), min_size=1, max_size=30).map(make_dataset)
layouts = st.tuples(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)
)  # ranks, rows of a micro-batch, micro-batches


def test_labels_are_the_tokens_shifted_by_one_and_the_mask_is_theirs():
    examples = [
        Example(tokens=np.array([5, 6, 7, 8], np.int32), label_mask=np.array([False, False, True, True])),
        Example(tokens=np.array([9, 4], np.int32), label_mask=np.array([False, True])),
    ]
    batch = collate(examples, batch_size=3, seq_length=4, pad_token_id=4)
    assert batch.tokens.tolist() == [[5, 6, 7, 4], [9, 4, 4, 4], [4, 4, 4, 4]]
    assert batch.labels.tolist() == [[6, 7, 8, 4], [4, 4, 4, 4], [4, 4, 4, 4]]
    assert batch.loss_mask.tolist() == [[False, True, True, False], [True] + [False] * 3, [False] * 4]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 3
    assert (batch.num_sequences, batch.num_tokens) == (2, 4)
    assert {batch.tokens.dtype, batch.labels.dtype, batch.position_ids.dtype} == {torch.int64}
    assert batch.loss_mask.dtype == torch.bool


def test_to_moves_every_tensor():
    batch = make_loader(make_dataset([3, 4])).micro_batches(0)[0]
    before, after = vars(batch), vars(batch.to("meta"))
    devices = {name: value.device.type for name, value in after.items() if isinstance(value, torch.Tensor)}
    assert devices == dict.fromkeys(["tokens", "labels", "loss_mask", "position_ids"], "meta")
    assert [after[name] for name in after if name not in devices] == [
        before[name] for name in before if name not in devices
    ]


def test_without_shuffling_batches_are_in_file_order_and_wrap_around():
    loader = make_loader(make_dataset([5] * 6), shuffle=False)
    batches = [ids_of_steps(loader, range(step, step + 1)) for step in range(4)]
    assert batches == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5], [0, 1, 2, 3]]


def test_a_rank_has_consecutive_rows_of_the_global_batch():
    dataset = make_dataset([5] * 8)
    for rank, expected in enumerate([[[0, 1], [2, 3]], [[4, 5], [6, 7]]]):
        loader = make_loader(
            dataset,
            global_batch_size=8,
            micro_batch_size=2,
            data_parallel_size=2,
            data_parallel_rank=rank,
            shuffle=False,
        )
        assert [record_ids(batch) for batch in loader.micro_batches(0)] == expected
        assert (loader.rows_per_rank, loader.micro_batch_size) == (4, 2)


@given(dataset=datasets, batch_size=st.integers(1, 12), shuffle=st.booleans(), seed=st.integers(0, 99))
def test_every_record_comes_once_per_epoch(dataset, batch_size, shuffle, seed):
    size, epochs = len(dataset), 3
    loader = make_loader(dataset, global_batch_size=batch_size, shuffle=shuffle, seed=seed)
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
            dataset, micro_batch_size=micro_batch_size, data_parallel_rank=rank, data_parallel_size=ranks, **settings
        ).micro_batches(step)
    ]
    (expected,) = whole.micro_batches(step)
    assert torch.equal(rows(parts), rows([expected]))
    assert sum(batch.num_sequences for batch in parts) == expected.num_sequences
    assert sum(batch.num_tokens for batch in parts) == expected.num_tokens == whole.lengths(step).sum()
    assert len(parts) == ranks * count


@given(dataset=datasets, seed=st.integers(0, 99), steps=st.permutations(range(6)))
def test_a_step_does_not_depend_on_the_steps_before_it(dataset, seed, steps):
    loader = make_loader(dataset, seed=seed)
    for step in steps:
        assert torch.equal(rows(loader.micro_batches(step)), rows(make_loader(dataset, seed=seed).micro_batches(step)))


def test_epochs_and_seeds_have_orders_of_their_own():
    dataset = make_dataset([3] * 40)
    orders = [
        tuple(ids_of_steps(make_loader(dataset, seed=seed), range(10 * epoch, 10 * epoch + 10)))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({tuple(range(40)), *orders}) == 5


@given(dataset=datasets, batch_size=st.integers(1, 12), shuffle=st.booleans())
def test_without_wrapping_every_record_comes_once_and_empty_rows_fill_up(dataset, batch_size, shuffle):
    loader = make_loader(dataset, global_batch_size=batch_size, shuffle=shuffle, wrap=False)
    batches = [batch for step in range(loader.num_batches) for batch in loader.micro_batches(step)]
    assert sorted(index for batch in batches for index in record_ids(batch)) == list(range(len(dataset)))
    assert sum(batch.num_sequences for batch in batches) == len(dataset)
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == dataset.statistics().label_tokens
    assert len(batches) == loader.num_batches * batch_size


def test_empty_rows_have_no_label_and_keep_the_shape():
    loader = make_loader(make_dataset([5, 6, 4]), global_batch_size=4, micro_batch_size=2, shuffle=False, wrap=False)
    full, part = loader.micro_batches(0)
    assert full.tokens.shape == part.tokens.shape == (2, 5)
    assert (full.num_sequences, part.num_sequences) == (2, 1)
    assert part.tokens[1].tolist() == part.labels[1].tolist() == [PAD] * 5
    assert not part.loss_mask[1].any()


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
    assert loader.seq_length(step) == min(n for n in range(100) if n >= max(inputs) and n % multiple == 0)
    assert {batch.tokens.shape for batch in loader.micro_batches(step)} == {(1, loader.seq_length(step))}


def test_batch_sizes_that_do_not_divide_are_a_user_error():
    with pytest.raises(UserError, match=r"global_batch_size \(6\) must be a multiple of .* \(2 \* 2\)"):
        make_loader(make_dataset([3]), global_batch_size=6, micro_batch_size=2, data_parallel_size=2)
