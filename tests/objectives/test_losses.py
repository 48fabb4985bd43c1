"""Token losses against arithmetic in double precision and derivatives written out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.objectives.builtin.psft import is_clipped
from megatron_psft.objectives.labels import LabelInputs, LabelStats, Records
from megatron_psft.objectives.objective import Objective
from megatron_psft.objectives.ratio import policy_ratio
from megatron_psft.objectives.registry import OBJECTIVES
from tests.support import oracle

log_probability = st.floats(-30, 0, width=32)


def leaf(values):
    return torch.tensor(values, dtype=torch.float32, requires_grad=True)


def gradient_of(name, log_probs, old_log_probs):
    log_probs = log_probs.detach().clone().requires_grad_()
    stats, given = LabelStats(log_probs, torch.zeros_like(log_probs)), LabelInputs(old_log_probs=old_log_probs)
    Objective(config=ObjectiveConfig(objective=name)).token_loss(stats, given).sum().backward()
    return log_probs.grad


def psft_loss(log_probs, old_log_probs, *, clip_ratio_high):
    config = ObjectiveConfig(objective="psft", clip_ratio_high=clip_ratio_high)
    stats, given = LabelStats(log_probs, torch.zeros_like(log_probs)), LabelInputs(old_log_probs=old_log_probs)
    return Objective(config=config).token_loss(stats, given)


def random_batch(seed: int, *shape: int):
    """Log-probabilities whose ratios lie on both sides of the bound, old ones, and entropies."""
    generator = torch.Generator().manual_seed(seed)
    old_log_probs = -3 * torch.rand(shape, generator=generator)
    log_probs = old_log_probs + 0.4 * torch.randn(shape, generator=generator)
    entropy = 5 * torch.rand(shape, generator=generator)
    return log_probs, old_log_probs, entropy


@given(log_prob=log_probability, old_log_prob=log_probability, clip_ratio_high=st.floats(0.01, 4))
def test_psft_is_the_ratio_up_to_its_bound_and_so_is_its_gradient(log_prob, old_log_prob, clip_ratio_high):
    log_ratio = log_prob - old_log_prob
    ratio = math.exp(min(max(log_ratio, -20), 20))
    bound = 1 + clip_ratio_high
    assume(abs(ratio / bound - 1) > 1e-5 and abs(abs(log_ratio) - 20) > 1e-4)
    log_probs = leaf(log_prob)
    loss = psft_loss(log_probs, torch.tensor(old_log_prob), clip_ratio_high=clip_ratio_high)
    loss.backward()
    assert loss.item() == pytest.approx(-min(ratio, bound), rel=1e-5)
    if ratio > bound or log_ratio < -20:  # the clip, and the guard against underflow, where the ratio is below 3e-9
        assert log_probs.grad.item() == 0.0
    else:
        assert log_probs.grad.item() == pytest.approx(-ratio, rel=1e-5)


@pytest.mark.parametrize("log_ratio", [0.0625, 0.25, 0.7, 3.0])
def test_clip_at_the_bound_has_a_gradient_and_above_it_none(log_ratio):
    log_probs, old_log_probs = leaf([-1.0 + log_ratio]), torch.tensor([-1.0])
    ratio = torch.exp(log_probs.detach() - old_log_probs)
    below = float(torch.nextafter(ratio, torch.zeros(1)))
    for bound, gradient, clipped in ((float(ratio), -ratio.item(), False), (below, 0.0, True)):
        loss = psft_loss(log_probs, old_log_probs, clip_ratio_high=bound - 1)
        assert torch.autograd.grad(loss.sum(), log_probs)[0].item() == gradient
        assert is_clipped(ratio, None, ObjectiveConfig(clip_ratio_high=bound - 1)).item() == clipped


@pytest.mark.parametrize("advantage", [None, 2.0, -0.5, 0.0])
def test_a_trust_region_in_probabilities_says_itself_which_tokens_have_no_gradient(advantage):
    """0.16 up and down from 0.5, and from 0.01, which is 17 times the probability; 0.14 both ways."""
    old = torch.tensor([0.5, 0.5, 0.01, 0.5, 0.5])
    log_probs = (old + torch.tensor([0.16, -0.16, 0.16, 0.14, -0.14])).log().requires_grad_()
    advantages = None if advantage is None else torch.full((5,), advantage)
    given = LabelInputs(old_log_probs=old.log(), advantages=advantages)
    objective = Objective(config=ObjectiveConfig(objective="dppo-tv"))
    losses = objective.token_loss(LabelStats(log_probs, torch.zeros(5)), given)
    (gradient,) = torch.autograd.grad(losses.sum(), log_probs)
    sign = 1 if advantage is None else advantage
    clipped = {1: [True, False, True, False, False], -1: [False, True, False, False, False], 0: [False] * 5}
    wanted = clipped[(sign > 0) - (sign < 0)]
    assert objective.is_clipped(log_probs.detach(), given).tolist() == wanted
    ratio = (log_probs.detach() - old.log()).exp()
    torch.testing.assert_close(gradient, -sign * ratio.masked_fill(torch.tensor(wanted), 0.0))


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40))
def test_at_the_old_policy_psft_has_exactly_the_gradient_of_sft(seed, count):
    log_probs, _, _ = random_batch(seed, count)
    assert torch.equal(gradient_of("sft", log_probs, None), -torch.ones(count))
    assert torch.equal(gradient_of("psft", log_probs, None), -torch.ones(count))
    assert torch.equal(gradient_of("psft", log_probs, log_probs), -torch.ones(count))
    assert torch.equal(gradient_of("dppo-tv", log_probs, None), -torch.ones(count))
    assert torch.equal(gradient_of("dppo-tv", log_probs, log_probs), -torch.ones(count))


@given(st.floats(-(2.0**100), 0, width=32))
def test_the_ratio_of_equal_log_probabilities_is_exactly_one(log_prob):
    assert policy_ratio(torch.tensor(log_prob), torch.tensor(log_prob)).item() == 1.0


@pytest.mark.parametrize("log_ratio", [20.5, 87.0, 1e4, 1e38, math.inf])
def test_a_diverged_policy_gives_finite_numbers(log_ratio):
    near, far = torch.tensor(0.0), torch.tensor(-log_ratio)
    assert policy_ratio(near, far).item() == pytest.approx(math.exp(20), rel=1e-5)
    assert policy_ratio(far, near).item() == pytest.approx(math.exp(-20), rel=1e-5)
    for log_prob, old_log_prob, expected in ((0.0, -log_ratio, -1.28), (-log_ratio, 0.0, -math.exp(-20))):
        log_probs = leaf(log_prob)
        loss = psft_loss(log_probs, torch.tensor(old_log_prob), clip_ratio_high=0.28)
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert log_probs.grad.item() == 0.0


def test_sft_is_the_negative_log_probability():
    log_probs = leaf([-0.25, 0.0, -7.0])
    config = ObjectiveConfig(objective="sft")
    loss = Objective(config=config).token_loss(LabelStats(log_probs, torch.zeros(3)), LabelInputs())
    loss.sum().backward()
    assert loss.tolist() == [0.25, 0.0, 7.0]
    assert log_probs.grad.tolist() == [-1.0, -1.0, -1.0]


EVERY = tuple(name for name in OBJECTIVES if name != "dpo")  # which test_preference.py is about
LOG2 = math.log(2)
BY_HAND = {
    # settings, p, f as a probability, loss, its derivative by log p
    "sft": ({}, 0.5, None, LOG2, -1),
    "dft": ({}, 0.25, None, 0.5 * LOG2, -0.25),
    "sft-kl": ({"kl_coef": 0.5}, 0.25, 0.5, 2 * LOG2 + 0.5 * (2 - LOG2 - 1), -1 + 0.5 * (1 - 2)),
    "asft": ({"kl_coef": 2}, 0.5, 0.25, 0.5 * LOG2 + 2 * (0.5 + LOG2 - 1), -0.5 + 2 * (1 - 0.5)),
    "iw-sft": ({}, 0.5, 0.25, 4 * LOG2, -4),  # one token: w = (0.5 / 0.25)^2
    "iw-sft bounded": ({}, 0.5, 0.05, 16 * LOG2, -16),
    "iw-sft per token": ({"iw_level": "token"}, 0.5, 0.4, 1.25 * LOG2, -1.25),
    "iw-sft per token, bounded above": ({"iw_level": "token"}, 0.5, 0.125, 1.8 * LOG2, -1.8),
    "iw-sft per token, bounded below": ({"iw_level": "token"}, 0.0625, 0.5, 0.2 * 4 * LOG2, -0.2),
    "eaft": ({"eaft_alpha": 2}, 0.5, None, 0.25 * LOG2, -0.25),  # entropy 1.5, half of 3
    "p-power": ({"p_power_q": 0.5}, 0.25, None, (1 - 0.5) / 0.5, -0.5),
    "trsft within": ({"trsft_alpha": 0.1}, 0.125, None, 3 * LOG2, -1),
    "trsft outside": ({"trsft_alpha": 0.5}, 0.125, None, 0.25 * 3 * LOG2, -0.25),
    "profit kept": ({"profit_threshold": 0.25}, 0.25, None, 2 * LOG2, -1),
    "profit left out": ({"profit_threshold": 0.26}, 0.25, None, 0, 0),
    "dppo-tv": ({}, 0.5, 0.4, 1.25 * LOG2, -1.25),  # f stands for the old policy's
    "dppo-tv rare": ({}, 0.25, 0.125, 2 * 2 * LOG2, -2),  # beyond the ratio's clip
    "dppo-tv frequent": ({}, 0.5, 0.25, 0, 0),
    "dppo-tv falling": ({}, 0.25, 0.5, 0.5 * 2 * LOG2, -0.5),
    "dppo-tv capped": ({"tv_ratio_cap": 1.5}, 0.25, 0.125, 1.5 * 2 * LOG2, -1.5),
    "deft": ({}, 0.0625, None, (1 - 0.25) / 0.5, -0.25),  # sum of squares 0.5
    "cadft of a record like others": ({}, 0.25, None, 0.5 * LOG2, -0.25),
    "cadft of an improbable record": ({"cadft_beta": LOG2}, 0.25, None, 0.25 * 0.5 * LOG2, -0.0625),  # 2^-2
    "cadft of a probable record": ({}, 0.25, None, 0.5 * LOG2, -0.25),
}
RECORD_Z = {"cadft of an improbable record": 2.0, "cadft of a probable record": -2.0}


def evaluate(config: ObjectiveConfig, stats: LabelStats, given: LabelInputs):
    """Losses and their derivatives by the log-probabilities."""
    log_probs = stats.log_probs.detach().clone().requires_grad_()
    losses = Objective(config=config).token_loss(stats._replace(log_probs=log_probs), given)
    (gradient,) = torch.autograd.grad(losses.sum(), log_probs)
    return losses.detach(), gradient


def one_record(count: int) -> Records:
    return Records(
        ids=torch.zeros(count, dtype=torch.int64), label_counts=torch.tensor([count]), add_up=lambda values: values
    )


@pytest.mark.parametrize("case", BY_HAND)
def test_each_loss_and_gradient_is_that_of_arithmetic_by_hand(case):
    settings, prob, ref_prob, loss, derivative = BY_HAND[case]
    config = ObjectiveConfig(objective=case.split()[0], **settings)
    double = {"dtype": torch.float64}
    stats = LabelStats(torch.tensor([prob], **double).log(), *torch.tensor([[9.0], [1.5], [0.5]], **double))
    ref = None if ref_prob is None else torch.tensor([ref_prob], **double).log()
    z = torch.tensor([RECORD_Z.get(case, 0.0)], **double)
    given = LabelInputs(old_log_probs=ref, ref_log_probs=ref, records=one_record(1), nll_z=z)
    losses, gradient = evaluate(config, stats, given)
    assert losses.tolist() == pytest.approx([loss], rel=1e-12)
    assert gradient.tolist() == pytest.approx([derivative], rel=1e-12)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("seed", range(3))
def test_each_loss_and_gradient_is_that_of_autograd_through_the_whole_softmax(name, seed):
    """In fp64, down to the logits, against formulas that are written from the papers."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(40, 60, generator=generator, dtype=torch.float64)
    labels = logits.argsort(dim=1, descending=True)[torch.arange(40), torch.arange(40) % 8]
    distribution = logits.requires_grad_().log_softmax(dim=1)
    now = distribution.detach().gather(1, labels[:, None])[:, 0]
    old, ref = now + 0.5 * torch.randn(2, 40, generator=generator, dtype=torch.float64)
    settings = {"iw_level": ("sequence", "token")[seed % 2]} if name == "iw-sft" else {}
    nll_z = torch.randn(40, generator=generator, dtype=torch.float64)
    known = {"old_log_probs": old, "ref_log_probs": ref, "nll_z": nll_z}
    wanted = oracle.token_losses(name, distribution, labels, **known, **settings)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), logits)

    fresh = logits.detach().requires_grad_()
    log_probs = fresh.log_softmax(dim=1)
    probs = log_probs.detach().exp()
    top = probs.topk(20).values / probs.topk(20).values.sum(dim=1, keepdim=True)
    stats = LabelStats(
        log_probs.gather(1, labels[:, None])[:, 0],
        torch.special.entr(probs).sum(dim=1),
        torch.special.entr(top).sum(dim=1),
        probs.square().sum(dim=1),
    )
    given = LabelInputs(old_log_probs=old, ref_log_probs=ref, records=one_record(40), nll_z=nll_z)
    found = Objective(config=ObjectiveConfig(objective=name, **settings)).token_loss(stats, given)
    (gradient,) = torch.autograd.grad(found.sum(), fresh)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 2**32 - 1), clip_ratio_low=st.floats(0.05, 0.9), clip_ratio_high=st.floats(0.05, 3))
