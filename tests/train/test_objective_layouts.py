"""Every objective under every aggregation has one gradient, however the batch is cut and wherever its parts lie.

What is due comes from transformers, autograd and the formulas of `tests.support.oracle`, a record at a time.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_psft.config.schema import ObjectiveConfig, ParallelConfig
from megatron_psft.data.dataset import TokenizedDataset
from megatron_psft.data.loader import BatchLoader
from megatron_psft.data.micro_batch import MicroBatch
from megatron_psft.data.packing import PackPlan, best_fit
from megatron_psft.objectives.objective import Objective
from megatron_psft.objectives.registry import OBJECTIVES
from megatron_psft.scoring.batch_nll import with_nll_z
from megatron_psft.scoring.old_policy import NoOldPolicy
from tests.support import oracle, tiny
from tests.support.cli import REPOSITORY
from tests.support.gradients import GradientSource, gradients_of, ready
from tests.support.layouts import LAYOUTS
from tests.support.marks import slow
from tests.support.packed_rows import CAPACITY, RECORDS, make_dataset, make_loader
from tests.support.scores import scores_of

TOKEN_MEAN, SEQ_MEAN, SEQ_SUM = "token-mean", "seq-mean-token-mean", "seq-mean-token-sum"
CASES: dict[str, dict] = {
    "sft": {"objective": "sft", "loss_aggregation": SEQ_MEAN},
    "sft with advantages": {"objective": "sft", "loss_aggregation": SEQ_SUM},
    "psft": {"objective": "psft", "loss_aggregation": SEQ_MEAN},
    "psft with advantages": {"objective": "psft", "clip_ratio_low": 0.15},
    "psft with advantages, by sums": {"objective": "psft", "loss_aggregation": SEQ_SUM},
    "dppo-tv": {"objective": "dppo-tv", "tv_threshold": 0.002, "tv_ratio_cap": 1.2, "loss_aggregation": SEQ_MEAN},
    "dppo-tv with advantages": {"objective": "dppo-tv", "tv_threshold": 0.001},
    "sft-kl": {"objective": "sft-kl", "kl_coef": 0.3},
    "sft-kl over the vocabulary": {"objective": "sft-kl", "kl_top_k": 5, "loss_aggregation": SEQ_SUM},
    "asft over the vocabulary": {"objective": "asft", "kl_top_k": 5},
    "dft": {"objective": "dft", "loss_aggregation": SEQ_SUM},
    "iw-sft": {"objective": "iw-sft"},
    "iw-sft, by means": {"objective": "iw-sft", "loss_aggregation": SEQ_MEAN},
    "iw-sft by token": {"objective": "iw-sft", "iw_level": "token"},
    "asft": {"objective": "asft", "loss_aggregation": SEQ_MEAN},
    "eaft": {"objective": "eaft", "eaft_alpha": 0.5},
    "p-power": {"objective": "p-power", "p_power_q": 0.5, "loss_aggregation": SEQ_SUM},
    "trsft": {"objective": "trsft", "trsft_alpha": 0.002},
    "profit": {"objective": "profit", "profit_threshold": 0.02, "loss_aggregation": SEQ_MEAN},
    "deft": {"objective": "deft"},
    "cadft": {"objective": "cadft", "cadft_beta": 1.5, "loss_aggregation": SEQ_MEAN},
}
SETUPS = [
    # layout, packs per micro-batch, fused head
    ("one", 2, False),
    ("TP2-SP", 2, True),
    ("PP2", 1, True),
    ("DP2", 2, True),
    ("CP2", 2, False),
    ("TP2-SP-CP2", 1, True),
    ("CP2-DP2-reduce", 1, True),
]


@dataclass(frozen=True)
class Data:
    """A global batch, what is known of its records, and what is due for each case."""

    dataset: TokenizedDataset
    old_log_probs: list[Tensor]
    """Of each record, for each of its tokens but the first; NaN where there is no label."""
    ref_log_probs: list[Tensor]
    ref_top: list[Tensor]
    """Of each record, `MicroBatch.ref_top` of each token but the last; NaN likewise."""
    advantages: Tensor
    """`[records]`."""
    gradients: dict[str, dict[str, Tensor]]
    losses: dict[str, float]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.build_model(tmp_path_factory.mktemp("objectives"), "qwen2")


@pytest.fixture(scope="module")
def data(folder) -> Data:
    model = oracle.load_model(folder)
    generator = torch.Generator().manual_seed(11)
    tokens, label_masks, old, ref, ref_top, known = [], [], [], [], [], []
    advantages = torch.randn(len(RECORDS["uneven"]), generator=generator)
    for length, num_labels in RECORDS["uneven"]:
        ids = torch.randint(1, tiny.VOCAB_SIZE, (length,), generator=generator)
        label_mask = torch.zeros(length, dtype=torch.bool)
        label_mask[1 + torch.randperm(length - 1, generator=generator)[:num_labels]] = True
        distribution, labels = oracle.label_distributions(model, ids.tolist(), label_mask.tolist())
        now = distribution.detach().gather(1, labels[:, None])[:, 0]
        for every, spread in ((old, 0.4), (ref, 0.6)):
            every.append(torch.full((length - 1,), torch.nan))
            every[-1][label_mask[1:]] = now + spread * torch.randn(now.shape, generator=generator)
        noise = torch.randn(distribution.shape, generator=generator)
        initial = (distribution.detach() + noise).log_softmax(dim=1)
        top = initial.topk(5, dim=1)
        rest = torch.log1p(-top.values.exp().sum(dim=1, keepdim=True))
        ref_top.append(torch.full((length - 1, 11), torch.nan))
        ref_top[-1][label_mask[1:]] = torch.cat([rest, top.indices.float(), top.values], dim=1)
        known.append((distribution, labels, old[-1][label_mask[1:]], ref[-1][label_mask[1:]], initial))
        tokens.append(ids.numpy())
        label_masks.append(label_mask.numpy())
    due = {name: by_autograd(model, known, name, advantages.tolist()) for name in CASES}
    return Data(
        make_dataset(tokens, label_masks),
        old,
        ref,
        ref_top,
        advantages,
        gradients={name: gradients for name, (gradients, _) in due.items()},
        losses={name: loss for name, (_, loss) in due.items()},
    )


def by_autograd(
    model: torch.nn.Module, known: list[tuple[Tensor, ...]], case: str, advantages: list[float]
) -> tuple[dict[str, Tensor], float]:
    settings = dict(CASES[case])
    name, aggregation = settings.pop("objective"), settings.pop("loss_aggregation", TOKEN_MEAN)
    nll_z = oracle.nll_z_of([every.detach().gather(1, labels[:, None])[:, 0] for every, labels, *_ in known])
    losses = [
        oracle.token_losses(
            name,
            distribution,
            labels,
            old_log_probs=old,
            ref_log_probs=ref,
            ref_distribution=initial,
            nll_z=z,
            advantage=advantage if "advantages" in case else 1.0,
            **settings,
        )
        for (distribution, labels, old, ref, initial), advantage, z in zip(known, advantages, nll_z, strict=True)
    ]
    loss = oracle.aggregate(losses, aggregation)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    return dict(zip(names, gradients, strict=True)), loss.item()


def _inputs_of(
    data: Data, case: str, loader: BatchLoader, plan: PackPlan, place
) -> tuple[list[MicroBatch], list[Tensor]]:
    """This rank's micro-batches with advantages and reference log-probabilities, and the old ones beside them."""
    order = plan.shuffled(3, 0)
    packs = loader.own_numbers(0)

    def in_rows(of_records: list[Tensor]) -> list[Tensor]:
        rows = torch.full((len(packs), loader.unpadded_length(0)), torch.nan)
        for row, pack in enumerate(packs):
            values = torch.cat([of_records[record] for record in order[pack]])
            rows[row, : len(values)] = values
        return loader.from_packs(0, rows)

    batches, size = loader.micro_batches(0), loader.micro_batch_size
    needs_reference = CASES[case]["objective"] in oracle.ANCHORED
    ref_top: list[Tensor | None] = [None] * len(batches)
    if "kl_top_k" in CASES[case]:
        columns = [in_rows([*of_records]) for of_records in zip(*(top.unbind(1) for top in data.ref_top), strict=True)]
        ref_top = [torch.stack(rows, dim=-1) for rows in zip(*columns, strict=True)]
    for index, ref in enumerate(in_rows(data.ref_log_probs)):
        records = [int(record) for pack in packs[index * size : (index + 1) * size] for record in order[pack]]
        batches[index] = replace(
            batches[index],
            advantages=data.advantages[records] if "advantages" in case else None,
            ref_log_probs=ref if needs_reference else None,
            ref_top=ref_top[index],
        )
    return batches, in_rows(data.old_log_probs)


