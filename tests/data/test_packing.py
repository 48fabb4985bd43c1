"""A plan puts every record into one pack that has room for it, the same for everybody, and nearly full."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_psft.data.packing import EpochOrder, PackPlan, best_fit, one_per_pack

CAPACITY = 20
lengths = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60).map(np.array)


def packs_of(order: EpochOrder) -> list[list[int]]:
    return [order[index].tolist() for index in range(len(order))]


def one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing as the textbook has it, in quadratic time; packs of lengths."""
    packs: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [pack for pack in packs if sum(pack) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            packs.append([length])
    return packs


@given(lengths=lengths)
def test_packs_are_those_of_best_fit_decreasing(lengths):
    found = [lengths[pack].sum() for pack in packs_of(best_fit(lengths, CAPACITY).file_order())]
    expected = [sum(pack) for pack in one_by_one(lengths.tolist(), CAPACITY)]
    assert sorted(found) == sorted(expected)  # of packs with the same room any one will do


@given(lengths=lengths, make_plan=st.sampled_from([best_fit, one_per_pack]), seed=st.integers(0, 9))
def test_every_epoch_has_every_record_once_in_packs_with_room_for_it(lengths, make_plan, seed):
    plan = make_plan(lengths, CAPACITY)
    for order in (plan.file_order(), plan.shuffled(seed, 0), plan.shuffled(seed, 1)):
        packs = packs_of(order)
        assert len(packs) == len(plan)
        assert sorted(record for pack in packs for record in pack) == list(range(len(lengths)))
        assert max(lengths[pack].sum() for pack in packs) <= CAPACITY
        assert all(packs)


@given(lengths=lengths, seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_an_epoch_is_a_function_of_lengths_seed_and_epoch(lengths, seed, epoch):
    one, other = (packs_of(best_fit(lengths.copy(), CAPACITY).shuffled(seed, epoch)) for _ in range(2))
    assert one == other


@given(lengths=lengths)
def test_file_order_goes_by_the_first_record_of_each_pack(lengths):
    packs = packs_of(best_fit(lengths, CAPACITY).file_order())
    assert packs == sorted(sorted(pack) for pack in packs)
    assert packs_of(one_per_pack(lengths, CAPACITY).file_order()) == [[i] for i in range(len(lengths))]


def test_epochs_deal_records_of_equal_length_anew():
    plan = best_fit(np.array([7, 13] * 50), CAPACITY)
    partners = set()
    for epoch in range(20):
        order = plan.shuffled(1, epoch)
        partners |= {frozenset(pack) for pack in packs_of(order) if 0 in pack}
        assert all(sorted(plan.lengths[pack]) == [7, 13] for pack in packs_of(order))
    assert len(partners) > 10


def test_seeds_and_epochs_order_packs_differently():
    plan = one_per_pack(np.full(40, 3), CAPACITY)
    orders = [packs_of(plan.shuffled(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert all(one != other for i, one in enumerate(orders) for other in orders[:i])


def test_places_are_drawn_evenly():
    """Record 0 comes to each of the places of its length about equally often."""
    plan = one_per_pack(np.array([3, 3, 3, 3, 5]), CAPACITY)
    counts = np.zeros(5)
    for epoch in range(1000):
        counts[packs_of(plan.shuffled(5, epoch)).index([0])] += 1
    assert counts.min() > 150
    assert counts.max() < 250


def test_fill_by_hand():
    plan = best_fit(np.array([15, 9, 5, 8, 3]), CAPACITY)
    assert packs_of(plan.file_order()) == [[0, 2], [1, 3, 4]]
    assert plan.fill == 40 / 40
    plan = best_fit(np.array([11, 12]), CAPACITY)
    assert (len(plan), plan.fill) == (2, 23 / 40)
    assert str(plan) == "2 packs of at most 20 tokens, 57.50 % full, 1.0 records each"


@pytest.mark.parametrize("wrong", [[], [0, 3], [CAPACITY + 1]])
def test_lengths_that_cannot_be_packed_are_our_own_mistake(wrong):
    with pytest.raises(AssertionError):
        best_fit(np.array(wrong, dtype=np.int64), CAPACITY)


def test_a_million_records_are_packed_in_seconds_and_nearly_full():
    drawn = np.random.default_rng(0).lognormal(6.5, 1.0, 1_000_000)
    lengths = np.clip(drawn.astype(np.int64), 1, 16383)
    started = time.process_time()
    plan: PackPlan = best_fit(lengths, 16384)
    plan.shuffled(1, 0)
    assert time.process_time() - started < 20  # about 1.5 on an idle core
    assert plan.fill > 0.999
