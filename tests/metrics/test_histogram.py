"""Percentiles from counts in bins, beside those of the sorted values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_psft.metrics.histogram import NUM_BINS, count_bins, percentiles
from tests.support import oracle

PERCENTS = (1, 5, 50, 95, 99, 100)
NEAR = 2.0**-10
RATIOS = st.one_of(st.floats(0.5, 2, width=32), st.floats(1 - NEAR, 1 + NEAR, width=32), st.just(1.0))
"""Within what the clip is about, and as near 1 as training moves most tokens."""


@given(ratios=st.lists(RATIOS, min_size=1, max_size=200), percent=st.sampled_from(PERCENTS))
def test_a_percentile_is_within_a_thousandth_of_the_nearest_rank(ratios, percent):
    values = torch.tensor(ratios).log()
    (found,) = percentiles(count_bins(values), [percent])
    exact = oracle.nearest_rank(values.double(), percent)
    assert math.exp(found) == pytest.approx(math.exp(exact), rel=1e-3)
    assert abs(found - exact) <= 0.0014 * abs(exact) + 2e-7, "much nearer, where ratios are near 1"


@given(log_ratios=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=50), percent=st.sampled_from(PERCENTS))
def test_far_from_1_the_error_is_a_share_of_the_log_ratio(log_ratios, percent):
    values = torch.tensor(log_ratios)
    (found,) = percentiles(count_bins(values), [percent])
    exact = oracle.nearest_rank(values.double(), percent)
    assert abs(found - exact) <= 0.0014 * abs(exact) + 2e-7


@given(ratios=st.lists(RATIOS, min_size=2, max_size=60), seed=st.integers(0, 2**32 - 1))
def test_counts_add_up_whoever_counts_which_token(ratios, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(ratios).log()
    shuffled = values[torch.randperm(len(values), generator=generator)]
    cut = int(torch.randint(len(values) + 1, (), generator=generator))
    assert torch.equal(count_bins(shuffled[:cut]) + count_bins(shuffled[cut:]), count_bins(values))


def test_a_ratio_of_1_is_exactly_1():
    assert percentiles(count_bins(torch.tensor([-0.5, 0.0, -0.0, 0.0, 0.5])), [21, 50, 79]) == [0.0, 0.0, 0.0]


def test_a_percentile_is_a_rank_and_no_interpolation():
    counts = count_bins(torch.tensor([-0.3] * 5 + [0.4] * 95))
    assert percentiles(counts, [5, 6]) == pytest.approx([-0.3, 0.4], rel=0.0015)


def test_without_values_all_percentiles_are_0():
    nothing = count_bins(torch.empty(0))
    assert nothing.shape == (NUM_BINS,)
    assert percentiles(nothing, [5, 95]) == [0.0, 0.0]


def test_values_that_are_not_finite_are_counted_at_an_end():
    counts = count_bins(torch.tensor([math.nan, math.inf, -math.inf, 0.0]))
    assert counts.sum() == 4
    assert counts[NUM_BINS // 2] == 1
    assert counts[0] + counts[-1] == 3