def _check_gradients(
    folder: Path, config: ParallelConfig, data: Data, micro_batch_size: int, fused_head: bool
) -> dict[str, float]:
    """Compares the gradients of this rank's parameters, case by case; returns the losses that metrics report."""
    from megatron_psft.hf.weights import fill_parameters
    from megatron_psft.metrics.reduce import reduce_metrics
    from megatron_psft.model.parameters import named_parameters

    losses, found = {}, {}
    with ready(folder, config, fused_head=fused_head) as run:
        plan = best_fit(data.dataset.lengths - 1, CAPACITY)
        loader = make_loader(data.dataset, run.place, config, plan, micro_batch_size)
        for case, settings in CASES.items():
            if "kl_top_k" in settings and not fused_head:
                continue
            batches, old = _inputs_of(data, case, loader, plan, run.place)
            objective = Objective(config=ObjectiveConfig(**settings))
            has_old_policy = objective.config.needs_old_policy
            old_policy = scores_of(batches, old) if has_old_policy else NoOldPolicy()
            if "nll_z" in objective.needs:
                batches = with_nll_z(batches, run.pipeline, run.place)
            run.pipeline.zero_grad()
            sums = run.pipeline.train(batches, old_policy, objective=objective)
            found[case] = gradients_of(run)
            metrics = reduce_metrics(sums, batches, run.place, 1, needs=objective.config.needs)
            assert ("ratio_max" in metrics) == has_old_policy
            losses[case] = metrics["loss"]
        for case, gradients in found.items():
            fill_parameters(run.chunks, GradientSource(data.gradients[case]), run.shape, run.place)
            for name, parameter in named_parameters(run.chunks):
                expected = parameter.detach()
                torch.testing.assert_close(
                    gradients[name],
                    expected,
                    rtol=1e-5,
                    atol=2e-5 * float(expected.abs().max()),
                    msg=lambda text, at=(case, name): f"{at}: {text}",
                )
    return losses


