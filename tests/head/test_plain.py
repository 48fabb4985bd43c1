"""Sharded log-probabilities, entropy and gradient, against log_softmax over all columns in double precision."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_psft.head.plain import label_stats
from tests.support.marks import slow

WORLD_SIZES = (1, 2, 4)


class Case(NamedTuple):
    """Logits `[s, b, columns of all ranks]`; labels and weights `[b, s]`. The loss is sum(weights * log_probs)."""

    logits: Tensor
    labels: Tensor
    weights: Tensor
    vocab_size: int


class Result(NamedTuple):
    """log_probs and entropy `[b, s]`, gradient as the logits."""

    log_probs: Tensor
    entropy: Tensor
    gradient: Tensor


def _on_rank(cases: list[Case], world_size: int) -> list[Result]:
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import process_group

    with process_group(detect(0), world_size):
        return [_shard_of(case, dist.get_rank(), world_size) for case in cases]


def _shard_of(case: Case, rank: int, world_size: int) -> Result:
    shard = case.logits.chunk(world_size, dim=-1)[rank].clone()
    logits = shard.clone().requires_grad_()
    stats = label_stats(logits, case.labels, vocab_size=case.vocab_size, group=dist.group.WORLD)
    assert not stats.entropy.requires_grad
    (case.weights * stats.log_probs).sum().backward()
    assert torch.equal(logits.detach().view(torch.uint8), shard.view(torch.uint8)), "the logits were written to"
    return Result(stats.log_probs.detach(), stats.entropy, logits.grad)


def sharded(pool, world_size: int, *cases: Case) -> list[Result]:
    """Results over all columns, after a check that the ranks agree in every bit."""
    by_rank = pool.run(_on_rank, world_size, list(cases), world_size)
    results = []
    for shards in zip(*by_rank, strict=True):
        for shard in shards[1:]:
            assert torch.equal(shard.log_probs, shards[0].log_probs)
            assert torch.equal(shard.entropy, shards[0].entropy)
        gradient = torch.cat([shard.gradient for shard in shards], dim=-1)
        results.append(Result(shards[0].log_probs, shards[0].entropy, gradient))
    return results


def unsharded(case: Case) -> Result:
    logits = case.logits[..., : case.vocab_size].double().requires_grad_()
    distribution = torch.log_softmax(logits.transpose(0, 1), dim=-1)
    log_probs = distribution.gather(-1, case.labels.unsqueeze(-1)).squeeze(-1)
    (case.weights * log_probs).sum().backward()
    entropy = -(distribution.exp() * distribution).sum(dim=-1)
    padding = case.logits.shape[-1] - case.vocab_size
    return Result(log_probs.detach(), entropy.detach(), torch.nn.functional.pad(logits.grad, (0, padding)))


def assert_equal(result: Result, case: Case) -> None:
    expected = unsharded(case)
    assert (result.log_probs.dtype, result.entropy.dtype) == (torch.float32, torch.float32)
    assert result.gradient.dtype == case.logits.dtype
    torch.testing.assert_close(result.log_probs.double(), expected.log_probs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.entropy.double(), expected.entropy, rtol=1e-6, atol=2e-6)
    rounding = max(torch.finfo(case.logits.dtype).eps, 1e-5)
    torch.testing.assert_close(result.gradient.double(), expected.gradient, rtol=rounding, atol=1e-6)
    assert torch.equal(
        result.gradient[..., case.vocab_size :], torch.zeros_like(case.logits[..., case.vocab_size :])
    ), "padding columns have a gradient"


def random_case(
    columns: int, vocab_size: int, *, rows=(3, 2), scale=3.0, junk=1e4, dtype=torch.float32, seed=0
) -> Case:
    """`columns` over all ranks, of which those from `vocab_size` on hold `junk`; some weights are zero."""
    generator = torch.Generator().manual_seed(seed)
    seq, batch = rows
    logits = scale * torch.randn(seq, batch, columns, generator=generator)
    logits[..., vocab_size:] = junk
    labels = torch.randint(vocab_size, (batch, seq), generator=generator)
    weights = torch.randn(batch, seq, generator=generator) * (torch.rand(batch, seq, generator=generator) < 0.8)
    return Case(logits.to(dtype), labels, weights, vocab_size)


@st.composite
def cases(draw, world_size: int) -> Case:
    columns = world_size * draw(st.integers(1, 9))
    return random_case(
        columns,
        draw(st.integers(1, columns)),
        rows=(draw(st.integers(1, 4)), draw(st.integers(1, 3))),
        scale=draw(st.sampled_from([0.0, 1.0, 30.0])),
        junk=draw(st.sampled_from([0.0, 1e4, -1e4, 3e38, -3e38])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@pytest.mark.parametrize("world_size", [slow(n) if n == 4 else n for n in WORLD_SIZES])
def test_any_split_of_any_vocabulary_equals_the_whole(pool, world_size):
    @settings(max_examples=15, deadline=None)
    @given(st.lists(cases(world_size), min_size=1, max_size=4))
    def check(batch):
        for case, result in zip(batch, sharded(pool, world_size, *batch), strict=True):
            assert_equal(result, case)

    check()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_label_may_live_on_any_rank(pool, world_size):
    columns, vocab_size = 8, 8 * world_size - 3
    every_id = torch.arange(vocab_size)[None]
    case = random_case(columns * world_size, vocab_size, rows=(vocab_size, 1))
    case = case._replace(labels=every_id, weights=torch.ones(1, vocab_size))
    assert_equal(sharded(pool, world_size, case)[0], case)


def test_ranks_may_hold_nothing_but_padding(pool):
    all_on_rank_0, two_ranks_empty, one_id = (random_case(32, vocab_size) for vocab_size in (8, 11, 1))
    for case, result in zip(
        (all_on_rank_0, two_ranks_empty, one_id),
        sharded(pool, 4, all_on_rank_0, two_ranks_empty, one_id),
        strict=True,
    ):
        assert_equal(result, case)


@pytest.mark.parametrize("junk", [1e4, -1e4, 3e38, -3e38, math.inf, -math.inf, math.nan])
def test_what_padding_columns_hold_changes_no_bit(pool, junk):
    clean, spoilt = (random_case(16, 9, junk=value) for value in (0.0, junk))
    for world_size in (1, 2):
        expected, result = sharded(pool, world_size, clean, spoilt)
        assert torch.equal(result.log_probs, expected.log_probs)
        assert torch.equal(result.entropy, expected.entropy)
        assert torch.equal(result.gradient, expected.gradient)


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e30])
def test_logits_that_share_a_large_offset_neither_overflow_nor_vanish(pool, offset):
    case = random_case(16, 13)
    case = case._replace(logits=case.logits + offset)
    assert_equal(sharded(pool, 2, case)[0], case)


def confident_case(prob: float, label: int, columns: int, vocab_size: int, dtype: torch.dtype) -> Case:
    """One position whose label has about this probability, and the other ids of the vocabulary share the rest."""
    logits = torch.zeros(1, 1, columns)
    logits[..., label] = math.log(prob / (1 - prob) * (vocab_size - 1))
    return Case(logits.to(dtype), torch.tensor([[label]]), torch.ones(1, 1), vocab_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prob", [0.9, 0.999, 0.99999, 0.9999999])
def test_confident_tokens_keep_their_gradient(pool, prob, dtype):
    """The gradient of the label's logit is 1 - p, of which a subtraction from 1 in fp32, or in bf16, leaves noise."""
    columns, vocab_size = 1024, 1000
    batch = [confident_case(prob, label, columns, vocab_size, dtype) for label in (3, 600, 999)]
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-3
    for case, result in zip(batch, sharded(pool, 2, *batch), strict=True):
        label = int(case.labels)
        expected = float(unsharded(case).gradient[0, 0, label])
        assert expected == pytest.approx(1 - prob, rel=0.2)  # the label's logit is rounded to bf16
        assert result.gradient[0, 0, label].item() == pytest.approx(expected, rel=tolerance)
        others = result.gradient[0, 0].double().sum().item() - result.gradient[0, 0, label].item()
        assert others == pytest.approx(-expected, rel=tolerance)


