"""Published configurations load with the numbers their authors gave them, in every spelling of them."""

import dataclasses
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_psft.errors import UserError
from megatron_psft.model.gpt import scale_rope
from megatron_psft.model.rope import Llama3RopeScaling, YarnRopeScaling
from megatron_psft.model.shape import ExpertShape, ModelShape, read_max_positions, read_shape
from tests.model.shapes import CLASSES, SMALL, make_config, read
from tests.support import tiny


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder with published `config.json` files, which is no part of the repository."""
    beside = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("MEGATRON_PSFT_DATA", beside)) / "hf_configs"
    if not folder.is_dir():
        pytest.skip(f"no published configs: {folder} is no folder")
    return folder


LLAMA_3_1_8B = ModelShape(
    model_type="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=128256,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
    qkv_bias=False,
    qk_norm=False,
    tied_embeddings=False,
    initializer_range=0.02,
    dtype="bfloat16",
)
QWEN2_5_7B = ModelShape(
    model_type="qwen2",
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    num_query_groups=4,
    head_dim=128,
    vocab_size=152064,
    norm_eps=1e-6,
    rope_theta=1000000.0,
    rope_scaling=None,
    qkv_bias=True,
    qk_norm=False,
    tied_embeddings=False,
    initializer_range=0.02,
    dtype="bfloat16",
)
QWEN3_4B = ModelShape(
    model_type="qwen3",
    num_layers=36,
    hidden_size=2560,
    ffn_hidden_size=9728,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=151936,
    norm_eps=1e-6,
    rope_theta=1000000.0,
    rope_scaling=None,
    qkv_bias=False,
    qk_norm=True,
    tied_embeddings=True,
    initializer_range=0.02,
    dtype="bfloat16",
)
PUBLISHED = {
    "Qwen2.5-0.5B": ModelShape(
        model_type="qwen2",
        num_layers=24,
        hidden_size=896,
        ffn_hidden_size=4864,
        num_attention_heads=14,
        num_query_groups=2,
        head_dim=64,
        vocab_size=151936,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        rope_scaling=None,
        qkv_bias=True,
        qk_norm=False,
        tied_embeddings=True,
        initializer_range=0.02,
        dtype="bfloat16",
    ),
    "Qwen2.5-7B-Instruct": QWEN2_5_7B,
    "Qwen3-4B": QWEN3_4B,
    "Qwen3-4B-Base": QWEN3_4B,
    "Llama-3.1-8B": LLAMA_3_1_8B,
    "Llama-3.1-8B-Instruct": LLAMA_3_1_8B,
    "Qwen3-30B-A3B": ModelShape(
        model_type="qwen3_moe",
        num_layers=48,
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_attention_heads=32,
        num_query_groups=4,
        head_dim=128,
        vocab_size=151936,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        rope_scaling=None,
        qkv_bias=False,
        qk_norm=True,
        tied_embeddings=False,
        initializer_range=0.02,
        dtype="bfloat16",
        experts=ExpertShape(count=128, per_token=8, ffn_hidden_size=768, normalizes=True, dense_layers=()),
    ),
    "Qwen2.5-VL-7B-Instruct": dataclasses.replace(QWEN2_5_7B, model_type="qwen2_5_vl"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_has_its_published_numbers(published, name):
    assert read_shape(published / name) == PUBLISHED[name]


def test_every_published_config_is_covered(published):
    assert {path.parent.name for path in published.glob("*/config.json")} <= {*PUBLISHED}


def test_absent_fields_have_transformers_defaults():
    """Of Llama, whose class derives heads from what is given."""
    theirs = LlamaConfig(**SMALL)
    shape = read()
    assert (shape.num_query_groups, shape.head_dim) == (theirs.num_key_value_heads, theirs.head_dim) == (5, 8)
    assert (shape.norm_eps, shape.initializer_range) == (theirs.rms_norm_eps, theirs.initializer_range)
    assert (shape.rope_theta, shape.rope_scaling) == (theirs.rope_parameters["rope_theta"], None)
    assert shape.tied_embeddings is theirs.tie_word_embeddings is False
    assert shape.dtype == "float32"


@pytest.mark.parametrize(("model_type", "theirs"), [("qwen2", Qwen2Config), ("qwen3", Qwen3Config)])
def test_fields_that_qwen_derives_differently_are_taken_its_way(model_type, theirs):
    """Heads that are not given are 32 key-value heads, or 128 wide, for these classes."""
    changes = {"num_attention_heads": 64, "hidden_size": 128}
    expected = theirs(**changes)
    shape = read(model_type=model_type, **changes)
    assert shape.num_query_groups == expected.num_key_value_heads
    assert shape.head_dim == getattr(expected, "head_dim", 2)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5000.0},
        {"rope_theta": 5000, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5000.0},
        {"rope_parameters": {"rope_theta": 5000.0}, "rope_scaling": None},
    ],
)
def test_both_spellings_of_the_rotary_base_are_read(spelling):
    shape = read(**spelling)
    assert (shape.rope_theta, shape.rope_scaling) == (5000.0, None)


LLAMA3_SCALING = {
    "factor": 32.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 8.0,
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 7.0, "rope_scaling": {**LLAMA3_SCALING, "rope_type": "llama3"}},
        {"rope_theta": 7.0, "rope_scaling": {**LLAMA3_SCALING, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3_SCALING, "rope_type": "llama3", "rope_theta": 7.0}},
    ],
)
def test_both_spellings_of_llama3_scaling_are_read(spelling):
    shape = read(**spelling)
    assert shape.rope_theta == 7.0
    assert dataclasses.asdict(shape.rope_scaling) == LLAMA3_SCALING


@pytest.mark.parametrize("field", LLAMA3_SCALING)
def test_llama3_scaling_needs_all_its_numbers(field):
    numbers = {name: value for name, value in LLAMA3_SCALING.items() if name != field}
    with pytest.raises(UserError, match=field):
        read(rope_scaling={**numbers, "rope_type": "llama3"})


def test_yarn_has_the_numbers_of_transformers_where_few_are_given():
    """As Qwen's model cards have it, with the positions of the file."""
    scaling = read(rope_scaling={"type": "yarn", "factor": 4.0}, max_position_embeddings=32768).rope_scaling
    assert scaling == YarnRopeScaling(
        factor=4.0,
        original_max_position_embeddings=32768,
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=pytest.approx(0.1 * math.log(4.0) + 1.0),
        truncate=True,
    )


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta_fast": 8, "beta_slow": 2},
        {"truncate": False},
        {"attention_factor": 1.5},
        {"mscale": 2.0, "mscale_all_dim": 0.5},
        {"mscale": 2.0},
        {"factor": 1.0},
        {"original_max_position_embeddings": 8},  # all frequencies are divided
        {"original_max_position_embeddings": 2**22},  # none is
    ],
)
def test_yarn_stretches_frequencies_as_transformers_does(changes):
    scaling = {**YARN, **changes}
    theirs = Qwen3Config(head_dim=32, rope_parameters={**scaling, "rope_theta": 10000.0})
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    found = read(model_type="qwen3", num_key_value_heads=5, head_dim=32, rope_parameters=scaling)
    plain = 1 / 10000 ** (torch.arange(0, 32, 2) / 32)
    model = SimpleNamespace(rotary_pos_emb=SimpleNamespace(inv_freq=plain))
    scale_rope(model, found)
    torch.testing.assert_close(model.rotary_pos_emb.inv_freq, inv_freq)
    assert found.rope_scaling.attention_factor == pytest.approx(attention_factor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": None}, "the yarn rope scaling has no factor"),
        ({"factor": "4"}, r"factor \(4\) of the rope scaling must be a positive number"),
        ({"beta_fast": -1}, r"beta_fast \(-1\)"),
        ({"original_max_position_embeddings": None}, "the yarn rope scaling has no original_max_position_embeddings"),
    ],
)
def test_yarn_with_a_number_that_is_none_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        read(rope_scaling={**YARN, **changes})


