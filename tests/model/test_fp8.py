"""What fp8 asks of machine, model and rows. Nothing here computes in fp8: that takes a GPU."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_psft.config.schema import PrecisionConfig
from megatron_psft.distributed.device import Platform
from megatron_psft.errors import UserError
from megatron_psft.model.fp8 import check_dimensions, check_machine, row_multiple
from megatron_psft.model.gpt import check_layout, transformer_config
from megatron_psft.model.shape import ModelShape
from tests.model.experts import SHAPE as EXPERTS
from tests.support.fp8 import make_config, precision

CPU = Platform(device=torch.device("cpu"), backend="gloo", has_transformer_engine=False)
GPU = Platform(
    device=torch.device("cuda", 0), backend="nccl", has_transformer_engine=True, transformer_engine_version=(2, 8)
)
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
SHAPE = replace(
    EXPERTS,
    model_type="qwen3",
    experts=None,
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=32,
)


@pytest.fixture
def gpu(monkeypatch) -> SimpleNamespace:
    """A GPU of a capability that tests choose."""
    chosen = SimpleNamespace(capability=(9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: chosen.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Model T")
    return chosen


@pytest.mark.parametrize(
    ("recipe", "first"), [("delayed", (8, 9)), ("tensorwise", (8, 9)), ("blockwise", (9, 0)), ("mxfp8", (10, 0))]
)
def test_a_recipe_needs_a_gpu_that_has_it(gpu, recipe, first):
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        gpu.capability = capability
        if capability >= first:
            check_machine(precision(recipe), GPU)
        else:
            found = rf"fp8_recipe \({recipe}\).*compute capability {first[0]}.{first[1]} or later, and Model T has"
            with pytest.raises(UserError, match=rf"{found} {capability[0]}.{capability[1]}; choose another recipe"):
                check_machine(precision(recipe), GPU)


@pytest.mark.parametrize(
    ("recipe", "version", "message"),
    [
        (
            "tensorwise",
            (2, 1),
            r"\(tensorwise\) needs Transformer Engine 2.2 or later, and 2.1 is installed",
        ),
        ("blockwise", (1, 13), r"needs Transformer Engine 2.3 or later, and 1.13 is installed"),
        ("delayed", None, r"fp8_format \(hybrid\) needs Transformer Engine, which is not installed"),
    ],
)
def test_a_recipe_needs_a_transformer_engine_that_has_it(gpu, recipe, version, message):
    with pytest.raises(UserError, match=message):
        check_machine(precision(recipe), replace(GPU, transformer_engine_version=version))


def test_without_a_gpu_there_is_no_fp8():
    with pytest.raises(UserError, match=r"fp8_format \(e4m3\) needs a GPU, and there is none; remove it"):
        check_machine(precision(fp8_format="e4m3"), CPU)
    check_machine(PrecisionConfig(bf16=True), CPU)


@pytest.mark.parametrize(("recipe", "multiple"), list(zip(RECIPES, (16, 16, 128, 32), strict=True)))
def test_rows_are_padded_to_what_a_recipe_scales_at_a_time(recipe, multiple):
    assert row_multiple(precision(recipe)) == multiple
    assert row_multiple(PrecisionConfig(bf16=True)) == 1


@pytest.mark.parametrize(
    ("changes", "recipe", "tensor", "message"),
    [
        ({"hidden_size": 264}, "delayed", 1, r"hidden_size \(264 on each rank\) must be a multiple of 16"),
        ({"head_dim": 5}, "tensorwise", 1, r"head_dim \* num_attention_heads \(40 on each rank\)"),
        ({"ffn_hidden_size": 520}, "tensorwise", 1, r"ffn_hidden_size \(520 on each rank\)"),
        ({}, "blockwise", 4, r"head_dim \* num_attention_heads \(64 on each rank\) must be a multiple of 128"),
        ({"hidden_size": 240}, "mxfp8", 1, r"hidden_size \(240 on each rank\) must be a multiple of 32"),
    ],
)
def test_dimensions_that_a_recipe_cannot_scale_are_refused(changes, recipe, tensor, message):
    config = make_config(recipe, tensor_model_parallel_size=tensor)
    with pytest.raises(UserError, match=message):
        check_dimensions(replace(SHAPE, **changes), config)


@pytest.mark.parametrize("recipe", RECIPES)
def test_dimensions_that_a_recipe_can_scale_are_accepted(recipe):
    check_layout(SHAPE, make_config(recipe, tensor_model_parallel_size=2))


def test_an_expert_has_dimensions_of_its_own():
    shape: ModelShape = replace(SHAPE, model_type="qwen3_moe", experts=replace(EXPERTS.experts, ffn_hidden_size=40))
    with pytest.raises(UserError, match=r"ffn_hidden_size of an expert \(40 on each rank\) must be a multiple of 16"):
        check_dimensions(shape, make_config("delayed"))
    check_dimensions(
        replace(shape, ffn_hidden_size=7, experts=replace(shape.experts, ffn_hidden_size=48)), make_config("delayed")
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
def test_megatron_core_is_told_format_and_recipe_and_keeps_its_parameters(recipe, fp8_format):
    config = replace(make_config(recipe), precision=precision(recipe, fp8_format))
    found = transformer_config(SHAPE, config, CPU)
    assert (found.fp8, found.fp8_recipe, found.fp8_param) == (fp8_format, recipe, False)
    assert transformer_config(SHAPE, replace(config, precision=PrecisionConfig(bf16=True)), CPU).fp8 is None
