"""Operations counted matrix product by matrix product, and the peaks they are set against."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_psft.metrics import flops
from megatron_psft.model.shape import ExpertShape, ModelShape

SHAPE = ModelShape(
    model_type="qwen3",
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=80,
    num_attention_heads=6,
    num_query_groups=2,
    head_dim=24,
    vocab_size=101,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    qkv_bias=False,
    qk_norm=True,
    tied_embeddings=False,
    initializer_range=0.02,
    dtype="float32",
)


def counted_flops(shape: ModelShape, length: int) -> float:
    """What torch counts in transformers' forward pass over one record, with half of its attention: it computes the full
    square."""
    config = Qwen3Config(
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.int64, device="meta"))
    products = dict(counter.get_flop_counts()["Global"])
    # Angles of the rotary embedding are a product of positions and frequencies in some versions of transformers.
    for name, count in counter.get_flop_counts().get("Qwen3ForCausalLM.model.rotary_emb", {}).items():
        products[name] -= count
    return products[torch.ops.aten.mm] + products[torch.ops.aten.bmm] / 2  # batched: the scores, and what they weigh


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 1, "vocab_size": 1},
        {"num_query_groups": 6, "hidden_size": 48},
        {"ffn_hidden_size": 16, "head_dim": 8, "vocab_size": 1009},
    ],
    ids=str,
)
def test_operations_are_those_of_the_matrix_products(changes):
    shape = replace(SHAPE, **changes)
    for length in (2, 17):
        assert flops.forward_flops(shape, [length]) == counted_flops(shape, length)


@given(st.lists(st.integers(1, 100_000), max_size=8))
def test_records_do_not_attend_to_each_other(lengths):
    expected = sum(flops.forward_flops(SHAPE, [length]) for length in lengths)
    assert flops.forward_flops(SHAPE, lengths) == pytest.approx(expected, rel=1e-12)


def test_a_7b_model_costs_two_operations_per_weight_and_token():
    qwen = replace(
        SHAPE,
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        head_dim=128,
        vocab_size=152064,
    )
    # Qwen2.5-7B has 7.62e9 parameters, of which the embedding's 0.54e9 multiply nothing.
    assert flops.forward_flops(qwen, [1]) == pytest.approx(2 * 7.07e9, rel=1e-3)


def test_of_experts_only_those_that_a_token_meets_count():
    qwen = replace(
        SHAPE,
        num_layers=48,
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_attention_heads=32,
        num_query_groups=4,
        head_dim=128,
        vocab_size=151936,
        experts=ExpertShape(count=128, per_token=8, ffn_hidden_size=768, normalizes=True, dense_layers=()),
    )
    # Qwen3-30B-A3B is published with 3.3e9 activated parameters, of which the embedding's 0.31e9 multiply nothing.
    sparse = flops.forward_flops(qwen, [1])
    assert sparse == pytest.approx(2 * 2.99e9, rel=0.02)
    dense_layer = replace(qwen, experts=replace(qwen.experts, dense_layers=(5,)))
    difference = 3 * 2048 * (6144 - 8 * 768) - 2048 * 128
    assert flops.forward_flops(dense_layer, [1]) - sparse == 2 * difference


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert flops.peak_flops(torch.device("cuda", 0)) == expected
