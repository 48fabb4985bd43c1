"""Which layouts of a model from Megatron-Bridge are refused, before Bridge is imported."""

import pytest

from megatron_psft.config.inputs import DataConfig, WeightsConfig
from megatron_psft.config.lora import LoraConfig
from megatron_psft.config.schema import Config, ParallelConfig
from megatron_psft.errors import UserError
from megatron_psft.sources.bridge_layout import check_layout

SIZES = {"num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 100, "n_routed_experts": 8}


def check(fields, stages, **lora):
    parallel = ParallelConfig(pipeline_model_parallel_size=stages)
    weights, data = WeightsConfig(load_hf="model", save="save"), DataConfig(data=("records",))
    config = Config(weights=weights, data=data, parallel=parallel, lora=LoraConfig(**lora))
    check_layout({**SIZES, **fields}, config)


@pytest.mark.parametrize(
    ("fields", "stages", "stage"),
    [
        ({"model_type": "deepseek_v3", "first_k_dense_replace": 3}, 2, 0),
        ({"model_type": "glm4_moe", "first_k_dense_replace": 2}, 3, 0),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "MEM*-M"}, 2, 1),
    ],
)
def test_each_stage_has_experts(fields, stages, stage):
    with pytest.raises(
        UserError, match=rf"size \({stages}\) must leave each stage .* and stage {stage} has none; lower it"
    ):
        check(fields, stages)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "deepseek_v3", "first_k_dense_replace": 2},
        {"model_type": "olmoe"},
        {"model_type": "nemotron_h", "hybrid_override_pattern": "MEM*-E"},
        {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-M"},
    ],
)
def test_a_stage_may_have_dense_layers_besides(fields):
    check(fields, 2)


@pytest.mark.parametrize(
    ("model_type", "lora", "message"),
    [
        ("deepseek_v3", {}, r"lora_rank \(4\) is not supported for a deepseek_v3 model"),
        ("olmoe", {}, r"lora_targets \(all-linear\) would put adapters on experts"),
        (
            "olmoe",
            {"lora_targets": ("q_proj", "down_proj")},
            r"lora_targets \(down_proj\) would put adapters on experts",
        ),
        ("olmoe", {"lora_targets": ("q_proj",), "lora_rank": 65}, r"lora_rank \(65\) must be at most 64"),
        ("gemma3_text", {"lora_targets": ("w1",)}, r"lora_targets \(w1\) is no linear layer of a gemma3_text model"),
    ],
)
def test_adapters_that_have_no_place_are_refused(model_type, lora, message):
    sizes = {"model_type": model_type, "hidden_size": 64, "intermediate_size": 128}
    sizes |= {"n_routed_experts": None} if model_type == "gemma3_text" else {}
    with pytest.raises(UserError, match=message):
        check(sizes, 1, **{"lora_rank": 4, **lora})
    check({**sizes, "model_type": "olmoe"}, 1, lora_rank=4, lora_targets=("q_proj",))
