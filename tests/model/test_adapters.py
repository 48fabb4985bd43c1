"""Adapters beside a frozen model: what they add, what is trained of it, and which are refused."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_psft.config.lora import LoraConfig, spelled_out
from megatron_psft.errors import UserError
from megatron_psft.model.adapters import targeted
from megatron_psft.model.shape import read_shape
from tests.model.statistics import make_batches
from tests.support import tiny
from tests.support.layouts import LAYOUTS, make_config, rank_of

LORA = LoraConfig(lora_rank=5, lora_targets=("q_proj,v_proj", "linear_fc1", "down_proj"))


def measure(folder: Path) -> dict:
    """On one rank: scores without adapters, with new ones, with others, and with these off; and what is trained."""
    from megatron_psft.model.adapters import adapters_off
    from megatron_psft.model.parameters import is_adapter, named_parameters
    from megatron_psft.train.optimizer import build_optimizer
    from megatron_psft.train.pipeline import Pipeline

    def scores(chunks) -> torch.Tensor:
        pipeline = Pipeline(chunks=chunks, parallel=rank.parallel)
        return torch.cat([stats.log_probs for stats in pipeline.score(make_batches(2, 0, 1))])

    with rank_of(LAYOUTS["TP2-SP"]) as rank:
        plain, _ = rank.build(folder)
        chunks, _ = rank.build(folder, lora=LORA)
        found = {"plain": scores(plain), "new": scores(chunks)}
        parameters = dict(named_parameters(chunks))
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name.endswith("linear_out.weight"):
                    parameter.fill_(0.1)
        found["trained"] = scores(chunks)
        with adapters_off(chunks):
            found["off"] = scores(chunks)
        optimizer = build_optimizer(make_config(rank.layout, lora=LORA), chunks)
        return found | {
            "is_consistent": all(is_adapter(name) == value.requires_grad for name, value in parameters.items()),
            "adapters": sum(value.numel() for name, value in parameters.items() if is_adapter(name)),
            "gradients": sum(buffer.grad_data.numel() for buffer in chunks[0].buffers),
            "optimized": sum(value.numel() for group in optimizer.param_groups for value in group["params"]),
            "a": {name: value.detach() for name, value in parameters.items() if name.endswith("linear_in.weight")},
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.build_model(tmp_path_factory.mktemp("adapters") / "qwen2", "qwen2", vocab_size=1000)


@pytest.fixture(scope="module")
def measured(pool, folder) -> list[dict]:
    return pool.run(measure, 2, folder)


def test_a_new_adapter_and_one_that_is_off_leave_the_model_bit_for_bit(measured):
    for found in measured:
        assert torch.equal(found["new"], found["plain"])
        assert torch.equal(found["off"], found["plain"])
        assert not torch.allclose(found["trained"], found["plain"], atol=1e-3)


def test_nothing_but_adapters_has_a_gradient_a_buffer_or_an_optimizer(measured):
    # q, v, gate and up: A whole, B cut; down: A cut, B whole.
    per_layer = 5 * (4 * 64 + (64 + 32 + 2 * 96) // 2 + 96 // 2 + 64)
    for found in measured:
        assert found["is_consistent"]
        assert found["adapters"] == found["optimized"] == 4 * per_layer
        assert 4 * per_layer <= found["gradients"] < 4 * per_layer + 1024  # Megatron-Core pads its buffers


def test_what_is_not_cut_is_the_same_on_all_ranks_and_drawn_as_peft_draws_it(measured):
    first, second = (found["a"] for found in measured)
    for name, value in first.items():
        is_cut = "linear_fc2" in name
        assert torch.equal(value, second[name]) != is_cut, name
        bound = 1 / math.sqrt(96 if is_cut else 64)  # torch's kaiming_uniform_ with a = sqrt(5)
        assert 0.9 * bound < value.abs().max() <= bound, name


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (("all-linear",), ["q", "k", "v", "attention_output", "gate", "up", "down"]),
        (("linear_qkv", "down_proj"), ["q", "k", "v", "down"]),
        (("up_proj,q_proj",), ["q", "up"]),
    ],
)
def test_targets_by_either_library_s_names(folder, given, names):
    shape = read_shape(folder)
    chosen = targeted(LoraConfig(lora_rank=1, lora_targets=given), shape)
    assert [it.name for it in chosen] == names
    assert {it.target(shape) for it in chosen} == spelled_out(given), "what a resumed run compares"


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen2", {"lora_targets": ("q_proj,w1",)}, r"lora_targets \(w1\) is no linear layer of a qwen2 model"),
        ("qwen2", {"lora_rank": 33}, r"lora_rank \(33\) must be at most 32, the smaller side of k_proj"),
        ("qwen2", {"lora_rank": 65, "lora_targets": ("down_proj",)}, r"must be at most 64, .* of down_proj"),
        (
            "qwen3_moe",
            {},
            r"lora_targets \(all-linear\) would put adapters on experts, .* q_proj, k_proj, v_proj, o_proj",
        ),
        ("mixtral", {"lora_targets": ("w1",)}, r"lora_targets \(w1\) would put adapters on experts"),
    ],
)
def test_targets_and_ranks_that_a_model_has_no_room_for(tmp_path, family, change, message):
    shape = read_shape(tiny.build_model(tmp_path, family))
    with pytest.raises(UserError, match=message):
        targeted(replace(LoraConfig(lora_rank=4), **change), shape)