@pytest.mark.parametrize(("stated", "expected"), [(512, 2048), (2048, 2048), (4096, 4096)])
def test_positions_that_yarn_adds_are_counted_once(tmp_path, stated, expected):
    """Qwen's files state those before, others those after."""
    config = make_config(rope_scaling=YARN, max_position_embeddings=stated)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert read_max_positions(tmp_path) == expected


@pytest.mark.parametrize(
    ("changes", "window"),
    [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 1}, 1)],
)
def test_a_missing_window_of_mistral_is_that_of_its_class(changes, window):
    theirs = MistralConfig(**SMALL, num_key_value_heads=5, **changes)
    shape = read(model_type="mistral", num_key_value_heads=5, **changes)
    assert shape.sliding_window == theirs.sliding_window == window


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_both_spellings_of_the_dtype_are_read(spelling):
    assert read(**{spelling: "bfloat16"}).dtype == "bfloat16"


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.MOE_FAMILIES, *tiny.VARIANTS, *tiny.VISION_FAMILIES])
def test_what_either_transformers_writes_is_read_alike(tmp_path, family):
    shapes = [
        read_shape(tiny.build_model(tmp_path / str(hub), family, hub_config=hub, dtype=torch.bfloat16))
        for hub in (True, False)
    ]
    assert shapes[0] == shapes[1]
    assert shapes[0].dtype == "bfloat16"
    assert (shapes[0].rope_scaling is not None) is (family == "llama" or family.endswith("-yarn"))


