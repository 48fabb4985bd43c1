"""Losses, statistics and gradients of the fused head, against log_softmax over the whole vocabulary in fp64."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.marks import slow

WORLD_SIZES = (1, 2, 4)
MODES = ("loss", "stats")


class Case(NamedTuple):
    """Hidden states `[n, h]`, weight `[v of all ranks, h]`, labels and factors `[n]`. The loss is
    -sum(factors * log_probs), so that a factor of zero is a clipped token; it is propagated back times `upstream`."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    factors: Tensor
    vocab_size: int
    upstream: float = 1.0


class Result(NamedTuple):
    loss: Tensor
    log_probs: Tensor
    entropy: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor


def _on_rank(cases: list[Case], mode: str, chunk_rows: int, world_size: int) -> list[Result]:
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import process_group
    from megatron_psft.head import chunked

    default = dict(chunked.CHUNK_BYTES)
    with process_group(detect(0), world_size):
        try:
            results = []
            for case in cases:
                chunked.CHUNK_BYTES["cpu"] = chunk_rows * 4 * len(case.weight) // world_size
                results.append(_shard_of(case, mode, dist.get_rank(), world_size))
            dist.barrier()  # without labels nothing is reduced, and a rank could leave before another has joined
        finally:
            chunked.CHUNK_BYTES.update(default)
    return results


def _shard_of(case: Case, mode: str, rank: int, world_size: int) -> Result:
    from megatron_psft.head.chunked import fused_label_stats, fused_loss

    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.chunk(world_size)[rank].clone().requires_grad_()
    place = {"vocab_size": case.vocab_size, "group": dist.group.WORLD}
    if mode == "loss":
        loss, stats = fused_loss(
            hidden, weight, case.labels, lambda stats, part: -case.factors[part] * stats.log_probs, **place
        )
        assert not stats.log_probs.requires_grad
    else:
        stats = fused_label_stats(hidden, weight, case.labels, **place)
        loss = -(case.factors * stats.log_probs).sum()
    assert not stats.entropy.requires_grad
    (case.upstream * loss).backward()
    assert torch.equal(hidden.detach(), case.hidden), "the hidden states were written to"
    dist.all_reduce(hidden.grad)  # a sum over the ranks, as the docstring has it
    return Result(loss.detach(), stats.log_probs.detach(), stats.entropy, hidden.grad, weight.grad)


def sharded(pool, world_size: int, *cases: Case, mode: str = "loss", chunk_rows: int = 3) -> list[Result]:
    """Results over all columns, after a check that the ranks agree in every bit."""
    by_rank = pool.run(_on_rank, world_size, list(cases), mode, chunk_rows, world_size)
    results = []
    for shards in zip(*by_rank, strict=True):
        for shard in shards[1:]:
            assert all(torch.equal(own, first) for own, first in zip(shard[:4], shards[0][:4], strict=True))
        results.append(shards[0]._replace(grad_weight=torch.cat([shard.grad_weight for shard in shards])))
    return results


def exact(case: Case) -> Result:
    hidden, weight = case.hidden.double().requires_grad_(), case.weight.double().requires_grad_()
    distribution = torch.log_softmax(hidden @ weight[: case.vocab_size].t(), dim=-1)
    log_probs = distribution.gather(-1, case.labels.unsqueeze(-1)).squeeze(-1)
    loss = -(case.factors * log_probs).sum()
    (case.upstream * loss).backward()
    entropy = -torch.special.xlogy(distribution.exp(), distribution.exp()).sum(dim=-1)
    return Result(loss.detach(), log_probs.detach(), entropy.detach(), hidden.grad, weight.grad)


def plain(case: Case) -> Result:
    """The path with all logits, on one rank."""
    from megatron_psft.head.plain import label_stats

    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    logits = (hidden @ weight.t()).unsqueeze(1)
    stats = label_stats(logits, case.labels[None], vocab_size=case.vocab_size, group=dist.group.WORLD)
    loss = -(case.factors * stats.log_probs[0]).sum()
    (case.upstream * loss).backward()
    return Result(loss.detach(), stats.log_probs[0].detach(), stats.entropy[0], hidden.grad, weight.grad)


def assert_close(found: Result, wanted: Result, tolerance: float) -> None:
    """Relative to the largest element of each, since an element is a sum of terms of that size; loss, log-probabilities
    and entropy of almost certain tokens absolutely, as they are differences of logits."""
    for name, one, other in zip(Result._fields, found, wanted, strict=True):
        if other.numel():
            scale = max(float(other.abs().max()), 1e-30 if name.startswith("grad") else 1.0)
            error = float((one.double() - other.double()).abs().max()) / scale
            assert error <= tolerance, (name, error)


