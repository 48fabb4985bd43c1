"""Packed rows, split over every kind of rank, have the loss, entropy and gradients of their records one at a time.

What is due comes from transformers and autograd, a record per forward pass: no rows, padding, packs or shards.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_psft.config.schema import ParallelConfig
from megatron_psft.data.dataset import TokenizedDataset
from megatron_psft.data.packing import best_fit, one_per_pack
from tests.support import oracle, tiny
from tests.support.cli import REPOSITORY
from tests.support.gradients import GradientSource, gradients_of, objective_of, ready, totals
from tests.support.layouts import LAYOUTS
from tests.support.marks import slow
from tests.support.packed_rows import (
    CAPACITY,
    PACKED_LAYOUTS,
    RECORDS,
    Data,
    make_data,
    make_dataset,
    make_loader,
    old_of,
)
from tests.support.scores import scores_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.build_model(tmp_path_factory.mktemp("packed"), "qwen2")


@pytest.fixture(scope="module")
def every_data(folder) -> dict[str, Data]:
    model = oracle.load_model(folder)
    return {name: make_data(model, records, seed) for seed, (name, records) in enumerate(RECORDS.items())}


def _check_gradients(folder: Path, config: ParallelConfig, every_data: dict[str, Data], micro_batch_size: int):
    """Compares the gradients of this rank's parameters; returns its sums where they count."""
    from megatron_psft.hf.weights import fill_parameters
    from megatron_psft.model.parameters import named_parameters

    with ready(folder, config) as run:
        found = {}
        for name, data in every_data.items():
            lengths = data.dataset.lengths - 1
            plans = {"packed": best_fit(lengths, CAPACITY)}
            assert len(plans["packed"]) == 4
            if config.context_parallel_size > 1:
                plans["one per pack"] = one_per_pack(lengths, CAPACITY)
            for kind, plan in plans.items():
                loader = make_loader(data.dataset, run.place, config, plan, micro_batch_size)
                batches = loader.micro_batches(0)
                old_policy = scores_of(batches, old_of(data, loader, plan, run.place))
                run.pipeline.zero_grad()
                sums = run.pipeline.train(batches, old_policy, objective=objective_of("psft"))
                found[name, kind] = sums, gradients_of(run)
        for key, (_, gradients) in found.items():
            wanted = GradientSource(every_data[key[0]].gradients)
            fill_parameters(run.chunks, wanted, run.shape, run.place)
            for parameter_name, parameter in named_parameters(run.chunks):
                expected = parameter.detach()
                torch.testing.assert_close(
                    gradients[parameter_name],
                    expected,
                    rtol=1e-5,
                    atol=1e-5 * float(expected.abs().max()),
                    msg=lambda text, at=(*key, parameter_name): f"{at}: {text}",
                )
        return {key: sums if run.place.reports_sums else [] for key, (sums, _) in found.items()}


CASES = [(layout, 1) for layout in PACKED_LAYOUTS] + [(layout, 2) for layout in ("one", "PP2", "CP2")]
QUICK = (("TP2-SP", 1), ("PP2-VPP1", 1), ("CP2-DP2-reduce", 1), ("PP2", 2))


@pytest.mark.parametrize(("layout", "micro_batch_size"), [case if case in QUICK else slow(*case) for case in CASES])
def test_every_gradient_is_that_of_the_records_one_at_a_time(pool, folder, every_data, layout, micro_batch_size):
    world_size, config = LAYOUTS[layout].world_size, LAYOUTS[layout].parallel
    results = pool.run(_check_gradients, world_size, folder, config, every_data, micro_batch_size)
    for key in results[0]:
        # The divergence of one token is what two almost equal fp32 numbers differ by.
        expected = {
            name: pytest.approx(value, rel=1e-4 if name == "approx_kl" else 1e-5)
            for name, value in every_data[key[0]].sums.items()
        }
        assert totals([sums[key] for sums in results]) == expected, key
    uneven = every_data["uneven"].sums
    assert 0.1 < uneven["clip_fraction"] / uneven["label_tokens"] < 0.6


def _score_copies(folder: Path, config: ParallelConfig, data: TokenizedDataset, leak: str | None) -> Tensor:
    """Log-probabilities of the tokens of two equal records in one row; `leak` plants a mistake."""
    import torch.distributed as dist

    from megatron_psft.model.layers import packed_row_params
    from megatron_psft.train import pipeline

    def one_segment(segments: tuple[int, ...], device: torch.device):
        return packed_row_params((sum(segments),), device)

    def one_run_of_positions(segments: tuple[int, ...], device: torch.device):
        row, merged = packed_row_params(segments, device), one_segment(segments, device)
        row.cu_seqlens_q_padded, row.cu_seqlens_kv_padded = merged.cu_seqlens_q, merged.cu_seqlens_kv
        row.max_seqlen_q = row.max_seqlen_kv = sum(segments)
        return row

    leaks = {None: packed_row_params, "attention": one_segment, "positions": one_run_of_positions}
    plan = best_fit(data.lengths - 1, 2 * int(data.lengths[0] - 1))
    assert len(plan) == 1
    pipeline.packed_row_params = leaks[leak]
    try:
        with ready(folder, config) as run:
            loader = make_loader(data, run.place, config, plan, micro_batch_size=1)
            scores = run.pipeline.score(loader.micro_batches(0))
            row = loader.to_packs(0, [stats.log_probs for stats in scores])
            dist.all_reduce(row, group=run.place.context_group)
            return row[0]
    finally:
        pipeline.packed_row_params = packed_row_params


@pytest.fixture(scope="module")
def copies() -> TokenizedDataset:
    tokens = torch.randint(1, tiny.VOCAB_SIZE, (28,), generator=torch.Generator().manual_seed(9)).numpy()
    label_mask = np.arange(28) > 0
    return make_dataset([tokens, tokens], [label_mask, label_mask])


@pytest.mark.parametrize("layout", ["one", "TP2-SP", "CP2"])
def test_a_copy_behind_a_record_knows_nothing_of_it(pool, folder, copies, layout):
    """A model that saw the first record would copy it; positions that ran on would be others."""
    world_size, config = LAYOUTS[layout].world_size, LAYOUTS[layout].parallel
    with torch.no_grad():
        alone, _ = oracle.label_statistics(
            oracle.load_model(folder), copies[0].tokens.tolist(), copies[0].label_mask.tolist()
        )
    for scores in pool.run(_score_copies, world_size, folder, config, copies, None):
        for found in scores.view(2, -1):
            torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "leak"),
    [slow("one", "attention"), ("CP2", "attention"), ("CP2", "positions")],
)
def test_a_planted_leak_is_seen(pool, folder, copies, layout, leak):
    """What the test above compares differs by a hundred times its tolerance as soon as a border is crossed.

    Positions that run on through a whole row change nothing: rotary embeddings know differences only. Under context
    parallelism they do, as a rank has two chunks of each record.
    """
    world_size, config = LAYOUTS[layout].world_size, LAYOUTS[layout].parallel
    clean, leaking = (pool.run(_score_copies, world_size, folder, config, copies, plant)[0] for plant in (None, leak))
    assert (clean - leaking)[len(clean) // 2 :].abs().max() > 1e-3


def test_the_readme_counts_these_layouts():
    assert len(PACKED_LAYOUTS) == 11
    page = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "for packs in eleven layouts up to CP2 x TP2 and CP4" in page
