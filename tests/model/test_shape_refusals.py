"""Maths that this version does not have is refused by field and value, and a config that cannot be read by its path."""

import copy
import dataclasses
import json

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2_5_VLConfig, Qwen2Config

from megatron_psft.errors import UserError
from megatron_psft.model.shape import read_shape, shape_from_config
from tests.model.shapes import CLASSES, FAMILIES, SMALL, make_config, read

UNSUPPORTED = {
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "attention_dropout": 0.1,
    "use_sliding_window": True,
    "partial_rotary_factor": 0.5,
    "quantization_config": {"quant_method": "fp8"},
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("field", UNSUPPORTED)
def test_other_maths_is_refused_by_field_and_value(family, field):
    with pytest.raises(UserError) as caught:
        read(model_type=family, **{field: UNSUPPORTED[field]})
    value = "sliding_attention" if field == "layer_types" else str(UNSUPPORTED[field])
    assert f"here: {field} ({value}) is not supported" in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_at_its_supported_value_is_no_reason_to_refuse(family):
    supported = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0,
        "use_sliding_window": False,
        "sliding_window": None if family == "mixtral" else 4096,  # Mistral's class assumes this
        "max_window_layers": 2,
        "partial_rotary_factor": 1,
        "quantization_config": None,
        "layer_types": ["full_attention"] * 3,
    }
    assert read(model_type=family, num_key_value_heads=5, **supported) == read(model_type=family, num_key_value_heads=5)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "longrope", "mrope"])
@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_other_rotary_scalings_are_refused_by_name(kind, where, key):
    with pytest.raises(UserError, match=rf"rope_type \({kind}\) is not supported; supported are default, llama3, yarn"):
        read(**{where: {key: kind, "factor": 4.0, "rope_theta": 10000.0}})


def test_a_scaling_written_beside_rope_parameters_is_not_overlooked():
    """Model cards ask to add `rope_scaling` for long contexts, and transformers reads it alone: not the base either."""
    both = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    }
    theirs = Qwen2Config(**copy.deepcopy(both))
    assert (theirs.rope_parameters["rope_type"], theirs.rope_parameters["rope_theta"]) == ("yarn", 1e4)
    with pytest.raises(UserError, match=r"rope_parameters and rope_scaling .* rope_type \(default and yarn\)"):
        read(model_type="qwen2", **both)
    both["rope_parameters"] = {"rope_theta": 1e6}
    with pytest.raises(UserError, match=r"other values of rope_theta \(1000000.0 and None\)"):
        read(model_type="qwen2", num_key_value_heads=5, **both)
    shape = read(model_type="qwen2", num_key_value_heads=5, **both, rope_theta=1e6)
    assert (shape.rope_theta, shape.rope_scaling.factor) == (1e6, 4.0)


