"""Means over the tokens of all ranks by one division, and the error that every rank shares."""

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from megatron_psft.config.schema import ObjectiveConfig
from megatron_psft.data.micro_batch import MicroBatch
from megatron_psft.errors import DivergenceError
from megatron_psft.metrics.histogram import count_bins, percentiles
from megatron_psft.metrics.reduce import EvalSums, reduce_metrics
from megatron_psft.metrics.sums import BatchSums, LabelSources, batch_sums
from megatron_psft.metrics.table import means
from megatron_psft.objectives.labels import LabelInputs, LabelStats
from megatron_psft.objectives.objective import Objective
from tests.support import oracle
from tests.support.layouts import LAYOUTS
from tests.support.marks import slow

FOUR_RANKS = ("PP2-DP2", "TP2-DP2", "TP2-PP2", "DP4")
"""Tensor and pipeline-parallel sizes on four ranks."""
CLIP = 0.28
PSFT = ObjectiveConfig(objective="psft", clip_ratio_high=CLIP)
PERCENTILES = {"ratio_p05": 5, "ratio_p50": 50, "ratio_p95": 95, "ratio_max": 100}


def micro_batch(seed: int, num_labels: int) -> tuple[MicroBatch, LabelStats, torch.Tensor]:
    """One of 2 x 8 positions with this many labels, what a model says of it, and what it said before."""
    generator = torch.Generator().manual_seed(seed)
    label_mask = torch.zeros(16, dtype=torch.bool)
    label_mask[torch.randperm(16, generator=generator)[:num_labels]] = True
    old_log_probs = -3 * torch.rand(2, 8, generator=generator)
    log_probs = old_log_probs + 0.5 * torch.randn(2, 8, generator=generator)
    batch = MicroBatch(
        tokens=torch.zeros(2, 8, dtype=torch.int64),
        labels=torch.zeros(2, 8, dtype=torch.int64),
        label_mask=label_mask.view(2, 8),
        position_ids=torch.arange(8).repeat(2, 1),
        record_ids=torch.zeros(2, 8, dtype=torch.int64),
        label_counts=torch.zeros(1 + seed % 2, dtype=torch.int64),
        num_tokens=9 + seed,
    )
    return batch, LabelStats(log_probs, 5 * torch.rand(2, 8, generator=generator)), old_log_probs


LABELS = (16, 1, 0, 3, 0, 0, 0, 0, 0, 7, 16, 2)
"""Label tokens of the micro-batches of a global batch: four data-parallel ranks hold 17, 3, 0 and 25."""


def global_batch(data_size: int) -> list[list[tuple[MicroBatch, LabelStats, torch.Tensor]]]:
    """The micro-batches of each data-parallel rank."""
    every = [micro_batch(seed, count) for seed, count in enumerate(LABELS)]
    per_rank = len(every) // data_size
    return [every[first : first + per_rank] for first in range(0, len(every), per_rank)]


@contextmanager
def entered(layout: str):
    """The process group of four ranks, for the length of a block, and this rank's place in it."""
    from megatron_psft.distributed.device import detect
    from megatron_psft.distributed.grid import initialize_parallel, process_group

    here = detect(0)
    with process_group(here, 4):
        yield initialize_parallel(LAYOUTS[layout].parallel, virtual_size=None, seed=1, device=here.device)


def _sums(entries) -> list[BatchSums]:
    sums = []
    for batch, stats, old in entries:
        chosen = stats.map(lambda values, mask=batch.label_mask: values[mask])
        given = LabelInputs(old_log_probs=old[batch.label_mask])
        loss = Objective(config=PSFT).token_loss(chosen, given).sum()
        sums.append(batch_sums(loss, chosen, given, PSFT, labelled_records=1))
    return sums


def _reduce(layout: str):
    with entered(layout) as place:
        entries = global_batch(place.data_size)[place.data_rank]
        sums = _sums(entries) if place.is_last_stage else []
        return reduce_metrics(sums, [batch for batch, _, _ in entries], place, 1, needs=PSFT.needs)


