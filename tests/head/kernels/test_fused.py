"""The Triton kernels against the same functions in PyTorch: on a GPU, or under Triton's interpreter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_psft.head.kernels import portable
from megatron_psft.head.kernels.portable import GradientFactors

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def both(logits, label_index, scale, label_gradient, order=None, dtype=None):
    """Sums and gradients of the kernels and of PyTorch, in fp32; the kernels' gradient of some rows, in `dtype`."""
    from megatron_psft.head.kernels import fused

    logits, label_index, scale, label_gradient = (
        values.to(DEVICE) for values in (logits, label_index, scale, label_gradient)
    )
    mine = logits.clone()
    values, sums = fused.shard_sums(mine, label_index)
    assert values is mine
    assert torch.equal(mine, logits), "the logits were written to"
    factors = GradientFactors(sums.maximum, scale, label_gradient, label_index)
    rows = slice(None) if order is None else order.to(DEVICE)
    out = mine if dtype is None else torch.empty_like(mine, dtype=dtype)
    chosen = GradientFactors(*(column[rows] for column in factors))
    gradient = fused.shard_gradient(mine, None if order is None else rows, chosen, out[: len(chosen.scale)])
    theirs = logits.float()
    wanted = portable.shard_sums_(theirs, label_index)
    due = portable.shard_gradient_(theirs, factors._replace(maximum=wanted.maximum))
    return sums, wanted, gradient, due[rows]


def assert_same(logits, label_index, seed=0, **choice):
    generator = torch.Generator().manual_seed(seed)
    scale, label_gradient = torch.randn(2, len(logits), generator=generator)
    sums, wanted, gradient, due = both(logits, label_index, scale, label_gradient, **choice)
    for name, one, other in zip(sums._fields, sums, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-37, msg=lambda text, name=name: f"{name}: {text}")
    rounding = 2e-6 if gradient.dtype == torch.float32 else torch.finfo(gradient.dtype).eps
    torch.testing.assert_close(gradient.float(), due, rtol=rounding, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 3),
    columns=st.sampled_from([1, 2, 37, 2047, 2048, 2049, 5000]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_block_of_logits(rows, columns, scale, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, columns, generator=generator)
    # Some labels live on other ranks, before or behind this one.
    label_index = torch.randint(-columns, 2 * columns, (rows,), generator=generator)
    assert_same(logits.to(dtype), label_index, seed)


@pytest.mark.parametrize(
    ("order", "dtype"),
    [
        ([0, 3, 2], None),  # in place: row 3 comes to the place of row 1, which comes to none
        ([0, 2, 3], torch.float32),
        ([0, 2, 3], torch.bfloat16),
        ([], torch.bfloat16),
    ],
)
@pytest.mark.parametrize("columns", [37, 4100])
def test_gradients_of_some_rows(order, dtype, columns):
    logits = torch.randn(4, columns, generator=torch.Generator().manual_seed(0))
    assert_same(logits, torch.tensor([0, 1, -1, 36]), order=torch.tensor(order, dtype=torch.int64), dtype=dtype)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_the_maximum_may_come_at_any_time(order):
    logits = torch.linspace(-9e3, 1e4, 6000)[None] if order == "rising" else torch.linspace(1e4, -9e3, 6000)[None]
    assert_same(logits, torch.tensor([5999]))
    assert_same(logits, torch.tensor([0]))


def test_a_confident_label_leaves_the_sum_of_the_others_alone():
    logits = torch.zeros(1, 3000)
    logits[0, 2500] = 25.0
    sums, _, _, _ = both(logits, torch.tensor([2500]), torch.ones(1), torch.ones(1))
    assert sums.others.item() == pytest.approx(2999 * math.exp(-25.0), rel=1e-5)
    assert sums.label_weight.item() == 1.0


def test_rows_of_any_stride():
    wide = torch.randn(4, 3001, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    from megatron_psft.head.kernels import fused

    part, index = wide[:, :2500], torch.tensor([0, 1, 2499, 7], device=DEVICE)
    beyond = wide[:, 2500:].clone()
    wanted = portable.shard_sums_(part.clone(), index)
    _, sums = fused.shard_sums(part, index)
    torch.testing.assert_close(sums.others, wanted.others)
    ones = torch.ones(4, device=DEVICE)
    fused.shard_gradient(part, None, GradientFactors(sums.maximum, ones, ones, index), part)
    assert torch.equal(wide[:, 2500:], beyond)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0)])
def test_no_rows_and_no_columns(shape):
    sums, wanted, gradient, due = both(
        torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64), torch.zeros(shape[0]), torch.zeros(shape[0])
    )
    for one, other in zip(sums, wanted, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(gradient, due)
