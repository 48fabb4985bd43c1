"""Sums over the label tokens of a micro-batch, against arithmetic by hand and in double precision."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_psft.config.schema import LossAggregation, ObjectiveConfig
from megatron_psft.metrics.sums import BatchSums, batch_sums
from megatron_psft.metrics.table import means
from megatron_psft.objectives.labels import LabelInputs, LabelStats
from megatron_psft.objectives.objective import Objective

OBJECTIVES = ("psft", "sft")


def sums_and_gradient(name, log_probs, old_log_probs, entropy, clip_ratio_high=0.28):
    log_probs = log_probs.detach().clone().requires_grad_()
    config = ObjectiveConfig(objective=name, clip_ratio_high=clip_ratio_high)
    given = LabelInputs(old_log_probs=old_log_probs)
    loss = Objective(config=config).token_loss(LabelStats(log_probs, entropy), given).sum()
    loss.backward()
    stats = LabelStats(log_probs.detach(), entropy)
    return batch_sums(loss.detach(), stats, given, config, labelled_records=3), log_probs.grad


def metrics_of(log_probs, old_log_probs):
    stats, given = LabelStats(log_probs, torch.zeros_like(log_probs)), LabelInputs(old_log_probs=old_log_probs)
    return batch_sums(torch.tensor(0.0), stats, given, ObjectiveConfig(), labelled_records=3)


def numbers(sums: BatchSums) -> dict[str, float]:
    return {name: value.item() for name, value in sums.totals.items()}


def random_batch(seed: int, count: int):
    """Log-probabilities whose ratios lie on both sides of the bound, old ones, and entropies."""
    generator = torch.Generator().manual_seed(seed)
    old_log_probs = -3 * torch.rand(count, generator=generator)
    log_probs = old_log_probs + 0.4 * torch.randn(count, generator=generator)
    return log_probs, old_log_probs, 5 * torch.rand(count, generator=generator)


def test_each_mean_of_the_table_has_a_sum_and_what_it_is_divided_by():
    over = means({"old"})
    assert set(metrics_of(torch.zeros(2), torch.zeros(2)).totals) == {*over, *over.values()}


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40))
def test_without_an_old_policy_sums_are_those_of_the_current_one(seed, count):
    log_probs, _, entropy = random_batch(seed, count)
    implied, _ = sums_and_gradient("psft", log_probs, None, entropy)
    explicit, _ = sums_and_gradient("psft", log_probs, log_probs, entropy)
    assert numbers(implied) == numbers(explicit)
    assert (implied.totals["loss"], implied.totals["ratio_mean"]) == (-count, count)
    assert (implied.totals["clip_fraction"], implied.totals["approx_kl"]) == (0, 0)


def test_sums_equal_arithmetic_by_hand():
    # Probabilities 0.5, 0.2, 0.9 and 0.25 were 0.4, 0.4, 0.3 and 0.25: ratios 1.25, 0.5, 3 and 1.
    probs, old_probs = torch.tensor([0.5, 0.2, 0.9, 0.25]), torch.tensor([0.4, 0.4, 0.3, 0.25])
    arguments = (probs.log(), old_probs.log(), torch.tensor([1.0, 2.0, 0.5, 0.25]))
    sums, gradient = sums_and_gradient("psft", *arguments, clip_ratio_high=0.3)
    negative_log = -math.log(0.5 * 0.2 * 0.9 * 0.25)
    shared = {
        "nll": negative_log,
        "entropy": 3.75,
        "ratio_mean": 5.75,
        "clip_fraction": 1.0,
        "approx_kl": 5.75 - 4 - math.log(1.25 * 0.5 * 3),
        "label_tokens": 4.0,
        "denominator": 4.0,
    }
    assert numbers(sums) == pytest.approx({"loss": -(1.25 + 0.5 + 1.3 + 1), **shared}, rel=1e-6)
    torch.testing.assert_close(sums.ratios, torch.tensor([1.25, 0.5, 3.0, 1.0]))
    torch.testing.assert_close(gradient, torch.tensor([-1.25, -0.5, 0.0, -1.0]))

    sums, gradient = sums_and_gradient("sft", *arguments, clip_ratio_high=0.3)
    assert numbers(sums) == pytest.approx({"loss": negative_log, **shared}, rel=1e-6)
    assert gradient.tolist() == [-1.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("log_ratio", [3e-5, 1e-4, 1e-3, 1e-2, -1e-4, -1e-2])
def test_approx_kl_of_a_small_step_keeps_its_digits(log_ratio):
    """Early in a window the log-probabilities have moved by 1e-4 or so, where r - 1 - log r in fp32 is all rounding."""
    log_probs = torch.full((8,), log_ratio)
    sums = metrics_of(log_probs, torch.zeros(8))
    exact = float(log_probs[0])
    assert sums.totals["approx_kl"].item() == pytest.approx(8 * (math.expm1(exact) - exact), rel=0.02)


@pytest.mark.parametrize(("log_ratio", "clamped"), [(100.0, 20.0), (-100.0, -20.0)])
def test_approx_kl_is_of_the_same_ratio_as_the_loss(log_ratio, clamped):
    sums = metrics_of(torch.tensor([log_ratio]), torch.zeros(1))
    ratio = math.exp(clamped)
    assert sums.totals["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-5)


@given(seed=st.integers(0, 2**32 - 1))
def test_approx_kl_is_never_negative(seed):
    log_probs, old_log_probs, _ = random_batch(seed, 12)
    near = old_log_probs + 1e-4 * (log_probs - old_log_probs)
    for current in (log_probs, near):
        assert metrics_of(current, old_log_probs).totals["approx_kl"].item() >= -1e-12


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_micro_batch_without_labels_sums_to_zero(objective):
    nothing = torch.zeros(0)
    sums, gradient = sums_and_gradient(objective, nothing, nothing, nothing)
    assert set(numbers(sums).values()) == {0.0}
    assert gradient.shape == (0,)


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    objective=st.sampled_from(OBJECTIVES),
    with_old=st.booleans(),
)
def test_sums_add_up_over_any_split_into_micro_batches(seed, sizes, objective, with_old):
    log_probs, old_log_probs, entropy = random_batch(seed, sum(sizes))

    def run(part):
        old = old_log_probs[part] if with_old else None
        return sums_and_gradient(objective, log_probs[part], old, entropy[part])

    whole, whole_gradient = run(slice(None))
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    parts = [run(slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    for name, value in numbers(whole).items():
        assert math.fsum(numbers(sums)[name] for sums, _ in parts) == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert torch.equal(torch.cat([sums.ratios for sums, _ in parts]), whole.ratios)
    assert torch.equal(torch.cat([gradient for _, gradient in parts]), whole_gradient)


def test_no_value_is_copied_to_the_host():
    """A meta tensor has no values: reading one raises."""
    values = torch.zeros(6, device="meta")
    stats, given = LabelStats(values, values), LabelInputs(old_log_probs=values)
    loss = Objective(config=ObjectiveConfig()).token_loss(stats, given).sum()
    sums = batch_sums(loss, stats, given, ObjectiveConfig(), labelled_records=3)
    assert {values.device.type for values in (*sums.totals.values(), sums.ratios)} == {"meta"}


@pytest.mark.parametrize(("aggregation", "denominator"), list(zip(get_args(LossAggregation), (8, 3, 3), strict=True)))
def test_losses_are_divided_by_tokens_or_by_records(aggregation, denominator):
    log_probs, old, entropy = random_batch(5, 8)
    config = ObjectiveConfig(loss_aggregation=aggregation)
    stats, given = LabelStats(log_probs, entropy), LabelInputs(old_log_probs=old)
    sums = batch_sums(torch.tensor(1.0), stats, given, config, labelled_records=3)
    assert (sums.totals["denominator"].item(), sums.totals["label_tokens"].item()) == (denominator, 8)
