"""Gradients and scores of a global batch through Megatron-Core's schedules, against transformers and autograd."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_psft.config.schema import (
    ParallelConfig,
)
from megatron_psft.data.example import Example
from megatron_psft.data.micro_batch import MicroBatch, collate
from megatron_psft.scoring.old_policy import CurrentPolicy, Scores
from tests.support import oracle, tiny
from tests.support.gradients import (
    ROWS,
    SEQ_LENGTH,
    GradientSource,
    by_autograd,
    gradients_of,
    objective_of,
    ready,
    totals,
)
from tests.support.layouts import LAYOUTS
from tests.support.marks import slow
from tests.support.scores import scores_of

LABELS = {
    "uneven": ((1, 9), (4, 17), (2, 0), (12, 3)),
    "a masked micro-batch": ((1, 9), (0, 0), (2, 0), (12, 3)),
    "a masked rank": ((5, 1), (7, 2), (0, 0), (0, 0)),
}
"""Label tokens of the two records of each micro-batch; two data-parallel ranks have two micro-batches each."""


@dataclass(frozen=True)
class Batch:
    """A global batch: its micro-batches, old log-probabilities with NaN where there is no label, and what is due."""

    micro_batches: list[MicroBatch]
    old_log_probs: list[Tensor]
    gradients: dict[str, dict[str, Tensor]]
    """Objective -> Hugging Face name -> gradient of the mean over label tokens."""
    sums: dict[str, dict[str, float]]
    """Objective -> name in `BatchSums.totals` -> sum over the batch, and its largest ratio."""


def make_batch(model: torch.nn.Module, labels: tuple[tuple[int, int], ...], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    records, micro_batches, old_log_probs = [], [], []
    for counts in labels:
        examples = [_random_example(count, generator) for count in counts]
        micro_batches.append(collate(examples, batch_size=ROWS, seq_length=SEQ_LENGTH, pad_token_id=0))
        old = torch.full((ROWS, SEQ_LENGTH), torch.nan)
        for row, example in enumerate(examples):
            ids, label_mask = example.tokens.tolist(), example.label_mask.tolist()
            with torch.no_grad():
                now, _ = oracle.label_statistics(model, ids, label_mask)
            before = now + 0.4 * torch.randn(now.shape, generator=generator)
            old[row, : len(ids) - 1][torch.tensor(label_mask[1:])] = before
            records.append((ids, label_mask, before))
        old_log_probs.append(old)
    due = {objective: by_autograd(model, records, objective) for objective in ("psft", "sft")}
    return Batch(
        micro_batches,
        old_log_probs,
        gradients={objective: gradients for objective, (gradients, _) in due.items()},
        sums={objective: sums for objective, (_, sums) in due.items()},
    )


def _random_example(num_labels: int, generator: torch.Generator) -> Example:
    length = int(torch.randint(num_labels + 2, SEQ_LENGTH + 2, (1,), generator=generator))
    label_mask = np.zeros(length, dtype=bool)
    label_mask[1 + torch.randperm(length - 1, generator=generator)[:num_labels].numpy()] = True
    # Without the padding token, for which transformers' embedding has no gradient wherever it stands.
    tokens = torch.randint(1, tiny.VOCAB_SIZE, (length,), generator=generator).numpy().astype(np.int32)
    return Example(tokens=tokens, label_mask=label_mask)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.build_model(tmp_path_factory.mktemp("schedule"), "qwen2")


@pytest.fixture(scope="module")
def batches(folder) -> dict[str, Batch]:
    model = oracle.load_model(folder)
    return {name: make_batch(model, labels, seed) for seed, (name, labels) in enumerate(LABELS.items())}


def my_part(values: list, place) -> list:
    """This data-parallel rank's part of a list over the micro-batches of a global batch."""
    size = len(values) // place.data_size
    return values[place.data_rank * size : (place.data_rank + 1) * size]


def train(run: SimpleNamespace, batch: Batch, objective: str, *, with_old: bool = True):
    """Sums and gradients of a global batch, on cleared buffers."""
    micro_batches, old_log_probs = my_part(batch.micro_batches, run.place), my_part(batch.old_log_probs, run.place)
    run.pipeline.zero_grad()
    old_policy = scores_of(micro_batches, old_log_probs) if with_old else CurrentPolicy()
    return run.pipeline.train(micro_batches, old_policy, objective=objective_of(objective)), gradients_of(run)