def test_with_advantages_psft_is_ppo(seed, clip_ratio_low, clip_ratio_high):
    log_probs, old, entropy = (values.double() for values in random_batch(seed, 24))
    advantages = torch.randn(24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    advantages[:2] = 0.0
    config = ObjectiveConfig(clip_ratio_low=clip_ratio_low, clip_ratio_high=clip_ratio_high)
    given = LabelInputs(old_log_probs=old, advantages=advantages)
    losses, gradient = evaluate(config, LabelStats(log_probs, entropy), given)
    leaf_log_probs = log_probs.clone().requires_grad_()
    ratio = (leaf_log_probs - old).exp()
    ppo = -torch.min(ratio * advantages, ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high) * advantages)
    (ppo_gradient,) = torch.autograd.grad(ppo.sum(), leaf_log_probs)
    torch.testing.assert_close(losses, ppo.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, ppo_gradient, rtol=1e-12, atol=1e-12)
    assert torch.equal(is_clipped(ratio.detach(), advantages, config), (gradient == 0) & (advantages != 0))


@given(seed=st.integers(0, 2**32 - 1))
def test_an_advantage_of_one_changes_no_bit(seed):
    log_probs, old, entropy = random_batch(seed, 24)
    for config in (ObjectiveConfig(objective="psft"), ObjectiveConfig(objective="sft")):
        plain, weighed = (
            evaluate(config, LabelStats(log_probs, entropy), LabelInputs(old_log_probs=old, advantages=advantages))
            for advantages in (None, torch.ones(24))
        )
        assert all(map(torch.equal, plain, weighed))


