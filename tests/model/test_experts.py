"""Mixtures of experts compute what transformers computes, forward and backward, however they are spread."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_psft.config.schema import RecomputeConfig
from megatron_psft.distributed.device import Platform
from megatron_psft.errors import UserError
from megatron_psft.model.experts import expert_options
from megatron_psft.model.gpt import check_layout
from megatron_psft.model.shape import read_shape
from tests.model.experts import SHAPE
from tests.model.statistics import (
    LENGTHS,
    VOCAB_SIZE,
    assert_same_gradients,
    assert_same_statistics,
    measure,
    reference_numbers,
)
from tests.support import tiny
from tests.support.layouts import LAYOUTS, Layout, make_config
from tests.support.marks import slow

QUICK_LAYOUTS = ("one", "TP2-SP-DP2-EP2", "PP2-DP2-EP2")
SLOW_LAYOUTS = (
    *("DP2", "DP2-EP2", "TP2-SP", "TP2-SP-ETP1", "TP2-SP-EP2-ETP1"),
    *("TP2-SP-DP2-EP4-ETP1", "PP2-VPP1"),
)
MODELS: dict[str, tuple[str, dict]] = {
    "qwen3_moe": ("qwen3_moe", {}),
    "weights as they come": ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": []}),
    "one expert": ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 1, "decoder_sparse_step": 2}),
    "mixtral": ("mixtral", {"tied": True}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: tiny.build_model(root / name, family, vocab_size=VOCAB_SIZE, rms_norm_eps=0.01, **changes)
        for name, (family, changes) in MODELS.items()
    }


@pytest.fixture(scope="module")
def references(folders) -> dict[str, dict]:
    return {name: reference_numbers(folder, MODELS[name][0]) for name, folder in folders.items()}


@pytest.mark.parametrize("layout", [*QUICK_LAYOUTS, *map(slow, SLOW_LAYOUTS)])
def test_statistics_and_gradients_are_those_of_transformers(pool, folders, references, layout):
    by_rank = pool.run(measure, LAYOUTS[layout].world_size, LAYOUTS[layout], list(folders.values()), False)
    for name, results in zip(folders, zip(*by_rank, strict=True), strict=True):
        assert_same_statistics(list(results), references[name])
        assert_same_gradients(list(results), references[name])
        assert_padding_is_without_effect(results)


def assert_padding_is_without_effect(results: tuple[dict, ...]) -> None:
    """The two passes differ in what stands in the padding, and so in how many rows an expert computes at a time."""
    scores = [(result["data_rank"], *result["scores"]) for result in results if result["scores"]]
    for data_rank, first, second in scores:
        for one, other in zip(first, second, strict=True):
            for row, length in enumerate(LENGTHS[data_rank * len(one) :][: len(one)]):
                torch.testing.assert_close(one[row, : length - 1], other[row, : length - 1], rtol=1e-5, atol=1e-6)


def test_a_model_in_bf16_stays_near_fp32(pool, folders, references):
    layout = LAYOUTS["DP2-EP2"]
    results = [result for (result,) in pool.run(measure, 2, layout, [folders["mixtral"]], True)]
    for result in results:
        (log_probs, _), _ = result["scores"]
        for row, found in enumerate(log_probs):
            record = result["data_rank"] * len(log_probs) + row
            wanted = references["mixtral"]["log_probs"][record]
            assert float((found[: len(wanted)] - wanted).abs().mean()) < 0.05


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(data=4, expert=4), r"the number of experts \(6\).*expert_model_parallel_size \(4\)"),
        (Layout(tensor=3), r"ffn_hidden_size of an expert \(20\).*expert_tensor_parallel_size \(3\)"),
        (
            Layout(tensor=2, sequence=False),
            r"sequence_parallel \(False\) must be set.*tensor_model_parallel_size \(2\)",
        ),
    ],
)
def test_layouts_that_do_not_divide_the_experts_are_refused(layout, message):
    with pytest.raises(UserError, match=message):
        check_layout(SHAPE, make_config(layout))


@pytest.mark.parametrize(
    ("dense_layers", "layout", "stage"),
    [
        ((2, 3), Layout(pipeline=2), 1),
        ((0, 2), Layout(pipeline=2), None),
        ((0, 2), Layout(pipeline=2, per_chunk=1), 0),
        ((0, 1), Layout(pipeline=2, per_chunk=1), None),
        ((1,), Layout(pipeline=4), 1),
    ],
)
def test_every_stage_has_experts(dense_layers, layout, stage):
    shape = replace(SHAPE, experts=replace(SHAPE.experts, dense_layers=dense_layers))
    if stage is None:
        check_layout(shape, make_config(layout))
    else:
        with pytest.raises(UserError, match=rf"must leave each stage a layer with experts, and stage {stage} has none"):
            check_layout(shape, make_config(layout))


@pytest.mark.parametrize(("module", "experts"), [("mlp", SHAPE.experts), ("moe", None)])
def test_what_is_recomputed_must_be_there(module, experts):
    recompute = RecomputeConfig(recompute_granularity="selective", recompute_modules=("core_attn", module))
    config = replace(make_config(Layout()), recompute=recompute)
    with pytest.raises(UserError, match=rf"recompute_modules \({module}\) has no effect, as no layer"):
        check_layout(replace(SHAPE, experts=experts), config)
    check_layout(replace(SHAPE, experts=replace(SHAPE.experts, dense_layers=(2,))), config)


def test_the_plain_mlp_counts_only_where_there_is_one():
    layout = Layout(tensor=4)
    check_layout(SHAPE, make_config(layout))
    one_dense = replace(SHAPE, experts=replace(SHAPE.experts, dense_layers=(2,)))
    with pytest.raises(UserError, match=r"ffn_hidden_size \(90\).*tensor_model_parallel_size \(4\)"):
        check_layout(one_dense, make_config(layout))


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (Layout(data=2, expert=2), "expert_model_parallel_size"),
        (Layout(expert_tensor=1), "expert_tensor_parallel_size"),
    ],
)
def test_a_model_without_experts_has_no_use_for_their_sizes(layout, name):
    with pytest.raises(UserError, match=rf"{name} \(\d\) has no effect, as a qwen3 model has no experts"):
        check_layout(replace(SHAPE, model_type="qwen3", experts=None), make_config(layout))


def test_the_router_adds_nothing_to_the_objective(tmp_path):
    """No loss that balances the load, no noise, no token dropped, whatever the model was published with."""
    folder = tiny.build_model(tmp_path, "qwen3_moe", router_aux_loss_coef=0.5, output_router_logits=True)
    options = expert_options(read_shape(folder), make_config(Layout()), PORTABLE)
    assert options["moe_router_load_balancing_type"] == "none"
    assert options["moe_layer_freq"] == [1, 0, 1, 1]
    given = set(options)
    assert not given & {"moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_input_jitter_eps", "moe_expert_capacity_factor"}


PORTABLE = Platform(device=torch.device("cpu"), backend="gloo", has_transformer_engine=False)