def _check_gradients(folder: Path, config: ParallelConfig, batches: dict[str, Batch]):
    """Compares the gradients of this rank's parameters; returns its sums where they count."""
    from megatron_psft.hf.weights import fill_parameters
    from megatron_psft.model.parameters import named_parameters

    sums = {}
    with ready(folder, config) as run:
        found = {
            (name, objective): train(run, batch, objective)
            for name, batch in batches.items()
            for objective in batch.sums
        }
        for (name, objective), (_, gradients) in found.items():
            fill_parameters(run.chunks, GradientSource(batches[name].gradients[objective]), run.shape, run.place)
            for parameter_name, parameter in named_parameters(run.chunks):
                expected = parameter.detach()
                torch.testing.assert_close(
                    gradients[parameter_name],
                    expected,
                    rtol=1e-3,
                    atol=1e-5 * float(expected.abs().max()) + 1e-8,
                    msg=lambda text, at=(name, objective, parameter_name): f"{at}: {text}",
                )
            entries = found[name, objective][0]
            assert bool(entries) == run.place.is_last_stage
            sums[name, objective] = entries if run.place.reports_sums else []
    return sums


@pytest.mark.parametrize("layout", [*map(slow, ("one", "DP2", "PP2")), "DP2-reduce", "TP2-SP", "PP2-VPP1", "PP2-DP2"])
def test_the_gradient_is_that_of_the_mean_over_all_label_tokens(pool, folder, batches, layout):
    world_size, config = LAYOUTS[layout].world_size, LAYOUTS[layout].parallel
    results = pool.run(_check_gradients, world_size, folder, config, batches)
    for name, batch in batches.items():
        assert 0.1 < batch.sums["psft"]["clip_fraction"] / batch.sums["psft"]["label_tokens"] < 0.6
        for objective, expected in batch.sums.items():
            # Without an old policy of its own, SFT is told the same one: the metrics are of both.
            found = totals([sums[name, objective] for sums in results])
            assert found == pytest.approx(expected, rel=1e-4), (name, objective)


def _fused_calls(folder: Path, batch: Batch, fused_head: bool):
    """How often each function of the fused head was called in training and in scoring."""
    from megatron_psft.head import layer

    calls = []

    def watched(function):
        def call(*args, **kwargs):
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return call

    originals = layer.fused_loss, layer.fused_label_stats
    layer.fused_loss, layer.fused_label_stats = map(watched, originals)
    try:
        with ready(folder, ParallelConfig(), fused_head=fused_head) as run:
            _, gradients = train(run, batch, "psft")
            scores = run.pipeline.score(batch.micro_batches)
    finally:
        layer.fused_loss, layer.fused_label_stats = originals
    return calls, gradients, scores


def test_the_fused_head_is_a_choice_that_changes_no_result(pool, folder, batches):
    batch = batches["a masked micro-batch"]
    ((calls, gradients, scores),) = pool.run(_fused_calls, 1, folder, batch, True)
    ((no_calls, plain_gradients, plain_scores),) = pool.run(_fused_calls, 1, folder, batch, False)
    assert calls == ["fused_loss"] * 4 + ["fused_label_stats"] * 4
    assert no_calls == []
    for name, gradient in gradients.items():
        scale = float(plain_gradients[name].abs().max())
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=0, atol=2e-6 * scale)
    for stats, plain_stats in zip(scores, plain_scores, strict=True):
        torch.testing.assert_close(stats, plain_stats, rtol=1e-6, atol=2e-6)


def _check_window_start(folder: Path, config: ParallelConfig, batch: Batch):
    """Scores a batch, then trains on it with these old log-probabilities, with none, and by SFT."""
    with ready(folder, config) as run:
        run.pipeline.zero_grad()
        scored = run.pipeline.score(my_part(batch.micro_batches, run.place))
        assert all(not gradient.any() for gradient in gradients_of(run).values()), "scoring has left a gradient"
        assert not any(tensor.requires_grad for stats in scored for tensor in (stats.log_probs, stats.entropy))
        assert len(scored) == (len(my_part(batch.micro_batches, run.place)) if run.place.is_last_stage else 0)
        own = [stats.log_probs for stats in scored]
        start = run.place.data_rank * len(own)
        own_old = [*batch.old_log_probs[:start], *own, *batch.old_log_probs[start + len(own) :]]
        explicit = train(run, Batch(batch.micro_batches, own_old, {}, {}), "psft")
        implied = train(run, batch, "psft", with_old=False)
        sft = train(run, batch, "sft", with_old=False)
        for name, gradient in sft[1].items():
            assert torch.equal(explicit[1][name], gradient), name
            assert torch.equal(implied[1][name], gradient), name
        return scored if run.place.tensor_rank == 0 else [], explicit[0] if run.place.reports_sums else []


