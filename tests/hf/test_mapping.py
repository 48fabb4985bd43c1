"""Every element of a Hugging Face checkpoint has its place on exactly one tensor-parallel rank, or on all of them."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_psft.hf.mapping import hf_tensors, module_name, pieces, scatter
from megatron_psft.model.shape import ExpertShape, ModelShape, read_shape
from tests.support import tiny


@st.composite
def cut_models(draw) -> tuple[ModelShape, int]:
    """A shape, and a tensor-parallel size that divides it."""
    tensor_size = draw(st.sampled_from([1, 2, 3, 4]))
    groups = tensor_size * draw(st.integers(1, 2))
    model_type = draw(st.sampled_from(["llama", "qwen3_moe", "mixtral"]))
    experts = ExpertShape(
        count=draw(st.integers(1, 3)),
        per_token=1,
        ffn_hidden_size=tensor_size * draw(st.integers(1, 3)),
        normalizes=False,
        dense_layers=draw(st.sampled_from([(), (0,)])),
    )
    shape = ModelShape(
        model_type=model_type,
        experts=None if model_type == "llama" else experts,
        num_layers=draw(st.integers(1, 2)),
        hidden_size=draw(st.integers(1, 5)),
        ffn_hidden_size=tensor_size * draw(st.integers(1, 3)),
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_query_groups=groups,
        head_dim=draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 20)),
        norm_eps=1e-6,
        rope_theta=1e4,
        rope_scaling=None,
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
        initializer_range=0.02,
        dtype="float32",
    )
    return shape, tensor_size


def parameters_of_a_rank(shape: ModelShape, tensor_size: int, *, has_engine: bool) -> dict[str, tuple[int, ...]]:
    """Megatron-Core's parameters by the shape of a rank's part; Transformer Engine fuses two norms into linears."""
    hidden, head_dim = shape.hidden_size, shape.head_dim
    heads, groups = shape.num_attention_heads // tensor_size, shape.num_query_groups // tensor_size
    vocabulary = -(-shape.vocab_size // (5 * tensor_size)) * 5  # some rows of padding
    parameters: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (vocabulary, hidden),
        "decoder.final_layernorm.weight": (hidden,),
    }
    if not shape.tied_embeddings:
        parameters["output_layer.weight"] = (vocabulary, hidden)
    for layer in range(shape.num_layers):
        own: dict[str, tuple[int, ...]] = {
            "self_attention.linear_qkv.weight": ((heads + 2 * groups) * head_dim, hidden),
            "self_attention.linear_proj.weight": (hidden, heads * head_dim),
        }
        if shape.experts is None or layer in shape.experts.dense_layers:
            mlps = {"mlp": shape.ffn_hidden_size}
        else:
            own["mlp.router.weight"] = (shape.experts.count, hidden)
            mlps = {f"mlp.experts.{i}": shape.experts.ffn_hidden_size for i in range(shape.experts.count)}
        for name, ffn in mlps.items():
            own[f"{name}.linear_fc1.weight"] = (2 * ffn // tensor_size, hidden)
            own[f"{name}.linear_fc2.weight"] = (hidden, ffn // tensor_size)
        if shape.qkv_bias:
            own["self_attention.linear_qkv.bias"] = ((heads + 2 * groups) * head_dim,)
        if shape.qk_norm:
            own["self_attention.q_layernorm.weight"] = own["self_attention.k_layernorm.weight"] = (head_dim,)
        if has_engine:
            own["self_attention.linear_qkv.layer_norm_weight"] = (hidden,)
            own["mlp.linear_fc1.layer_norm_weight" if "mlp" in mlps else "pre_mlp_layernorm.weight"] = (hidden,)
        else:
            own["input_layernorm.weight"] = own["pre_mlp_layernorm.weight"] = (hidden,)
        parameters |= {f"decoder.layers.{layer}.{name}": dims for name, dims in own.items()}
    return parameters


def pieces_of(name: str, shape: ModelShape, rank: int, tensor_size: int, dims: tuple[int, ...]) -> list:
    return pieces(name, shape, tensor_rank=rank, tensor_size=tensor_size, local_rows=dims[0])


@settings(deadline=None)
@given(cut=cut_models(), has_engine=st.booleans())
def test_every_element_has_one_place_and_norms_have_one_on_each_rank(cut, has_engine):
    shape, tensor_size = cut
    counts = {name: torch.zeros(dims, dtype=torch.int64) for name, dims in hf_tensors(shape).items()}
    for rank in range(tensor_size):
        for name, dims in parameters_of_a_rank(shape, tensor_size, has_engine=has_engine).items():
            for piece in pieces_of(name, shape, rank, tensor_size, dims):
                counts[piece.name][piece.index] += 1
    for name, count in counts.items():
        expected = tensor_size if name.endswith(("norm.weight", ".gate.weight")) else 1
        assert count.eq(expected).all(), name


@settings(deadline=None)
@given(cut=cut_models(), has_engine=st.booleans())
def test_pieces_fill_a_parameter_but_for_the_padding_of_the_vocabulary(cut, has_engine):
    shape, tensor_size = cut
    filled = Counter()
    parameters = parameters_of_a_rank(shape, tensor_size, has_engine=has_engine)
    for rank in range(tensor_size):
        for name, dims in parameters.items():
            whole = hf_tensors(shape)
            for piece in pieces_of(name, shape, rank, tensor_size, dims):
                block = torch.empty(whole[piece.name])[piece.index]
                assert block.shape[1:] == dims[1:]
                filled[name] += len(block)
    for name, dims in parameters.items():
        in_vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
        assert filled[name] == (shape.vocab_size if in_vocabulary else dims[0] * tensor_size)


@settings(deadline=None)
@given(cut=cut_models(), seed=st.integers(0, 9))
def test_what_is_cut_and_put_together_is_what_it_was(cut, seed):
    shape, tensor_size = cut
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.rand(dims, generator=generator) for name, dims in hf_tensors(shape).items()}
    found = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    for rank in range(tensor_size):
        for name, dims in parameters_of_a_rank(shape, tensor_size, has_engine=False).items():
            blocks = pieces_of(name, shape, rank, tensor_size, dims)
            shard = torch.full(dims, -1.0)
            stacked = torch.cat([tensors[piece.name][piece.index] for piece in blocks])
            shard[: len(stacked)] = stacked
            scatter(shard, blocks, found)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name


def test_queries_keys_and_values_are_stacked_by_group():
    """Two of four groups on the second of two ranks, three query heads each, two rows per head; by hand."""
    shape = ModelShape(
        model_type="llama",
        num_layers=8,
        hidden_size=5,
        ffn_hidden_size=6,
        num_attention_heads=12,
        num_query_groups=4,
        head_dim=2,
        vocab_size=7,
        norm_eps=1e-6,
        rope_theta=1e4,
        rope_scaling=None,
        qkv_bias=True,
        qk_norm=False,
        tied_embeddings=False,
        initializer_range=0.02,
        dtype="float32",
    )
    for kind in ("weight", "bias"):
        found = pieces(
            f"decoder.layers.7.self_attention.linear_qkv.{kind}", shape, tensor_rank=1, tensor_size=2, local_rows=20
        )
        assert [(piece.name, piece.rows, piece.columns) for piece in found] == [
            (f"model.layers.7.self_attn.q_proj.{kind}", (12, 18), None),
            (f"model.layers.7.self_attn.k_proj.{kind}", (4, 6), None),
            (f"model.layers.7.self_attn.v_proj.{kind}", (4, 6), None),
            (f"model.layers.7.self_attn.q_proj.{kind}", (18, 24), None),
            (f"model.layers.7.self_attn.k_proj.{kind}", (6, 8), None),
            (f"model.layers.7.self_attn.v_proj.{kind}", (6, 8), None),
        ]
    gate_and_up = pieces("decoder.layers.7.mlp.linear_fc1.weight", shape, tensor_rank=1, tensor_size=2, local_rows=6)
    assert [(piece.name, piece.rows) for piece in gate_and_up] == [
        ("model.layers.7.mlp.gate_proj.weight", (3, 6)),
        ("model.layers.7.mlp.up_proj.weight", (3, 6)),
    ]


@settings(deadline=None)
@given(cut=cut_models(), rank=st.integers(0, 3))
def test_the_head_of_the_last_stage_is_the_embedding_where_they_are_tied(cut, rank):
    shape, tensor_size = cut
    rank %= tensor_size
    names = ("embedding.word_embeddings.weight", "output_layer.weight")
    embedding, head = (pieces_of(name, shape, rank, tensor_size, (7,)) for name in names)
    assert (head == embedding) is shape.tied_embeddings
    assert head[0].rows == embedding[0].rows


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.MOE_FAMILIES, *tiny.VARIANTS, *tiny.VISION_FAMILIES])
def test_names_and_dimensions_are_those_of_transformers(tmp_path, family, tied):
    folder = tiny.build_model(tmp_path, family, tied=tied)
    theirs = dict(tiny.load_model(folder).named_parameters())  # a tied one once
    found = hf_tensors(read_shape(folder))
    assert found == {name: tuple(tensor.shape) for name, tensor in tiny.hub_tensors(theirs, family).items()}
    tower = read_shape(folder).family.vision
    names = {module_name(name, tower) for name in load_file(folder / "model.safetensors")}
    assert set(found) == {name for name in names if tower is None or not name.startswith(tower.prefix)}


@pytest.mark.parametrize("name", ["decoder.layers.0.mlp.linear_fc1.bias", "decoder.layers.0.mlp.router.weight"])
def test_a_parameter_without_a_counterpart_is_named(tmp_path, name):
    shape = read_shape(tiny.build_model(tmp_path, "llama"))
    with pytest.raises(KeyError, match=name):
        pieces(name, shape, tensor_rank=0, tensor_size=1, local_rows=4)