def test_absent_fields_of_experts_have_transformers_defaults():
    for family in ("qwen3_moe", "mixtral"):
        theirs = CLASSES[family](**{name: value for name, value in SMALL.items() if name != "num_attention_heads"})
        shape = read(model_type=family, num_attention_heads=32, hidden_size=64)
        assert shape.norm_eps == theirs.rms_norm_eps
        assert shape.rope_theta == theirs.rope_parameters["rope_theta"]
        assert shape.num_query_groups == theirs.num_key_value_heads
        assert shape.experts == ExpertShape(
            count=theirs.num_experts,
            per_token=theirs.num_experts_per_tok,
            ffn_hidden_size=getattr(theirs, "moe_intermediate_size", theirs.intermediate_size),
            normalizes=getattr(theirs, "norm_topk_prob", True),
            dense_layers=(),
        )


@pytest.mark.parametrize(
    ("changes", "dense_layers"),
    [({"decoder_sparse_step": 2}, (0, 2)), ({"mlp_only_layers": [1]}, (1,)), ({"mlp_only_layers": None}, ())],
)
def test_some_layers_may_have_a_plain_mlp(changes, dense_layers):
    shape = read(model_type="qwen3_moe", num_key_value_heads=5, **changes)
    assert shape.experts.dense_layers == dense_layers
    assert [shape.has_experts(layer) for layer in range(3)] == [layer not in dense_layers for layer in range(3)]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) must be at most num_experts \(8\)"),
        ("mixtral", {"num_experts_per_tok": 1}, r"num_experts_per_tok \(1\) is not supported where the weights"),
        ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, r"num_experts_per_tok \(1\)"),
        ("qwen3_moe", {"num_experts": 0}, r"num_experts \(0\) must be a positive integer"),
        ("mixtral", {"sliding_window": 4096}, r"sliding_window \(4096\) is not supported"),
        ("mixtral", {"router_jitter_noise": 0.1}, r"router_jitter_noise \(0.1\) is not supported"),
    ],
)
def test_experts_that_make_no_sense_or_are_not_supported_are_refused(family, changes, message):
    with pytest.raises(UserError, match=message):
        read(model_type=family, num_key_value_heads=5, **changes)


def test_both_spellings_of_the_number_of_experts_are_read():
    shapes = [
        read(model_type="qwen3_moe", num_key_value_heads=5, **{name: 16})
        for name in ("num_experts", "num_local_experts")
    ]
    assert [shape.experts.count for shape in shapes] == [16, 16]
