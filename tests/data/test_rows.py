"""Where records stand in rows, and how context-parallel ranks share them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_psft.data.rows import packed_row, separate_rows
from megatron_psft.distributed.context_split import aligned_length, context_positions


def test_two_ranks_have_the_outer_and_the_inner_chunks_of_each_segment():
    assert context_positions((8, 4), 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert context_positions((8, 4), 1, 2).tolist() == [2, 3, 4, 5, 9, 10]
    assert context_positions((3, 5), 0, 1).tolist() == list(range(8))


@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=6), size=st.integers(2, 5))
def test_ranks_share_every_position_and_the_work(chunks, size):
    segments = tuple(2 * size * chunk for chunk in chunks)
    held = [context_positions(segments, rank, size) for rank in range(size)]
    assert sorted(np.concatenate(held)) == list(range(sum(segments)))
    starts = np.repeat(np.cumsum([0, *segments[:-1]]), segments)
    seen = [int((positions - starts[positions] + 1).sum()) for positions in held]  # keys that a rank's queries see
    assert len(set(seen)) == 1


def test_a_segment_that_ranks_cannot_cut_evenly_is_our_own_mistake():
    with pytest.raises(AssertionError, match="a segment of 6 is not cut evenly by 2 ranks"):
        context_positions((4, 6), 0, 2)


@pytest.mark.parametrize(("length", "size", "expected"), [(5, 1, 5), (5, 2, 8), (8, 2, 8), (1, 4, 8), (9, 3, 12)])
def test_records_are_padded_to_what_ranks_cut_evenly(length, size, expected):
    assert aligned_length(length, size) == expected


def test_a_packed_row_by_hand():
    layout = packed_row([3, 1, 2], seq_length=8)
    assert layout.segments == (3, 1, 2, 2), "the row's padding is a segment of its own"
    arrays = [np.array([1, 2, 3]), np.array([4]), np.array([5, 6])]
    assert layout.fill(arrays, padding=9).tolist() == [[1, 2, 3, 4, 5, 6, 9, 9]]
    assert layout.positions().tolist() == [[0, 1, 2, 0, 0, 1, 0, 1]]


def test_a_packed_row_shared_by_two_ranks_by_hand():
    arrays = [np.array([1, 2, 3]), np.array([4, 5, 6, 7, 8])]
    found = []
    for rank in range(2):
        layout = packed_row([3, 5], seq_length=16, context_rank=rank, context_size=2)
        assert layout.segments == (4, 8, 4)
        found.append((layout.fill(arrays, padding=0).tolist(), layout.positions().tolist()))
    assert found[0] == ([[1, 0, 4, 5, 0, 0, 0, 0]], [[0, 3, 0, 1, 6, 7, 0, 3]])
    assert found[1] == ([[2, 3, 6, 7, 8, 0, 0, 0]], [[1, 2, 2, 3, 4, 5, 1, 2]])


def test_a_full_row_has_no_segment_of_padding_and_an_empty_one_nothing_else():
    assert packed_row([3, 5], seq_length=8).segments == (3, 5)
    empty = packed_row([], seq_length=8, context_size=2)
    assert empty.segments == (8,)
    assert empty.fill([], padding=7).tolist() == [[7] * 4]


def test_separate_rows_by_hand():
    layout = separate_rows(2, rows=3, seq_length=4)
    assert layout.segments is None
    assert layout.fill([np.array([1, 2]), np.array([3])], padding=0).tolist() == [[1, 2, 0, 0], [3, 0, 0, 0], [0] * 4]
    assert layout.positions().tolist() == [[0, 1, 2, 3]] * 3
