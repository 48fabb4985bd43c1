"""Log-probabilities of the initial model's most probable tokens and the rest, and the divergence that is made of them,
against autograd over all columns in fp64."""

import importlib.util

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.objectives.labels import LabelInputs, LabelStats
from megatron_psft.objectives.objective import Objective

HIDDEN_SIZE = 6


class Case:
    """Hidden states `[n, h]` and weights `[columns of all ranks, h]` of the current and of the initial model."""

    def __init__(
        self, rows: int, columns: int, vocab_size: int, top_k: int, *, scale=1.0, dtype=torch.float32, drift=0.3
    ) -> None:
        generator = torch.Generator().manual_seed(rows + columns)
        self.vocab_size, self.top_k = vocab_size, top_k
        self.hidden = torch.randn(rows, HIDDEN_SIZE, generator=generator).to(dtype)
        weight = scale * torch.randn(2, columns, HIDDEN_SIZE, generator=generator)
        self.initial, self.weight = (weight[0] + drift * weight[1]).to(dtype), weight[0].to(dtype)
        for each in (self.initial, self.weight):
            each[vocab_size:] = 1e4  # padding
        self.labels = torch.randint(vocab_size, (rows,), generator=generator)

    def log_distribution(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return (hidden.double() @ weight.double()[: self.vocab_size].t()).log_softmax(dim=1)

    def expected(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each row and gradients, from the formula over a vocabulary whose rest is one token."""
        hidden, weight = self.hidden.double().requires_grad_(), self.weight.double().requires_grad_()
        now, initial = self.log_distribution(hidden, weight), self.log_distribution(self.hidden, self.initial)
        label = now.gather(1, self.labels[:, None])[:, 0]
        plain = -label if name == "sft-kl" else -label.detach().exp() * label
        order = initial.argsort(dim=1, descending=True)
        top, rest = order[:, : self.top_k], order[:, self.top_k :]
        divergence = (initial.exp() * (initial - now)).gather(1, top).sum(dim=1)
        if rest.numel():
            of_rest = [every.gather(1, rest).logsumexp(dim=1) for every in (initial, now)]
            divergence = divergence + of_rest[0].exp() * (of_rest[0] - of_rest[1])
        losses = plain + 0.7 * divergence
        losses.sum().backward()
        return losses.detach(), hidden.grad, weight.grad


def _given(case: Case, world_size: int) -> tuple[LabelInputs, LabelStats]:
    """What the reference pass says of the initial model."""
    from megatron_psft.head.chunked import fused_label_stats

    weight = case.initial.chunk(world_size)[dist.get_rank()]
    place = {"vocab_size": case.vocab_size, "group": dist.group.WORLD}
    stats = fused_label_stats(case.hidden, weight, case.labels, top_k=case.top_k, **place)
    given = LabelInputs(
        ref_log_probs=stats.log_probs,
        ref_top_ids=stats.top_ids,
        ref_top_log_probs=stats.top_log_probs,
        ref_rest_log_probs=stats.rest_log_probs,
    )
    return given, stats


def _on_rank(cases: list[Case], name: str, world_size: int, in_triton: bool):
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import process_group
    from megatron_psft.head import chunked
    from megatron_psft.head.kernels import ShardPasses

    kept, passes = dict(chunked.CHUNK_BYTES), chunked.shard_passes
    if in_triton:
        from megatron_psft.head.kernels import fused

        chunked.shard_passes = lambda device: ShardPasses(fused.shard_sums, fused.shard_gradient)
    results = []
    try:
        with process_group(detect(0), world_size):
            for case in cases:
                chunked.CHUNK_BYTES["cpu"] = 3 * 4 * len(case.weight) // world_size
                given, scored = _given(case, world_size)
                hidden = case.hidden.clone().requires_grad_()
                weight = case.weight.chunk(world_size)[dist.get_rank()].clone().requires_grad_()
                objective = Objective(config=ObjectiveConfig(objective=name, kl_coef=0.7, kl_top_k=case.top_k))
                loss, stats = chunked.fused_loss(
                    hidden,
                    weight,
                    case.labels,
                    lambda stats, rows, given=given, objective=objective: objective.token_loss(stats, given.part(rows)),
                    vocab_size=case.vocab_size,
                    group=dist.group.WORLD,
                    top_ids=given.ref_top_ids,
                )
                loss.backward()
                dist.all_reduce(hidden.grad)
                results.append((loss.detach(), hidden.grad, weight.grad, scored, stats.top_log_probs))
    finally:
        chunked.CHUNK_BYTES.update(kept)
        chunked.shard_passes = passes
    return results


def check(pool, cases: list[Case], name: str, world_size: int, tolerance: float, *, in_triton=False) -> None:
    by_rank = pool.run(_on_rank, world_size, cases, name, world_size, in_triton)
    for case, shards in zip(cases, zip(*by_rank, strict=True), strict=True):
        losses, grad_hidden, grad_weight = case.expected(name)
        loss, found_hidden, _, scored, not_returned = shards[0]
        assert not_returned is None
        torch.testing.assert_close(loss.double(), losses.sum(), rtol=tolerance, atol=tolerance)
        pairs = [(found_hidden, grad_hidden), (torch.cat([shard[2] for shard in shards]), grad_weight)]
        for found, due in pairs:
            assert float((found.double() - due).abs().max()) <= tolerance * float(due.abs().max())
        assert not pairs[1][0][case.vocab_size :].any()
        initial = case.log_distribution(case.hidden, case.initial)
        top = initial.topk(case.top_k, dim=1)
        torch.testing.assert_close(scored.top_log_probs.double(), top.values, rtol=tolerance, atol=tolerance)
        if case.hidden.dtype == torch.float32:
            assert torch.equal(scored.top_ids, top.indices)
        for shard in shards[1:]:
            assert torch.equal(shard[3].top_ids, scored.top_ids)
            assert torch.equal(shard[3].rest_log_probs, scored.rest_log_probs)


CASES = [
    Case(11, 64, 50, 7),
    Case(7, 64, 50, 50),  # the whole vocabulary: no rest
    Case(5, 64, 21, 20),  # ranks with fewer columns than tokens, and one of padding alone
    Case(4, 16, 13, 1, scale=4.0),  # almost certain tokens, far from the initial model
    Case(6, 64, 50, 7, drift=0.0),  # the initial model itself
]


@pytest.mark.parametrize(("name", "world_size"), [("sft-kl", 1), ("sft-kl", 2), ("asft", 4)])
def test_the_divergence_and_its_gradient_are_those_of_the_whole_softmax(pool, name, world_size):
    check(pool, CASES, name, world_size, 2e-5)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_they_are_the_same_beside_the_triton_kernels(pool):
    check(pool, CASES[:3], "asft", 2, 2e-5, in_triton=True)


def test_in_bf16_top_tokens_that_have_not_moved_have_no_gradient(pool):
    """Near the initial model p - f is far below what bf16 has of p: it is written whole, not left over from a sum."""
    check(pool, [Case(9, 64, 50, 50, dtype=torch.bfloat16), Case(9, 64, 50, 5, dtype=torch.bfloat16)], "asft", 1, 0.03)
    case = Case(9, 64, 50, 50, dtype=torch.bfloat16, drift=0.0)
    ((result,),) = pool.run(_on_rank, 1, [case], "sft-kl", 1, False)
    due = case.expected("sft-kl")[1]  # of cross-entropy alone
    assert float((result[1].double() - due).norm() / due.norm()) < 0.01


def test_the_divergence_is_never_above_that_of_the_vocabulary_and_grows_with_k():
    from megatron_psft.objectives.ratio import top_divergence

    generator = torch.Generator().manual_seed(4)
    now, initial = torch.randn(2, 30, 40, generator=generator, dtype=torch.float64).log_softmax(dim=2)
    whole = (initial.exp() * (initial - now)).sum(dim=1)
    found = []
    for top_k in (1, 5, 20, 39):
        ids = initial.topk(top_k, dim=1).indices
        of_top = [every.gather(1, ids) for every in (now, initial)]
        rest = [(-every.exp().sum(dim=1)).log1p() for every in of_top]
        stats = LabelStats(now[:, 0], now[:, 0], top_log_probs=of_top[0], rest_log_probs=rest[0])
        found.append(top_divergence(stats, LabelInputs(ref_top_log_probs=of_top[1], ref_rest_log_probs=rest[1])))
    for less, more in zip(found, [*found[1:], whole], strict=True):
        assert bool((less <= more + 1e-12).all())
    torch.testing.assert_close(found[-1], whole)