@pytest.mark.parametrize("layout", FOUR_RANKS)
def test_any_layout_equals_one_division_over_all_tokens(pool, layout):
    (batches,) = global_batch(1)
    mask = torch.cat([batch.label_mask for batch, _, _ in batches])
    log_probs = torch.cat([stats.log_probs for _, stats, _ in batches])[mask].double()
    old_log_probs = torch.cat([old for _, _, old in batches])[mask].double()
    entropy = torch.cat([stats.entropy for _, stats, _ in batches])[mask].double()
    log_ratio = log_probs - old_log_probs
    ratio = log_ratio.exp()
    expected = {
        "loss": -ratio.clamp(max=1 + CLIP).mean().item(),
        "nll": -log_probs.mean().item(),
        "entropy": entropy.mean().item(),
        "ratio_mean": ratio.mean().item(),
        **{name: oracle.nearest_rank(ratio, percent) for name, percent in PERCENTILES.items()},
        "clip_fraction": (ratio > 1 + CLIP).double().mean().item(),
        "approx_kl": (ratio - 1 - log_ratio).mean().item(),
        "tokens": sum(9 + seed for seed in range(12)),
        "label_tokens": sum(LABELS),
        "records": 18,
    }
    results = pool.run(_reduce, 4, layout)
    alone = percentiles(count_bins((log_probs.float() - old_log_probs.float()).exp().log()), [5, 50, 95])
    assert [results[0][name] for name in list(PERCENTILES)[:3]] == [math.exp(found) for found in alone]
    assert results[0].keys() == expected.keys()
    for name, value in expected.items():
        of_bin = name in PERCENTILES and name != "ratio_max"
        assert results[0][name] == pytest.approx(value, rel=1e-3 if of_bin else 1e-5), name
    assert results[1:] == [results[0]] * 3


SOURCES = ("maths", "code", "none")


def _reduce_by_source():
    with entered("PP2-DP2") as place:
        entries = global_batch(place.data_size)[place.data_rank]
        sums = []
        for batch, stats, old in entries if place.is_last_stage else []:
            chosen = stats.map(lambda values, mask=batch.label_mask: values[mask])
            given = LabelInputs(old_log_probs=old[batch.label_mask])
            sources = LabelSources(_source_ids(len(given.old_log_probs)), SOURCES)
            sums.append(batch_sums(torch.tensor(1.0), chosen, given, PSFT, labelled_records=1, sources=sources))
        batches = [batch for batch, _, _ in entries]
        return reduce_metrics(sums, batches, place, 1, needs=PSFT.needs, sources=SOURCES)


def _source_ids(num_labels: int) -> torch.Tensor:
    return torch.arange(num_labels) % 3 // 2


def test_each_source_has_its_means_and_one_without_label_tokens_none(pool):
    (batches,) = global_batch(1)
    mask = torch.cat([batch.label_mask for batch, _, _ in batches])
    log_probs = torch.cat([stats.log_probs for _, stats, _ in batches])[mask].double()
    old_log_probs = torch.cat([old for _, _, old in batches])[mask].double()
    entropy = torch.cat([stats.entropy for _, stats, _ in batches])[mask].double()
    clipped = ((log_probs - old_log_probs).exp() > 1 + CLIP).double()
    ids = torch.cat([_source_ids(count) for count in LABELS])
    expected = {
        f"{name}/{source}": values[ids == number].mean().item()
        for name, values in (("nll", -log_probs), ("entropy", entropy), ("clip_fraction", clipped))
        for number, source in enumerate(SOURCES[:2])
    }
    assert 0 < expected["clip_fraction/code"] != expected["clip_fraction/maths"]
    first, *others = pool.run(_reduce_by_source, 4)
    assert {name: value for name, value in first.items() if "/" in name} == pytest.approx(expected, rel=1e-5)
    assert first["nll"] == pytest.approx(-log_probs.mean().item(), rel=1e-5)
    assert others == [first] * 3


