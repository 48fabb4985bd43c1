"""Records of a step are dealt out whole, each once, evenly by tokens, in as many rows on every rank."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_psft.data.dealing import ByTokens, by_tokens, evened_out
from megatron_psft.data.loader import Shard
from megatron_psft.data.packing import one_per_pack
from tests.data.shards import CAPACITY, assert_right_where_real, context_sizes, datasets, make_loader, shards

EQUAL_ROWS = ("of a step", "of a micro-batch", "none")


@given(
    lengths=st.lists(st.integers(1, 16), max_size=40),
    ranks=st.integers(1, 9),
    room=st.integers(16, 40),
    multiple=st.integers(1, 4),
)
def test_each_is_dealt_out_once_into_rows_with_room_for_them(lengths, ranks, room, multiple):
    dealt = by_tokens(np.array(lengths, dtype=np.int64), ranks=ranks, room=room, multiple_of=multiple)
    assert sorted(number for rows in dealt for row in rows for number in row) == list(range(len(lengths)))
    assert max(sum(lengths[number] for number in row) for rows in dealt for row in rows) <= room
    (count,) = {len(rows) for rows in dealt}
    assert count >= 1
    assert count % multiple == 0


@given(lengths=st.lists(st.integers(1, 99), min_size=1, max_size=40), ranks=st.integers(1, 9), seed=st.integers(0, 9))
def test_the_share_of_a_rank_does_not_depend_on_the_room_of_rows(lengths, ranks, seed):
    lengths = np.array(lengths)
    shares = {
        room: [sorted(number for row in rows for number in row) for rows in by_tokens(lengths, ranks=ranks, room=room)]
        for room in (99, 150, 1000)
    }
    assert shares[99] == shares[150] == shares[1000] == evened_out(lengths, ranks)


def fewest_possible(lengths: np.ndarray, ranks: int) -> int:
    """No deal of whole records leaves every rank with less: not less than the mean or the longest record, and of the
    `k * ranks + 1` longest some rank has `k + 1`, at least the shortest of them."""
    longest_first = np.sort(lengths)[::-1]
    bounds = [-(-int(lengths.sum()) // ranks), int(longest_first[0])]
    for k in range(1, -(-len(lengths) // ranks)):
        bounds.append(int(longest_first[k * ranks - k : k * ranks + 1].sum()))
    return max(bounds)


def lengths_like_openr1(count: int) -> np.ndarray:
    lengths = np.random.default_rng(0).lognormal(np.log(3500), 0.7, 2 * count)
    return lengths[lengths < 8192].astype(np.int64)[:count] + 1


def test_padding_and_idle_rows_of_an_epoch_cost_little():
    """45k records to 8,192 tokens, 32 a step, 8 replicas, as the paper's; what counts is the slowest replica."""
    steps = lengths_like_openr1(45_000)[: 45_000 // 32 * 32].reshape(-1, 32)
    started, cost = time.process_time(), 0
    for lengths in steps:
        dealt = by_tokens(lengths, ranks=8, room=8192)
        cost += max(sum(max(int(lengths[row].sum()), 1) for row in rows) for rows in dealt)
    assert time.process_time() - started < 60  # 2 on an idle core
    assert cost / sum(fewest_possible(lengths, 8) for lengths in steps) < 1.01


@settings(max_examples=40)
@given(
    dataset=datasets,
    data_size=st.integers(1, 4),
    context_size=context_sizes,
    size=st.integers(1, 3),
    multiple=st.integers(1, 3),
    equal_rows=st.sampled_from(EQUAL_ROWS),
    step=st.integers(0, 5),
    other_size=st.integers(1, 3),
)
def test_a_step_has_the_records_that_it_has_without_packing(
    dataset, data_size, context_size, size, multiple, equal_rows, step, other_size
):
    """On any ranks and in micro-batches of any size, and the values of tokens find their way there and back."""
    plan = one_per_pack(dataset.lengths - 1, CAPACITY)
    count = min(len(dataset), 7)
    alone = make_loader(dataset, plan, global_batch_size=count)
    expected = alone.to_packs(step, [batch.tokens for batch in alone.micro_batches(step)])
    rule = ByTokens(equal_rows=equal_rows, multiple_of=multiple)
    parts, shapes, seen = torch.zeros_like(expected), [], []
    for shard in shards(data_size, context_size):
        own = Shard(**{**vars(shard), "by_tokens": rule})
        loader = make_loader(
            dataset, plan, global_batch_size=count, micro_batch_size=size, shard=own, one_row=True, pad_to_multiple_of=2
        )
        for of_size in (size, other_size):
            batches = loader.micro_batches(step, of_size)
            tokens = [batch.tokens for batch in batches]
            packs = loader.to_packs(step, tokens, of_size)
            assert packs.shape == (len(loader.own_numbers(step)), expected.shape[1])
        parts[loader.own_numbers(step)] += loader.to_packs(step, [b.tokens for b in loader.micro_batches(step)])
        batches = loader.micro_batches(step)
        assert all(
            map(torch.equal, loader.from_packs(step, expected[loader.own_numbers(step)]), (b.tokens for b in batches))
        )
        shapes.append([batch.seq_length for batch in batches])
        assert loader.positions_per_rank(step) == sum(batch.tokens.numel() for batch in batches)
        seen += [token for batch in batches for token in assert_right_where_real(batch, dataset)]
        assert len(batches) % multiple == 0
        assert all(batch.tokens.shape[1] % 2 == 0 for batch in batches)
    assert torch.equal(parts, expected)
    assert sorted(seen) == sorted(expected[expected != 0].tolist())
    assert len({len(lengths) for lengths in shapes}) == 1
    if equal_rows == "of a step":
        assert len({length for lengths in shapes for length in lengths}) == 1
    elif equal_rows == "of a micro-batch":
        assert all(len(set(lengths)) == 1 for lengths in zip(*shapes, strict=True))


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        ({}, ByTokens()),
        ({"data_size": 2, "expert_size": 2}, ByTokens(equal_rows="of a micro-batch")),
        ({"expert_tensor_size": 2}, ByTokens(equal_rows="of a micro-batch")),
        ({"pipeline_size": 2, "expert_size": 2}, ByTokens(equal_rows="of a step")),
        ({"pipeline_size": 4, "virtual_size": 2}, ByTokens(equal_rows="of a step", multiple_of=4)),
    ],
)
def test_what_a_layout_asks_of_rows(sizes, rule):
    one = {"pipeline_size": 1, "virtual_size": 1, "expert_size": 1, "expert_tensor_size": 1}
    assert ByTokens.of(SimpleNamespace(**(one | sizes))) == rule