@pytest.mark.parametrize("layout", [slow("one"), slow("DP2"), "TP2-SP", slow("PP2-VPP1"), "PP2-DP2"])
def test_a_window_starts_at_a_ratio_of_exactly_one_and_with_the_gradient_of_sft(pool, folder, batches, layout):
    world_size, config = LAYOUTS[layout].world_size, LAYOUTS[layout].parallel
    batch = batches["uneven"]
    results = pool.run(_check_window_start, world_size, folder, config, batch)
    sums = totals([entries for _, entries in results])
    assert sums["ratio_max"] == 1.0
    assert (sums["ratio_mean"], sums["clip_fraction"], sums["approx_kl"]) == (sums["label_tokens"], 0.0, 0.0)

    scored = [stats for part, _ in results for stats in part]
    assert len(scored) == len(batch.micro_batches)
    found = {"nll": 0.0, "entropy": 0.0}
    for stats, micro_batch in zip(scored, batch.micro_batches, strict=True):
        found["nll"] -= float(stats.log_probs[micro_batch.label_mask].double().sum())
        found["entropy"] += float(stats.entropy[micro_batch.label_mask].double().sum())
    assert found == pytest.approx({name: batch.sums["sft"][name] for name in found}, rel=1e-5)


def _check_nothing_to_learn(folder: Path, config: ParallelConfig, batch: Batch):
    with ready(folder, config) as run:
        train(run, batch, "psft")  # leaves gradients that have to be cleared
        empty = [
            MicroBatch(**{**vars(each), "label_mask": torch.zeros_like(each.label_mask)})
            for each in batch.micro_batches
        ]
        old = [torch.full_like(each, torch.nan) for each in batch.old_log_probs]
        sums, gradients = train(run, Batch(empty, old, {}, {}), "psft")
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())
        return sums if run.place.reports_sums else []


@pytest.mark.parametrize("layout", ["one", "DP2", "PP2"])
def test_a_global_batch_without_labels_has_no_gradient(pool, folder, batches, layout):
    world_size, config = LAYOUTS[layout].world_size, LAYOUTS[layout].parallel
    results = pool.run(_check_nothing_to_learn, world_size, folder, config, batches["uneven"])
    assert set(totals(results).values()) == {0.0}


def _train_two_windows(folder: Path, config: ParallelConfig, batches: list[Batch]) -> tuple[list[Tensor], list[Tensor]]:
    """Four steps in windows of two, as the trainer makes them; returns the scores, and the weights in the end."""
    from megatron_psft.model.parameters import named_parameters
    from megatron_psft.train.optimizer import update

    with ready(folder, config) as run:
        scores: list[Tensor] = []
        for step in range(4):
            run.pipeline.zero_grad()
            run.optimizer.zero_grad()
            old_policy = CurrentPolicy()
            if step % 2 == 0:
                run.pipeline.gather_parameters()
                later = my_part(batches[(step + 1) % 3].micro_batches, run.place)
                ahead = [stats.log_probs for stats in run.pipeline.score_labels(later)]
                scores += ahead
            else:
                old_policy = Scores(ahead)
            mine = my_part(batches[step % 3].micro_batches, run.place)
            run.pipeline.train(mine, old_policy, objective=objective_of("psft"))
            update(run.optimizer, step + 1, torch.device("cpu"))
        run.pipeline.gather_parameters()
        return scores, [parameter.detach().clone() for _, parameter in named_parameters(run.chunks)]


@pytest.mark.slow
@pytest.mark.both
def test_scoring_between_updates_sees_every_overlapped_gather(pool, folder, batches):
    plain = ParallelConfig(use_distributed_optimizer=True)
    overlapped = ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
    expected, found = (
        pool.run(_train_two_windows, 2, folder, config, list(batches.values())) for config in (plain, overlapped)
    )
    for (expected_scores, expected_weights), (scores, weights) in zip(expected, found, strict=True):
        assert all(map(torch.equal, scores, expected_scores))
        assert all(map(torch.equal, weights, expected_weights))
    assert all(map(torch.equal, found[0][1], found[1][1])), "the ranks hold different weights"
    assert not torch.equal(found[0][0][0], found[0][0][2]), "the old policy has not moved between the windows"