def test_rotary_settings_of_kinds_of_layers_are_refused():
    """Read as one for all layers, they would say nothing."""
    with pytest.raises(UserError, match="rope_parameters with settings of its own for full_attention"):
        read(rope_parameters={"full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}})


def test_a_rotary_part_within_rope_parameters_is_refused():
    with pytest.raises(UserError, match=r"partial_rotary_factor \(0.25\)"):
        read(rope_parameters={"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.25})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_vl", {"text_config": None}, r"text_config \(None\) must be a JSON object"),
        ("qwen2_5_vl", {"text_config": "a"}, r"text_config \(a\) must be a JSON object"),
        (
            "qwen3_vl",
            {"text_config": {"model_type": "qwen3_vl_moe_text"}},
            r"qwen3_vl_moe_text.* must be qwen3_vl_text",
        ),
        ("qwen2_5_vl", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ],
)
def test_what_no_language_model_beside_a_vision_tower_says_is_refused(family, changes, message):
    config = make_config(family, num_key_value_heads=5)
    with pytest.raises(UserError, match=message):
        shape_from_config({**config, **changes}, "here")


@pytest.mark.parametrize("sections", [[1, 1, 1], [4], "a", None])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_sections_that_are_not_of_the_head_are_refused(family, sections):
    rope = {} if sections is None else {"mrope_section": sections}
    with pytest.raises(UserError, match=r"mrope_section \(.*\) of rope_parameters must be three numbers .* to 4,"):
        read(model_type=family, num_key_value_heads=5, head_dim=8, rope_parameters=rope)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_a_tied_head_is_said_in_either_place(outer, inner):
    """As transformers has it of what its earlier releases wrote; 5.12 heeds the outer place alone."""
    config = make_config("qwen2_5_vl", num_key_value_heads=5, tie_word_embeddings=inner)
    config = {**config, "tie_word_embeddings": outer}
    theirs = Qwen2_5_VLConfig(**{name: value for name, value in config.items() if name != "model_type"})
    assert shape_from_config(config, "here").tied_embeddings is (outer or inner)
    heeds_both = Version(transformers.__version__) >= Version("5.13")
    assert theirs.tie_word_embeddings is (outer or (inner and heeds_both))


# Fields of the configuration classes that say nothing of the maths of training: names, ids for generation, caches, and
# the output format of transformers' own forward.
NO_MATHS = {
    *("transformers_version", "architectures", "model_type", "name_or_path", "id2label", "label2id", "problem_type"),
    *("output_hidden_states", "output_attentions", "return_dict", "use_cache", "bos_token_id", "eos_token_id"),
    *("is_encoder_decoder", "tie_last_hidden_states", "num_labels", "chunk_size_feed_forward"),
    "pad_token_id",  # only stops transformers from training that row of the embedding
    "pretraining_tp",  # cuts products into sums of products, if it is read at all
    "max_position_embeddings",  # sizes no table; rotary tables grow
    "max_window_layers",  # of no effect without use_sliding_window
    *("router_aux_loss_coef", "output_router_logits"),  # of a loss that is no part of the objective
}
# Each field that changes the maths, and a value that this version can only refuse or that shows in the shape.
MATHS = {
    "vocab_size": 18,
    "hidden_size": 80,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 10,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "hidden_act": "relu",
    "initializer_range": 0.5,
    "rms_norm_eps": 0.5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    "attention_bias": True,
    "attention_dropout": 0.1,
    "mlp_bias": True,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention"] * 3,
    "dtype": "float16",
    "sliding_window": 8,  # of no effect in Qwen's without use_sliding_window
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [1],
    "router_jitter_noise": 0.01,
    "is_causal": False,  # in no class, but read from a file that has it: embedding models do
}


def read_by(family: str) -> list[str]:
    """The fields of MATHS that change what the family's class computes; what no class declares may be read by all."""
    declared = {name: {field.name for field in dataclasses.fields(theirs)} for name, theirs in CLASSES.items()}
    own = declared[family] | (set(MATHS) - set().union(*declared.values()))
    if family.startswith("qwen"):  # the others heed it or refuse it
        own -= {"sliding_window"}
    return [field for field in MATHS if field in own]


@pytest.mark.parametrize("theirs", CLASSES.values())
def test_every_field_of_transformers_is_known_to_these_tests(theirs):
    fields = {field.name for field in dataclasses.fields(theirs)}
    assert fields - NO_MATHS - set(MATHS) == set()


@pytest.mark.parametrize(("family", "field"), [(family, field) for family in FAMILIES for field in read_by(family)])
def test_no_field_that_changes_the_maths_is_overlooked(family, field):
    plain = {"model_type": family, "num_key_value_heads": 5}
    try:
        shape = read(**{**plain, field: MATHS[field]})
    except UserError as error:
        assert field in str(error)  # noqa: PT017 (either is right)
    else:
        assert shape != read(**plain)


def test_transformers_obeys_is_causal_although_its_classes_do_not_declare_it():
    torch.manual_seed(0)
    tokens = torch.tensor([[1, 2, 3, 4]])
    causal, both_ways = (
        AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, is_causal=flag)) for flag in (True, False)
    )
    both_ways.load_state_dict(causal.state_dict())
    assert not torch.allclose(causal(tokens).logits, both_ways(tokens).logits)


@pytest.mark.parametrize("model_type", ["mistral3", "qwen3_next", "LLAMA", None, 3])
def test_another_model_type_is_refused(model_type):
    with pytest.raises(
        UserError, match=rf"model_type \({model_type}\) is not supported; supported are llama, qwen2, qwen3"
    ):
        read(model_type=model_type)


@pytest.mark.parametrize(
    "field", ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"]
)
def test_a_missing_field_is_named(field):
    config = make_config()
    del config[field]
    with pytest.raises(UserError, match=f"here: {field} is missing"):
        shape_from_config(config, "here")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", "three"),
        ("hidden_size", None),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),  # five heads do not divide into three groups
        ("dtype", "fp8"),
        ("rope_scaling", "yarn"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(field, value):
    with pytest.raises(UserError, match=field):
        read(**{field: value})


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=rf"load_hf \({tmp_path}\) must hold a config.json"):
        read_shape(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b'{"model_type": "llama",}', b"\xff\xfe\x00", b"[]", b'"llama"', b"null"])
def test_a_broken_config_is_refused_by_its_path(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError) as caught:
        read_shape(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_an_error_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(make_config(hidden_act="gelu")))
    with pytest.raises(UserError, match=f"{tmp_path}/config.json: hidden_act"):
        read_shape(tmp_path)
