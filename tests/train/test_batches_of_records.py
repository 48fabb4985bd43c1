"""A step of records that are packed among themselves has the loss and the gradient that it has without packing."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_psft.config.schema import ParallelConfig
from megatron_psft.data.dealing import ByTokens
from megatron_psft.data.loader import BatchLoader, Shard
from megatron_psft.data.packing import one_per_pack
from tests.support import oracle, tiny
from tests.support.gradients import GradientSource, gradients_of, objective_of, ready, totals
from tests.support.layouts import LAYOUTS
from tests.support.marks import slow
from tests.support.packed_rows import CAPACITY, RECORDS, Data, make_data, old_of
from tests.support.scores import scores_of

FAMILIES = ("qwen2", "qwen3_moe")
BATCHES = {"uneven": RECORDS["uneven"], "few": ((61, 40), (4, 2), (32, 30))}
"""The few are not enough for four replicas: one has none, and still joins in."""
DENSE = (
    *("one", "TP2-SP", "PP2", "PP2-VPP1", "DP2", "DP4", "CP2", "CP2-DP2-reduce"),
    *("PP2-DP2", "PP2-CP2", "TP2-SP-PP2-DP2"),
)
EXPERTS = ("DP2-EP2", "DP4-EP2", "TP2-SP-DP2-EP2", "CP2-EP2", "PP2-DP2-EP2-VPP1")
QUICK = ("TP2-SP", "PP2-VPP1", "CP2-DP2-reduce", "DP4-EP2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: tiny.build_model(tmp_path_factory.mktemp("records") / name, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def every_data(folders) -> dict[str, dict[str, Data]]:
    models = {family: oracle.load_model(folder) for family, folder in folders.items()}
    return {
        family: {name: make_data(model, records, seed) for seed, (name, records) in enumerate(BATCHES.items())}
        for family, model in models.items()
    }


def _loaders(data: Data, place, config: ParallelConfig) -> dict[str, BatchLoader]:
    """Packed, and not packed."""
    count = len(data.dataset)
    shard = Shard(
        data_rank=place.data_rank,
        data_size=place.data_size,
        context_rank=place.context_rank,
        context_size=place.context_size,
    )
    settings = {
        "micro_batch_size": 1,
        "shuffle_seed": 3,
        "pad_to_multiple_of": 16 * (place.tensor_size if config.sequence_parallel else 1),  # fp8's
        "pad_token_id": 7,
    }
    plan = one_per_pack(data.dataset.lengths - 1, CAPACITY)
    packed = BatchLoader(
        data.dataset,
        plan,
        global_batch_size=count,
        shard=replace(shard, by_tokens=ByTokens.of(place)),
        one_row=True,
        **settings,
    )
    is_few = count == len(BATCHES["few"])
    assert is_few or len(packed.micro_batches(0)) < count / place.data_size, "no two records share a row"
    equal = place.data_size * place.pipeline_size
    alone = BatchLoader(
        data.dataset,
        plan,
        global_batch_size=-(-count // equal) * equal,
        shard=shard,
        one_row=place.context_size > 1,
        wrap=False,
        **settings,
    )
    return {"records": packed, "no packing": alone}


def _check_gradients(folder: Path, config: ParallelConfig, every_data: dict[str, Data]):
    """Compares the gradients of this rank's parameters; returns its sums where they count, and its label tokens."""
    from megatron_psft.hf.weights import fill_parameters
    from megatron_psft.model.parameters import named_parameters

    sums, labels = {}, {}
    with ready(folder, config) as run:
        found = {}
        for name, data in every_data.items():
            for kind, loader in _loaders(data, run.place, config).items():
                batches = loader.micro_batches(0)
                plan = one_per_pack(data.dataset.lengths - 1, CAPACITY)
                old_policy = scores_of(batches, old_of(data, loader, plan, run.place))
                run.pipeline.zero_grad()
                key = name, kind
                sums[key] = run.pipeline.train(batches, old_policy, objective=objective_of("psft"))
                labels[key] = sum(int(batch.label_mask.sum()) for batch in batches)
                found[key] = gradients_of(run)
        for name, data in every_data.items():
            wanted = [found[name, "no packing"]]
            if run.shape.experts is None:  # whose names transformers has otherwise
                fill_parameters(run.chunks, GradientSource(data.gradients), run.shape, run.place)
                wanted.append({name: parameter.detach() for name, parameter in named_parameters(run.chunks)})
            for parameter_name, gradient in found[name, "records"].items():
                for due in wanted:
                    difference, size = gradient - due[parameter_name], due[parameter_name].norm()
                    assert difference.norm() <= 1e-5 * size, (name, parameter_name)
        return ({key: of if run.place.reports_sums else [] for key, of in sums.items()}, labels)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        case if case[1] in QUICK else slow(*case)
        for family, layouts in zip(FAMILIES, (DENSE, EXPERTS), strict=True)
        for case in ((family, layout) for layout in layouts)
    ],
)
def test_the_gradient_is_that_without_packing(pool, folders, every_data, family, layout):
    world_size, config = LAYOUTS[layout].world_size, LAYOUTS[layout].parallel
    results = pool.run(_check_gradients, world_size, folders[family], config, every_data[family])
    for key in results[0][0]:
        expected = {
            name: pytest.approx(value, rel=1e-4 if name == "approx_kl" else 1e-5)
            for name, value in every_data[family][key[0]].sums.items()
        }
        assert totals([sums[key] for sums, _ in results]) == expected, key
    if LAYOUTS[layout].data == 4:
        assert 0 in [labels["few", "records"] for _, labels in results], "no rank was left empty"
