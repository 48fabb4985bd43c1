"""Token losses and their sums, against arithmetic in double precision and derivatives written out by hand."""

import ast
import math
from dataclasses import fields, replace
from typing import get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_psft.config.schema import LossAggregation, ObjectiveConfig, ObjectiveName
from megatron_psft.loss import objectives
from megatron_psft.loss.labels import LabelInputs, LabelStats, Records
from megatron_psft.loss.objectives import BatchSums, Objective, batch_sums, policy_ratio
from tests.support import reference

OBJECTIVES = ("psft", "sft")
SUMS = [field.name for field in fields(BatchSums) if field.name not in ("ratios", "pairs")]
log_probability = st.floats(-30, 0, width=32)


def leaf(values):
    return torch.tensor(values, dtype=torch.float32, requires_grad=True)


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


def psft_loss(log_probs, old_log_probs, *, clip_ratio_high):
    config = ObjectiveConfig(objective="psft", clip_ratio_high=clip_ratio_high)
    stats, given = LabelStats(log_probs, torch.zeros_like(log_probs)), LabelInputs(old_log_probs=old_log_probs)
    return Objective(config=config).token_loss(stats, given)


def numbers(sums: BatchSums) -> dict[str, float]:
    return {name: getattr(sums, name).item() for name in SUMS}


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
def test_a_ratio_that_equals_its_bound_still_learns_and_the_next_number_does_not(log_ratio):
    log_probs, old_log_probs = leaf([-1.0 + log_ratio]), torch.tensor([-1.0])
    ratio = torch.exp(log_probs.detach() - old_log_probs)
    at_bound, gradient_at_bound = sums_and_gradient("psft", log_probs, old_log_probs, torch.zeros(1), float(ratio) - 1)
    below = float(torch.nextafter(ratio, torch.zeros(1)))
    beyond, gradient_beyond = sums_and_gradient("psft", log_probs, old_log_probs, torch.zeros(1), below - 1)
    assert (gradient_at_bound.item(), at_bound.clipped.item()) == (-ratio.item(), 0.0)
    assert (gradient_beyond.item(), beyond.clipped.item()) == (0.0, 1.0)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40))
def test_at_the_old_policy_psft_has_exactly_the_gradient_of_sft(seed, count):
    log_probs, _, entropy = random_batch(seed, count)
    _, sft = sums_and_gradient("sft", log_probs, None, entropy)
    implied, without_old = sums_and_gradient("psft", log_probs, None, entropy)
    explicit, with_equal_old = sums_and_gradient("psft", log_probs, log_probs, entropy)
    assert torch.equal(sft, -torch.ones(count))
    assert torch.equal(without_old, sft)
    assert torch.equal(with_equal_old, sft)
    assert numbers(implied) == numbers(explicit)
    assert (implied.loss, implied.ratio) == (-count, count)
    assert (implied.clipped, implied.approx_kl) == (0, 0)


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


def test_sums_equal_arithmetic_by_hand():
    # Probabilities 0.5, 0.2, 0.9 and 0.25 were 0.4, 0.4, 0.3 and 0.25: ratios 1.25, 0.5, 3 and 1.
    probs, old_probs = torch.tensor([0.5, 0.2, 0.9, 0.25]), torch.tensor([0.4, 0.4, 0.3, 0.25])
    arguments = (probs.log(), old_probs.log(), torch.tensor([1.0, 2.0, 0.5, 0.25]))
    sums, gradient = sums_and_gradient("psft", *arguments, clip_ratio_high=0.3)
    negative_log = -math.log(0.5 * 0.2 * 0.9 * 0.25)
    shared = {
        "nll": negative_log,
        "entropy": 3.75,
        "ratio": 5.75,
        "clipped": 1.0,
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
    assert sums.approx_kl.item() == pytest.approx(8 * (math.expm1(exact) - exact), rel=0.02)


@pytest.mark.parametrize(("log_ratio", "clamped"), [(100.0, 20.0), (-100.0, -20.0)])
def test_approx_kl_is_of_the_same_ratio_as_the_loss(log_ratio, clamped):
    sums = metrics_of(torch.tensor([log_ratio]), torch.zeros(1))
    ratio = math.exp(clamped)
    assert sums.approx_kl.item() == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-5)


@given(seed=st.integers(0, 2**32 - 1))
def test_approx_kl_is_never_negative(seed):
    log_probs, old_log_probs, _ = random_batch(seed, 12)
    near = old_log_probs + 1e-4 * (log_probs - old_log_probs)
    for current in (log_probs, near):
        assert metrics_of(current, old_log_probs).approx_kl.item() >= -1e-12


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_micro_batch_without_labels_sums_to_zero(objective):
    nothing = torch.zeros(0)
    sums, gradient = sums_and_gradient(objective, nothing, nothing, nothing)
    assert numbers(sums) == dict.fromkeys(SUMS, 0.0)
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
    assert {getattr(sums, name).device.type for name in (*SUMS, "ratios")} == {"meta"}


def test_the_maths_knows_nothing_of_parallelism():
    with open(objectives.__file__, encoding="utf-8") as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if "." in name} == {
        "collections.abc",
        "megatron_psft.config.schema",
        "megatron_psft.loss.labels",
        "megatron_psft.loss.preference",
    }
    assert {name for name in imported if "." not in name} == {"dataclasses", "typing", "torch"}


EVERY = tuple(name for name in get_args(ObjectiveName) if name != "dpo")  # which test_preference.py is about
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
    "deft": ({}, 0.0625, None, (1 - 0.25) / 0.5, -0.25),  # sum of squares 0.5
}


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
    losses, gradient = evaluate(config, stats, LabelInputs(ref_log_probs=ref, records=one_record(1)))
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
    wanted = reference.token_losses(name, distribution, labels, old_log_probs=old, ref_log_probs=ref, **settings)
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
    given = LabelInputs(old_log_probs=old, ref_log_probs=ref, records=one_record(40))
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
    sums = batch_sums(losses.sum(), LabelStats(log_probs, entropy), given, config, labelled_records=1)
    non_differentiable = (gradient == 0) & (advantages != 0)
    assert sums.clipped.item() == non_differentiable.sum().item()


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
    given = LabelInputs(old_log_probs=old, ref_log_probs=old, records=one_record(8))
    config = ObjectiveConfig(objective=name, profit_threshold=0.0)
    plain, gradient = evaluate(config, stats, given)
    weighed, weighed_gradient = evaluate(config, stats, replace(given, weights=weights))
    torch.testing.assert_close(weighed, plain * weights)
    torch.testing.assert_close(weighed_gradient, gradient * weights)


@pytest.mark.parametrize(("aggregation", "denominator"), list(zip(get_args(LossAggregation), (8, 3, 3), strict=True)))
def test_losses_are_divided_by_tokens_or_by_records(aggregation, denominator):
    log_probs, old, entropy = random_batch(5, 8)
    config = ObjectiveConfig(loss_aggregation=aggregation)
    stats, given = LabelStats(log_probs, entropy), LabelInputs(old_log_probs=old)
    sums = batch_sums(torch.tensor(1.0), stats, given, config, labelled_records=3)
    assert (sums.denominator.item(), sums.label_tokens.item()) == (denominator, 8)


@pytest.mark.parametrize("name", EVERY)
def test_the_configuration_tells_without_torch_whether_a_reference_is_needed(name):
    config = ObjectiveConfig(objective=name)
    assert config.needs_reference == ("reference" in Objective(config=config).needs)