def test_an_improbable_label_has_its_full_gradient(pool):
    case = Case(torch.tensor([[[80.0, 0.0, -120.0, 5.0]]]), torch.tensor([[2]]), torch.ones(1, 1), 4)
    result = sharded(pool, 2, case)[0]
    assert result.log_probs.item() == -200.0
    assert result.gradient[0, 0].tolist() == pytest.approx([-1.0, -math.exp(-80), 1.0, -math.exp(-75)], rel=1e-5)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_entropy_of_a_certain_and_of_a_uniform_distribution(pool, world_size):
    columns, vocab_size = 16, 13
    uniform = torch.full((1, 1, columns), 2.5)
    certain = torch.zeros(1, 1, columns)
    certain[..., 12] = 1e4
    two_of_them = torch.zeros(1, 1, columns)
    two_of_them[..., [0, 12]] = 1e4
    batch = []
    for logits in (uniform, certain, two_of_them):
        logits[..., vocab_size:] = 1e4
        batch.append(Case(logits, torch.tensor([[12]]), torch.ones(1, 1), vocab_size))
    results = sharded(pool, world_size, *batch)
    expected = [math.log(13), 0.0, math.log(2)]
    assert [result.entropy.item() for result in results] == pytest.approx(expected, rel=1e-6)
    assert [result.log_probs.item() for result in results] == pytest.approx([-value for value in expected], rel=1e-6)