def random_case(
    num_labels: int, columns: int, vocab_size: int, *, hidden_size=8, scale=2.0, active=0.7, dtype=torch.float32, seed=0
) -> Case:
    """Logits of standard deviation `scale`; padding rows of the weight are huge; a share of factors is zero."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_labels, hidden_size, generator=generator)
    weight = scale / hidden_size**0.5 * torch.randn(columns, hidden_size, generator=generator)
    weight[vocab_size:] = 1e4
    labels = torch.randint(vocab_size, (num_labels,), generator=generator)
    factors = torch.rand(num_labels, generator=generator) + 0.5
    factors *= torch.rand(num_labels, generator=generator) < active
    return Case(hidden.to(dtype), weight.to(dtype), labels, factors, vocab_size)


@st.composite
def random_cases(draw, world_size: int) -> Case:
    columns = world_size * draw(st.integers(1, 9))
    return random_case(
        draw(st.integers(0, 11)),
        columns,
        draw(st.integers(1, columns)),
        hidden_size=draw(st.integers(1, 6)),
        scale=draw(st.sampled_from([0.0, 1.0, 4.0])),
        active=draw(st.sampled_from([0.0, 0.5, 1.0])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )._replace(upstream=draw(st.sampled_from([1.0, -0.25])))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", [slow(n) if n == 4 else n for n in WORLD_SIZES])
def test_any_shape_in_any_chunks_equals_the_whole(pool, world_size, mode):
    @settings(max_examples=8, deadline=None)
    @given(st.lists(random_cases(world_size), min_size=1, max_size=4), st.integers(1, 6))
    def check(batch, chunk_rows):
        results = sharded(pool, world_size, *batch, mode=mode, chunk_rows=chunk_rows)
        for case, result in zip(batch, results, strict=True):
            # A gradient of few tokens may be what is left of larger parts that cancel: 1.02e-5 was seen.
            assert_close(result, exact(case), 5e-5)

    check()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_it_equals_the_plain_path_to_rounding(pool, world_size):
    """1e-6 of the largest element, with a vocabulary and a number of labels as they come in practice."""
    case = random_case(257, 4096, 4001, hidden_size=64, scale=3.0)
    (wanted,) = pool.run(_plain_on_rank, 1, case)
    for mode in MODES:
        (result,) = sharded(pool, world_size, case, mode=mode, chunk_rows=50)
        assert_close(result, wanted, 1e-6)


def _plain_on_rank(case: Case) -> Result:
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import process_group

    with process_group(detect(0), 1):
        return plain(case)


@pytest.mark.parametrize("mode", MODES)
def test_padding_has_no_gradient_and_every_label_its_own(pool, mode):
    columns, vocab_size = 32, 19
    case = random_case(vocab_size, columns, vocab_size, active=1.0)._replace(labels=torch.arange(vocab_size))
    for world_size in WORLD_SIZES:
        (result,) = sharded(pool, world_size, case, mode=mode)
        assert not result.grad_weight[vocab_size:].any()
        assert_close(result, exact(case), 1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_labels", [0, 1])
def test_no_label_and_one_label(pool, num_labels, mode):
    case = random_case(num_labels, 16, 13, active=1.0)
    (result,) = sharded(pool, 2, case, mode=mode)
    assert result.grad_hidden.shape == case.hidden.shape
    assert result.grad_weight.shape == case.weight.shape
    assert result.grad_weight.any() == (num_labels > 0)
    assert_close(result, exact(case), 1e-6)


@pytest.mark.parametrize("world_size", [1, 2])
def test_logits_of_ten_thousand(pool, world_size):
    """Certain and hopeless labels, and the offset that all logits of a row share."""
    hidden = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.0, 1.0], [0.0, 1e4], [0.0, -1e4]])
    weight = torch.zeros(8, 2)
    weight[:, 1] = 1.0
    weight[2, 0], weight[5, 0] = 1e4, -1e4
    # With equal factors the last two rows' parts of the weight's gradient, 1e4 / 7 each, would leave only rounding.
    factors = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5])
    case = Case(hidden, weight, torch.tensor([2, 5, 5, 1, 1]), factors, 7)
    (result,) = sharded(pool, world_size, case)
    assert_close(result, exact(case), 1e-6)
    assert result.log_probs[1].item() == -2e4
    assert torch.isfinite(result.grad_weight).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prob", [0.9, 0.999, 0.99999])
def test_confident_tokens_keep_their_gradient(pool, prob, dtype):
    """The gradient by the hidden state is 1 - p times a difference of weights; in bf16, 1 - p would be rounded away."""
    columns, label = 512, 300
    logit = torch.logit(torch.tensor(prob)) + torch.log(torch.tensor(columns - 1.0))
    weight = torch.zeros(columns, 2)
    weight[label] = torch.tensor([1.0, 0.0])
    hidden = torch.tensor([[float(logit), 0.0]])
    case = Case(hidden.to(dtype), weight.to(dtype), torch.tensor([label]), torch.ones(1), columns)
    (result,) = sharded(pool, 2, case)
    wanted = exact(case)
    assert float(-wanted.grad_hidden[0, 0]) == pytest.approx(1 - prob, rel=0.2)  # the logit is rounded to bf16
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-3
    assert float(result.grad_hidden[0, 0]) == pytest.approx(float(wanted.grad_hidden[0, 0]), rel=tolerance)
    assert float(result.grad_weight[label, 0]) == pytest.approx(float(wanted.grad_weight[label, 0]), rel=tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_bf16_stays_within_its_rounding(pool, world_size, mode):
    case = random_case(96, 1024, 1000, hidden_size=32, dtype=torch.bfloat16)
    (result,) = sharded(pool, world_size, case, mode=mode, chunk_rows=20)
    wanted = exact(case)
    assert (result.log_probs.dtype, result.entropy.dtype) == (torch.float32, torch.float32)
    assert (result.grad_hidden.dtype, result.grad_weight.dtype) == (torch.bfloat16, torch.bfloat16)
    # A logit of up to 8 is off by 2^-6 at most, and with it its log-probability.
    assert float((result.log_probs - wanted.log_probs).abs().max()) < 2**-5
    for found, due in ((result.grad_hidden, wanted.grad_hidden), (result.grad_weight, wanted.grad_weight)):
        assert float((found.double() - due).norm() / due.norm()) < 0.01


def _main_grads(case: Case, attributes: dict[str, bool], mode: str):
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import process_group
    from megatron_psft.head import chunked

    with process_group(detect(0), 1):
        hidden = case.hidden.clone().requires_grad_()
        weight = torch.nn.Parameter(case.weight.clone())
        weight.main_grad = torch.full(weight.shape, 5.0)
        for name, value in attributes.items():
            setattr(weight, name, value)
        place = {"vocab_size": case.vocab_size, "group": dist.group.WORLD}
        if mode == "loss":
            loss, _ = chunked.fused_loss(
                hidden, weight, case.labels, lambda stats, part: -case.factors[part] * stats.log_probs, **place
            )
        else:
            stats = chunked.fused_label_stats(hidden, weight, case.labels, **place)
            loss = -(case.factors * stats.log_probs).sum()
        (case.upstream * loss).backward()
        flag = getattr(weight, "grad_added_to_main_grad", None)
        return weight.main_grad - 5.0, None if weight.grad is None else weight.grad.shape, flag, hidden.grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_added_to_main_grad_as_megatron_core_does_it(pool, dtype, mode):
    case = random_case(40, 64, 50, dtype=dtype)
    wanted = exact(case)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for attributes, shape, flag in (
        ({"grad_added_to_main_grad": False}, case.weight.shape, True),  # a tensor that fires the hook, unread
        ({"grad_added_to_main_grad": False, "zero_out_wgrad": True}, None, True),  # tied: the embedding's fires it
        ({}, None, None),
    ):
        ((added, found_shape, found_flag, grad_hidden),) = pool.run(_main_grads, 1, case, attributes, mode)
        assert added.dtype == torch.float32
        assert (found_shape, found_flag) == (shape, flag)
        scale = float(wanted.grad_weight.abs().max())
        assert float((added - wanted.grad_weight).abs().max()) < tolerance * scale
        assert float((grad_hidden - wanted.grad_hidden).abs().max()) < tolerance * float(wanted.grad_hidden.abs().max())


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_weight_gets_no_gradient(pool, mode):
    case = random_case(40, 64, 50)
    ((added, shape, _, grad_hidden),) = pool.run(_main_grads, 1, case, {"requires_grad": False}, mode)
    assert shape is None
    assert not added.any()
    torch.testing.assert_close(grad_hidden.double(), exact(case).grad_hidden, rtol=1e-4, atol=1e-6)


def test_a_gradient_in_main_grad_cannot_be_scaled_afterwards(pool):
    case = random_case(5, 16, 13)._replace(upstream=0.5)
    with pytest.raises(Exception, match="must be propagated back with gradient 1"):
        pool.run(_main_grads, 1, case, {}, "loss")
    assert pool.run(_main_grads, 1, case, {}, "stats")[0][0].any()


def _memory_of(num_labels: int) -> tuple[int, int]:
    """Largest number of elements any tensor had in a forward and backward pass, and that of a chunk's logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import process_group
    from megatron_psft.head import chunked

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    case = random_case(num_labels, 2000, 2000, active=0.5)
    default = chunked.CHUNK_BYTES["cpu"]
    chunked.CHUNK_BYTES["cpu"] = 16 * 4 * 2000
    try:
        with process_group(detect(0), 1), Watch():
            _shard_of(case, "loss", 0, 1)
    finally:
        chunked.CHUNK_BYTES["cpu"] = default
    return largest, 16 * 2000


def test_no_tensor_grows_with_the_labels_but_the_hidden_states(pool):
    ((largest, chunk),) = pool.run(_memory_of, 1, 400)
    assert largest == chunk  # the hidden states of 400 labels have 3,200 elements, their logits 800,000