def _reduce_big_numbers():
    """2**24 and 1 on each of two micro-batches of each rank: in fp32 their sum is 2**24."""
    with entered("DP4") as place:
        entries = global_batch(4)[place.data_rank][:2]
        zeros = dict.fromkeys(means(PSFT.needs), torch.tensor(0.0))
        sums = [
            BatchSums(
                ratios=torch.ones(1),
                totals={**zeros, **dict.fromkeys(("loss", "denominator", "label_tokens"), torch.tensor(value))},
            )
            for value in (2.0**24, 1.0)
        ]
        return reduce_metrics(sums, [batch for batch, _, _ in entries], place, 1, needs=PSFT.needs)


def test_sums_of_many_tokens_keep_their_last_digit(pool):
    assert [(metrics["label_tokens"], metrics["loss"]) for metrics in pool.run(_reduce_big_numbers, 4)] == [
        (4 * (2**24 + 1), 1.0)
    ] * 4


def _reduce_nothing_but_prompts():
    with entered("PP2-DP2") as place:
        batch, stats, old = micro_batch(5, 0)
        return reduce_metrics(
            _sums([(batch, stats, old)]) if place.is_last_stage else [], [batch], place, 1, needs=PSFT.needs
        )


def test_a_global_batch_without_labels_has_zero_means(pool):
    first, *others = pool.run(_reduce_nothing_but_prompts, 4)
    assert others == [first] * 3
    assert set(first) == {*means(PSFT.needs), *PERCENTILES, "tokens", "label_tokens", "records"}
    assert {name: value for name, value in first.items() if value != 0} == {"tokens": 28, "records": 4}


def _reduce_bad_loss(layout: str, bad_data_ranks: list[int], value: float) -> str | None:
    with entered(layout) as place:
        entries = global_batch(place.data_size)[place.data_rank]
        sums = _sums(entries) if place.is_last_stage else []
        if place.data_rank in bad_data_ranks and sums:
            sums[-1] = replace(sums[-1], totals={**sums[-1].totals, "loss": torch.tensor(value)})
        try:
            reduce_metrics(sums, [batch for batch, _, _ in entries], place, 7, needs=PSFT.needs)
        except DivergenceError as error:
            return str(error)
        return None


@pytest.mark.parametrize(
    ("layout", "bad_data_ranks", "culprits"),
    [("PP2-DP2", [0], (2,)), slow("PP2-DP2", [0, 1], (2, 3)), ("TP2-DP2", [1], (2,)), slow("DP4", [0], (0,))],
)
def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_step_and_rank(pool, layout, bad_data_ranks, culprits):
    for value in (math.nan, math.inf, -math.inf):
        messages = pool.run(_reduce_bad_loss, 4, layout, bad_data_ranks, value)
        assert len(set(messages)) == 1
        assert messages[0] is not None
        assert messages[0].startswith("step 7: the loss is not finite on rank ")
        assert any(f"on rank {rank};" in messages[0] for rank in culprits)


def _evaluate(layout: str):
    with entered(layout) as place:
        sums = EvalSums(place)
        for batch, stats, _ in global_batch(place.data_size)[place.data_rank]:
            masked = stats.map(lambda values, mask=batch.label_mask: torch.where(mask, values, math.nan))
            sums.add([masked] if place.is_last_stage else [], [batch])
        return sums.means()


@pytest.mark.parametrize("layout", FOUR_RANKS)
def test_evaluation_is_a_sum_over_a_sum(pool, layout):
    (batches,) = global_batch(1)
    mask = torch.cat([batch.label_mask for batch, _, _ in batches])
    log_probs = torch.cat([stats.log_probs for _, stats, _ in batches])[mask]
    entropy = torch.cat([stats.entropy for _, stats, _ in batches])[mask]
    expected = {
        "valid_nll": -math.fsum(log_probs.tolist()) / len(log_probs),
        "valid_entropy": math.fsum(entropy.tolist()) / len(entropy),
    }
    results = pool.run(_evaluate, 4, layout)
    assert results[0] == pytest.approx(expected, rel=1e-7)
    assert results[1:] == [results[0]] * 3