def test_the_sequence_weight_of_iw_sft_is_of_the_record_over_all_its_ranks():
    """Of the second record, whose labels are 4, this rank has one; another has the rest, whose log-ratios sum to 1."""
    log_probs, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -2.2, -0.7])
    records = Records(
        ids=torch.tensor([0, 0, 1]),
        label_counts=torch.tensor([2, 4, 0]),
        add_up=lambda sums: sums + torch.tensor([0.0, 1.0, 0.0]),
    )
    stats, given = LabelStats(log_probs, log_probs), LabelInputs(ref_log_probs=ref, records=records)
    _, gradient = evaluate(ObjectiveConfig(objective="iw-sft"), stats, given)
    first, second = math.exp(2 * (0.5 + 0.2) / 2), math.exp(2 * (0.2 + 1.0) / 4)
    assert gradient.tolist() == pytest.approx([-first, -first, -second], rel=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_weights_of_the_aggregation_multiply_any_loss(name):
    log_probs, old, entropy = random_batch(5, 8)
    weights = torch.linspace(0.1, 3, 8)
    stats = LabelStats(log_probs, entropy, entropy, 0.1 * entropy)
    given = LabelInputs(old_log_probs=old, ref_log_probs=old, records=one_record(8), nll_z=entropy - 2)
    config = ObjectiveConfig(objective=name, profit_threshold=0.0)
    plain, gradient = evaluate(config, stats, given)
    weighed, weighed_gradient = evaluate(config, stats, replace(given, weights=weights))
    torch.testing.assert_close(weighed, plain * weights)
    torch.testing.assert_close(weighed_gradient, gradient * weights)