QUICK = ("TP2-SP",)


@pytest.mark.parametrize(
    ("layout", "micro_batch_size", "fused_head"),
    [setup if setup[0] in QUICK else slow(*setup) for setup in SETUPS],
)
def test_every_objective_has_the_gradient_of_its_formula(pool, folder, data, layout, micro_batch_size, fused_head):
    world_size, config = LAYOUTS[layout].world_size, LAYOUTS[layout].parallel
    results = pool.run(_check_gradients, world_size, folder, config, data, micro_batch_size, fused_head)
    due = {case: loss for case, loss in data.losses.items() if fused_head or "kl_top_k" not in CASES[case]}
    for losses in results:
        assert losses == pytest.approx(due, rel=2e-5)


def test_the_cases_are_all_objectives_and_differ(data):
    # Pairs need other records: test_preference.py.
    assert {settings["objective"] for settings in CASES.values()} == set(OBJECTIVES) - {"dpo"}
    directions = [
        torch.cat([gradient.flatten() for gradient in data.gradients[case].values()]).div_(data.losses[case])
        for case in CASES
    ]
    for index, one in enumerate(directions):
        for other in directions[:index]:
            assert float((one - other).norm() / one.norm()) > 0.01


def test_the_page_counts_these_settings():
    page = (REPOSITORY / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert len(SETUPS) == 7
    assert "for every objective in seven settings" in page
