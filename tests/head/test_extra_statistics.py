"""The statistics that not every objective needs, on every path to them, against all columns in fp64."""

import importlib.util

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_psft.objectives.labels import LabelStats

EXTRAS = frozenset({"top_entropy", "sum_squares"})
HIDDEN_SIZE = 6


class Case:
    """Hidden states `[n, h]`, weight `[columns of all ranks, h]` and labels `[n]`, from a seed."""

    def __init__(self, rows: int, columns: int, vocab_size: int, *, scale=3.0, dtype=torch.float32, seed=0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size = vocab_size
        self.hidden = torch.randn(rows, HIDDEN_SIZE, generator=generator).to(dtype)
        self.weight = (scale * torch.randn(columns, HIDDEN_SIZE, generator=generator)).to(dtype)
        self.weight[vocab_size:] = 1e4  # padding
        self.labels = torch.randint(vocab_size, (rows,), generator=generator)

    def expected(self) -> tuple[Tensor, Tensor]:
        """`top_entropy` and `sum_squares`."""
        probs = (self.hidden.double() @ self.weight[: self.vocab_size].double().t()).softmax(dim=1)
        top = probs.sort(dim=1, descending=True).values[:, :20]
        top = top / top.sum(dim=1, keepdim=True)
        return torch.special.entr(top).sum(dim=1), probs.square().sum(dim=1)


CASES = {
    "many columns": (17, 400, 387),
    "fewer than 20 tokens": (5, 16, 13),
    "ranks of padding alone": (4, 64, 21),
    "one token": (3, 8, 1),
    "no rows": (0, 64, 60),
}


def _on_rank(cases: list[Case], path: str, world_size: int) -> list[LabelStats]:
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import process_group

    with process_group(detect(0), world_size):
        return [PATHS[path](case, case.weight.chunk(world_size)[dist.get_rank()]) for case in cases]


def _plain(case: Case, weight: Tensor) -> LabelStats:
    from megatron_psft.head.plain import label_stats

    logits = (case.hidden @ weight.t()).unsqueeze(1).requires_grad_()
    place = {"vocab_size": case.vocab_size, "group": dist.group.WORLD}
    bare = label_stats(logits, case.labels[None], **place)
    stats = label_stats(logits, case.labels[None], **place, extra_stats=EXTRAS)
    assert bare.top_entropy is None
    assert bare.sum_squares is None
    assert torch.equal(stats.log_probs, bare.log_probs)
    assert not any(values.requires_grad for values in stats.non_differentiable)
    return stats.map(lambda values: values.detach()[0])


def _fused(case: Case, weight: Tensor) -> LabelStats:
    """By both functions of the fused head, in chunks of three rows; the loss sees the statistics of its own rows."""
    from megatron_psft.head import chunked

    default = dict(chunked.CHUNK_BYTES)
    chunked.CHUNK_BYTES["cpu"] = 3 * 4 * len(weight)
    hidden, weight = case.hidden.requires_grad_(), weight.clone().requires_grad_()
    place = {"vocab_size": case.vocab_size, "group": dist.group.WORLD, "extra_stats": EXTRAS}
    seen = []

    def token_loss(stats: LabelStats, rows: slice) -> Tensor:
        seen.append(stats.map(lambda values: values.detach().clone()))
        return stats.top_entropy * stats.sum_squares * stats.log_probs

    try:
        scored = chunked.fused_label_stats(hidden, weight, case.labels, **place)
        loss, stats = chunked.fused_loss(hidden, weight, case.labels, token_loss, **place)
    finally:
        chunked.CHUNK_BYTES.update(default)
    assert len(seen) == -(-len(hidden) // 3)
    for name in ("top_entropy", "sum_squares"):
        values = getattr(stats, name)
        assert torch.equal(values, getattr(scored, name))
        assert torch.equal(values, torch.cat([values[:0], *(getattr(chunk, name) for chunk in seen)]))
        assert not values.requires_grad
    # The weights of the loss take no part in its gradient.
    (found,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (wanted,) = torch.autograd.grad((scored.top_entropy * scored.sum_squares * scored.log_probs).sum(), hidden)
    torch.testing.assert_close(found, wanted)
    return stats.map(lambda values: values.detach())


def _triton(case: Case, weight: Tensor) -> LabelStats:
    from megatron_psft.head import chunked
    from megatron_psft.head.kernels import ShardPasses, fused

    default = chunked.shard_passes
    chunked.shard_passes = lambda device: ShardPasses(fused.shard_sums, fused.shard_gradient)
    try:
        return _fused(case, weight)
    finally:
        chunked.shard_passes = default


PATHS = {"plain": _plain, "fused": _fused, "triton": _triton}


def check(pool, path: str, world_size: int, cases: list[Case], tolerance: float) -> None:
    for found in pool.run(_on_rank, world_size, cases, path, world_size):
        for case, stats in zip(cases, found, strict=True):
            assert stats.top_entropy.dtype == stats.sum_squares.dtype == torch.float32
            for values, wanted in zip((stats.top_entropy, stats.sum_squares), case.expected(), strict=True):
                torch.testing.assert_close(values.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("path", ["plain", "fused"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_they_are_of_the_whole_vocabulary_on_any_split(pool, world_size, path):
    check(pool, path, world_size, [Case(*shape) for shape in CASES.values()], 1e-5)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_they_are_the_same_beside_the_triton_kernels(pool):
    check(pool, "triton", 2, [Case(5, 64, 50), Case(4, 64, 21)], 1e-5)


def test_logits_of_ten_thousand_and_equal_ones(pool):
    cases = [Case(6, 64, 60, scale=1e4), Case(6, 64, 60, scale=0.0)]
    check(pool, "plain", 2, cases, 2e-3)  # fp32 logits of that size are rounded to 1e-3
    check(pool, "fused", 2, cases, 2e-3)


def test_bf16_logits_lose_no_more_than_their_rounding(pool):
    check(pool, "fused", 2, [Case(9, 256, 250, scale=1.0, dtype=torch.bfloat16)], 0.03)
